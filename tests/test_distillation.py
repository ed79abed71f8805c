"""Distillation: losses by hand, a teacher that stays as it is, adapters, and whole distilled runs."""

import hashlib
import json
import math

import pytest
import torch
from torch import nn

import models
from models.resnet_cifar import CifarResNet
from utils.base.errors import UserError
from utils.train.distillation import LOSSES, Distillation, KLLoss, checksum, share_classifier

STUDENT = torch.tensor([[1.0, 2.0], [0.0, -3.0]])
TEACHER = torch.tensor([[0.0, 4.0], [0.5, -3.0]])


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("MSE", (1 + 4 + 0.25 + 0) / 4),
        ("L1", (1 + 2 + 0.5 + 0) / 4),
        # Quadratic below a difference of 1, linear above.
        ("SmoothL1", ((1 - 0.5) + (2 - 0.5) + 0.125 + 0) / 4),
    ],
)
def test_feature_losses_by_hand(name, by_hand):
    assert LOSSES[name](4.0)(STUDENT, TEACHER).item() == pytest.approx(by_hand)


def test_kl_by_hand():
    temperature, expected = 2.0, 0.0
    for student, teacher in zip(STUDENT.tolist(), TEACHER.tolist(), strict=True):
        p = [math.exp(x / temperature) for x in teacher]
        q = [math.exp(x / temperature) for x in student]
        expected += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert KLLoss(temperature)(STUDENT, TEACHER).item() == pytest.approx(expected / 2 * temperature**2, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_that_equals_its_teacher_has_no_distance(loss):
    assert LOSSES[loss](4.0)(TEACHER, TEACHER.clone()).item() == pytest.approx(0, abs=1e-6)


class TwoStages(nn.Module):
    """A network of two stages with chosen widths; the second is `size` pixels wide."""

    def __init__(self, widths, num_classes=10, size=4):
        super().__init__()
        self.num_classes = num_classes
        self.one, self.two = nn.Conv2d(3, widths[0], 1), nn.Conv2d(widths[0], widths[1], 1)
        self.pool, self.classifier = nn.AdaptiveAvgPool2d(size), nn.Linear(widths[1], num_classes)

    def forward(self, x, return_features=False):
        one = self.one(x)
        two = self.pool(self.two(one))
        features = two.mean((2, 3))
        logits = self.classifier(features)
        return (logits, features, [one, two]) if return_features else logits


IMAGES, LABELS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


def make(on, student=(5, 6), teacher=(5, 6), **options):
    torch.manual_seed(1)
    nets = TwoStages(teacher), TwoStages(student)
    return nets[0], nets[1], Distillation(*nets, IMAGES, on=on, **options)


@pytest.mark.parametrize("on", ["feature", "stages", "logits"])
def test_loss_is_cross_entropy_plus_the_weighted_distances(on):
    teacher, student, objective = make(on, weight=0.5)
    loss, logits = objective(student, IMAGES, LABELS)
    own, theirs = student(IMAGES, return_features=True), teacher(IMAGES, return_features=True)
    pairs = {
        "logits": [(own[0], theirs[0])],
        "feature": [(own[1], theirs[1])],
        "stages": list(zip(own[2], theirs[2], strict=True)),
    }[on]
    expected = nn.functional.cross_entropy(own[0], LABELS) + 0.5 * sum(((a - b) ** 2).mean() for a, b in pairs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(logits, own[0])


def test_the_teacher_is_frozen_and_in_eval_mode():
    torch.manual_seed(0)
    teacher, student = CifarResNet(8), CifarResNet(8)
    images = torch.randn(4, 3, 32, 32)
    objective = Distillation(teacher, student, images)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student.train()
    loss, _ = objective(student, images, LABELS)
    loss.backward()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is not None for p in student.parameters())


def test_making_an_objective_leaves_the_student_as_it_was():
    torch.manual_seed(0)
    student = CifarResNet(8).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    Distillation(CifarResNet(8), student, torch.randn(4, 3, 32, 32))
    assert student.training
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


@pytest.mark.parametrize(("on", "kinds"), [("feature", [nn.Linear]), ("stages", [nn.Identity, nn.Conv2d])])
def test_different_widths_get_a_learned_linear_adapter(on, kinds):
    _, student, objective = make(on, student=(5, 7))
    assert [type(adapter) for adapter in objective.adapters] == kinds
    loss, _ = objective(student, IMAGES, LABELS)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.adapters.parameters())
    assert not any("adapter" in name for name in student.state_dict())


@pytest.mark.parametrize(
    ("make_nets", "options", "pattern"),
    [
        (lambda: (TwoStages((5, 6), 10), TwoStages((5, 6), 9)), dict(on="logits"), "9 classes.*10"),
        (
            lambda: (TwoStages((5, 6), size=4), TwoStages((5, 6), size=2)),
            dict(on="stages"),
            r"stage 2.*\(2, 2\).*\(4, 4\)",
        ),
    ],
)
def test_networks_that_cannot_be_compared_are_refused(make_nets, options, pattern):
    with pytest.raises(UserError, match=pattern):
        Distillation(*make_nets(), IMAGES, **options)


def test_share_classifier_copies_the_last_layer():
    torch.manual_seed(0)
    teacher, student = CifarResNet(14), CifarResNet(8)
    share_classifier(teacher, student)
    assert torch.equal(teacher.classifier.weight, student.classifier.weight)
    assert torch.equal(teacher.classifier.bias, student.classifier.bias)
    assert teacher.classifier.weight is not student.classifier.weight
    with pytest.raises(UserError, match=r"\(10, 64\).*\(7, 64\)"):
        share_classifier(teacher, CifarResNet(8, 7))


def test_checksum_is_sha256(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc" * 1_000_000)
    assert checksum(file) == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


def load(folder, arch="resnet8"):
    return torch.load(folder / f"checkpoint.{arch}.pth.tar", weights_only=True)


def test_a_distilled_run_names_its_teacher_and_stays_deployable(train, teacher, capsys):
    folder = train("--arch_small", "resnet8", "--teacher", teacher, "--epochs", 1)
    results = json.loads((folder / "results.json").read_text())
    assert results["recipe"] == "prune_distill" and results["optimizer"] == "AHSG_HT"
    assert results["teacher"] == {
        "arch": "resnet8",
        "file": str(teacher),
        "accuracy": results["teacher"]["accuracy"],
        "sha256": checksum(teacher),
    }
    assert results["teacher"]["accuracy"] >= 50
    printed = capsys.readouterr().out
    assert printed.index("**Teacher** Prec@1") < printed.index("==>>[")
    assert [f["kept"] for f in results["filters"]] == [11, 11, 11, 22, 22, 44, 44]
    saved = load(folder)
    assert saved["state_dict"].keys() == CifarResNet(8).state_dict().keys()
    assert len(saved["optimizer"]["state"]) == len(list(CifarResNet(8).parameters()))
    assert models.load(folder / "checkpoint.resnet8.pth.tar").num_classes == 10


def test_htrate_one_distils_without_thresholding(train, teacher):
    folder = train("--arch_small", "resnet8", "--teacher", teacher, "--epochs", 1, "--HTrate", 1, "--k", "none")
    results = json.loads((folder / "results.json").read_text())
    assert (results["recipe"], results["optimizer"]) == ("distill", "SGD")
    assert [f["kept"] for f in results["filters"]] == [16, 16, 16, 32, 32, 64, 64]


def test_a_distilled_run_with_adapters_resumes_exactly(train, teacher, monkeypatch):
    class Wider(CifarResNet):
        """resnet8 whose features, seen from outside, are 96 wide, so that an adapter is needed."""

        def forward(self, x, return_features=False):
            if not return_features:
                return super().forward(x)
            logits, features, stages = super().forward(x, True)
            return logits, torch.cat([features, features[:, :32]], dim=1), stages

    monkeypatch.setitem(
        models.registry.REGISTRY, "wider", lambda num_classes=10, **options: Wider(8, num_classes, **options)
    )
    flags = ["--arch_small", "wider", "--teacher", teacher]
    whole = train(*flags, "--epochs", 2, "--save_path", "whole")
    part = train(*flags, "--epochs", 1, "--save_path", "part")
    train(*flags, "--epochs", 2, "--resume", part / "checkpoint.wider.pth.tar")
    a, b = load(whole, "wider"), load(part, "wider")
    assert a["adapters"]["0.weight"].shape == (64, 96)
    assert torch.equal(a["adapters"]["0.weight"], b["adapters"]["0.weight"])
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    assert not any(name == "0.weight" for name in a["state_dict"])


def test_no_teacher_is_a_stop_that_names_the_command(train):
    with pytest.raises(
        UserError, match=r"trained teacher.*--teacher FILE.*cifar10_resnet_test\.py .* --arch resnet8 --recipe baseline"
    ):
        train("--arch_small", "resnet8")


def test_teachers_that_cannot_teach_are_refused(train, teacher, tmp_path, tree):
    def refuse(file, pattern, *flags):
        with pytest.raises(UserError, match=pattern) as caught:
            train("--arch_small", "resnet8", "--teacher", file, *flags)
        assert "\n" not in str(caught.value)

    refuse(tmp_path / "gone.pth.tar", "gone.pth.tar")
    torch.manual_seed(0)
    other = tmp_path / "other.pth.tar"
    torch.save({"arch": "resnet8", "state_dict": CifarResNet(8, 100).state_dict()}, other)
    refuse(other, "100 classes.*10")
    ignorant = CifarResNet(8, 10)
    nn.init.zeros_(ignorant.classifier.weight)
    torch.save({"arch": "resnet8", "state_dict": ignorant.state_dict()}, other)
    refuse(other, "no better than chance")
    with pytest.raises(UserError, match="is a resnet8, --arch says resnet20"):
        train("--arch_small", "resnet8", "--teacher", teacher, arch="resnet20")
    assert not (tmp_path / "runs").exists()


def test_released_prev_data_becomes_the_optimizers_state(train, tmp_path):
    """AHSG-HT's release kept prev_data inside param_groups; it resumes with momentum and x_{t-1} in place."""
    first = train("--epochs", 1, "--save_path", "first") / "checkpoint.resnet8.pth.tar"
    saved = torch.load(first, weights_only=True)
    state = saved["optimizer"]["state"]
    group = {
        n: v
        for n, v in saved["optimizer"]["param_groups"][0].items()
        if n in ("lr", "momentum", "dampening", "weight_decay", "nesterov")
    }
    keys = list(range(1000, 1000 + len(state)))
    group |= {"params": keys, "prev_data": [state[i]["prev_data"] for i in range(len(state))], "v": 0.1, "HTrate": 0.7}
    old = {
        "state": {k: {"momentum_buffer": state[i]["momentum_buffer"]} for i, k in enumerate(keys)},
        "param_groups": [group],
    }
    file = tmp_path / "released.pth.tar"
    torch.save(
        {
            "epoch": 1,
            "arch": "resnet8",
            "state_dict": saved["state_dict"],
            "best_prec1": torch.tensor(10.0),
            "optimizer": old,
        },
        file,
    )
    folder = train("--epochs", 2, "--resume", file)
    assert folder.parent.name == "runs"
    train("--epochs", 2, "--resume", first)
    a, b = load(folder), torch.load(first, weights_only=True)
    assert (a["epoch"], b["epoch"]) == (2, 2)
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
