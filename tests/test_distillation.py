"""Distillation: terms, a teacher that stays as it is, adapters, features by hooks, and distilled runs."""

import copy
import hashlib
import shutil
import sqlite3
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import settings_of
from torch import nn

import cifar10_resnet_test as script
import data
import models
from models.resnet_cifar import CifarResNet
from utils.base.errors import UserError
from utils.train.distillation import Distillation, prepare_teacher
from utils.train.features import with_features
from utils.train.losses import parse_term
from utils.train.setup import build_objective
from utils.train.teacher_cache import TeacherCache


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


def make(*terms, student=(5, 6), teacher=(5, 6), **options):
    torch.manual_seed(1)
    nets = TwoStages(teacher), TwoStages(student)
    return nets[0], nets[1], Distillation(*nets, IMAGES, [parse_term(term) for term in terms], **options)


TERMS = ["feature:MSE:0.5", "stages:L1:2", "logits:KL:0.9:T=2", "logits:DKD", "stages:AT:100"]


@pytest.mark.parametrize("terms", [*[[term] for term in TERMS], TERMS])
def test_loss_is_the_weighted_sum_of_cross_entropy_and_terms(terms):
    teacher, student, objective = make(*terms, ce_weight=0.3)
    calls = []
    for net in (student, objective.teacher):
        net.register_forward_hook(lambda net, inputs, output: calls.append(net))
    loss, logits = objective(student, IMAGES, LABELS)
    assert calls.count(student) == calls.count(objective.teacher) == 1, (
        "each network once, whatever the number of terms"
    )
    own, theirs = student(IMAGES, return_features=True), teacher(IMAGES, return_features=True)
    pairs = {"logits": [(own[0], theirs[0])], "feature": [(own[1], theirs[1])]}
    pairs["stages"] = list(zip(own[2], theirs[2], strict=True))
    expected = 0.3 * nn.functional.cross_entropy(own[0], LABELS)
    for term in map(parse_term, terms):
        expected = expected + term.weight * sum(term.make_loss()(a, b, LABELS) for a, b in pairs[term.on])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)  # the teacher has its BatchNorm folded
    assert torch.equal(logits, own[0])


def test_a_teacher_sees_images_in_its_own_normalisation():
    teacher, student = TwoStages((5, 6)), TwoStages((5, 6))
    own, fed = dict(mean=[0.1] * 3, std=[0.2] * 3), dict(mean=[0.4] * 3, std=[0.5] * 3)
    pixels = IMAGES.sigmoid()
    expected = teacher((pixels - 0.1) / 0.2)
    objective = Distillation(models.renormalise(teacher, own, fed), student, IMAGES, [parse_term("logits:MSE")])
    torch.testing.assert_close(objective.teacher_features((pixels - 0.4) / 0.5)["logits"][0], expected)


def test_a_teacher_that_names_no_normalisation_has_that_of_the_data_set(tree, teacher):
    """Also where the student starts from a network with another one."""
    images = data.load("cifar10", tree)
    usual = images.normalisation
    images.normalise_as([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    net, checkpoint = models.load(teacher), models.load_checkpoint(teacher)
    args = settings_of(script, ["--teacher", str(teacher)])
    args.teacher_arch, args.teacher_sha256 = "resnet8", ""
    _, facts = build_objective(
        (net, checkpoint), models.build("resnet8"), images, data.DataLoader(images.test, 10), args, usual
    )
    assert facts["teacher"]["accuracy"] == 100, "it knows these images, normalised as in its training"


def forbid(net):
    """Makes a network's forward pass an error."""
    net.register_forward_pre_hook(lambda net, inputs: pytest.fail("the teacher is run"))


@pytest.mark.parametrize("terms", [["logits:KL"], ["feature:MSE", "logits:DKD:2"], ["feature:L1"]])
def test_outputs_that_a_cache_has_need_no_teacher(terms, tmp_path):
    """Whatever is compared: the first run kept both of them."""
    _, student, first = make("feature:MSE")
    first.keep_outputs(TeacherCache(tmp_path / "cache", "a"), IMAGES)
    first(student, IMAGES[:3], LABELS[:3])
    _, student, expected = make(*terms)
    _, _, cached = make(*terms)
    cached.keep_outputs(TeacherCache(tmp_path / "cache", "a"), IMAGES)
    forbid(cached.teacher)
    assert torch.equal(cached(student, IMAGES[:3], LABELS[:3])[0], expected(student, IMAGES[:3], LABELS[:3])[0])
    for other in (IMAGES[1:], IMAGES[:3] + 1e-6, IMAGES[:3].flip(0), IMAGES[:3].transpose(2, 3)):
        with pytest.raises(pytest.fail.Exception):
            cached(student, other, LABELS[: len(other)])
    with pytest.raises(pytest.fail.Exception), torch.autocast("cpu", torch.bfloat16):
        cached(student, IMAGES[:3], LABELS[:3])


def test_a_cache_holds_one_teachers_outputs_apart_from_anothers(tmp_path):
    file = tmp_path / "cache"
    _, student, one = make("logits:KL")
    one.keep_outputs(TeacherCache(file, "one"), IMAGES)
    other = Distillation(TwoStages((5, 6)), student, IMAGES, [parse_term("logits:KL")])
    other.keep_outputs(TeacherCache(file, "other"), IMAGES)
    assert not torch.equal(*(objective.teacher_features(IMAGES)["logits"][0] for objective in (one, other)))
    with pytest.raises(UserError, match=r"cache'.*logits differ by.*another file"):
        other.keep_outputs(TeacherCache(file, "one"), IMAGES)
    file.write_bytes(b"something else" * 100)
    with pytest.raises(UserError, match=r"cache'.*not a database; name another file"):
        TeacherCache(file, "one")


def test_another_programs_database_is_refused_and_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE outputs (theirs)")
    before = (tmp_path / "other.db").read_bytes()
    with pytest.raises(UserError, match=r"other.db'.*another program's database; name another file"):
        TeacherCache(tmp_path / "other.db", "one")
    assert (tmp_path / "other.db").read_bytes() == before


@pytest.mark.parametrize("fault", ["no such table", "left on its disk"])
def test_a_cache_that_fails_ends_no_run(fault, tmp_path, monkeypatch, capsys):
    _, student, objective = make("logits:KL")
    objective.keep_outputs(TeacherCache(tmp_path / "cache", "one"), IMAGES)
    if fault == "no such table":
        objective.cache._database.execute("DROP TABLE outputs")
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 29))
    loss, _ = objective(student, IMAGES[:2], LABELS[:2])
    assert torch.equal(loss, objective(student, IMAGES[:2], LABELS[:2])[0])
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"cache': {fault}" in warning.replace("less than 1024 MiB are ", "") and "goes on without it" in warning
    assert objective.cache.counts == {"read": 0, "computed": 2}


def test_a_second_run_with_a_cache_is_the_same_and_runs_no_teacher(train, teacher, tmp_path, monkeypatch):
    flags = ["--arch_small", "resnet8", "--teacher", teacher, "--epochs", 2, "--kd", "logits:KL:0.5"]
    plain = train(*flags)
    first = train(*flags, "--teacher_cache", tmp_path / "cache", "--save_path", "first")
    monkeypatch.setattr(TeacherCache, "put", lambda *args: pytest.fail("an output is missing"))
    second = train(*flags, "--teacher_cache", tmp_path / "cache", "--save_path", "second")
    counts = tiny.results(second)["teacher"]["cache"]
    assert counts["computed"] == 0 < counts["read"]
    weights = [load(folder)["state_dict"] for folder in (plain, first, second)]
    assert all(torch.equal(value, w[name]) for w in weights[1:] for name, value in weights[0].items())


def with_statistics(net):
    """The network with running statistics that are not those of a new one."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize(
    "build",
    [lambda: CifarResNet(20), lambda: models.build("vgg11_bn"), lambda: models.build_torchvision("resnet18", 5)],
)
def test_a_teacher_without_batchnorm_has_the_same_outputs(build):
    net = with_statistics(build())
    prepared = prepare_teacher(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in prepared.modules())
    images = torch.randn(40, 3, 32, 32)
    with torch.no_grad():
        expected, found = (with_features(n)(images, return_features=True) for n in (net, prepared))
        for a, b in zip([expected[0], *expected[2]], [found[0], *found[2]], strict=True):
            assert (a - b).abs().max() < 1e-4 * max(1, a.abs().max())
        student = build()
        outputs = Distillation(net, student, images[:2], [parse_term("feature:MSE")]).teacher_features(images)
    torch.testing.assert_close(outputs["feature"][0], expected[1], rtol=1e-4, atol=1e-4)


def test_a_batchnorm_that_a_convolution_does_not_feed_alone_stays():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = self.conv(self.first(x))
            return (x + self.second(x)).mean((2, 3))

    net = with_statistics(Shared())
    prepared = prepare_teacher(net)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in prepared.modules()) == 2
    torch.testing.assert_close(prepared(IMAGES), net(IMAGES))


def test_the_teacher_is_frozen_and_making_an_objective_changes_neither_network():
    torch.manual_seed(0)
    teacher, student = CifarResNet(8), CifarResNet(8).train()
    images = torch.randn(4, 3, 32, 32)
    before, students = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    objective = Distillation(teacher, student, images, [parse_term("feature:MSE")])
    assert student.training and all(torch.equal(v, students[name]) for name, v in student.state_dict().items())
    own = copy.deepcopy(objective.teacher.state_dict())
    loss, _ = objective(student, images, LABELS)
    loss.backward()
    for net, state in ((teacher, before), (objective.teacher, own)):
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert not any(module.training for module in objective.teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_outputs_of_different_width_get_a_learned_linear_map():
    _, student, objective = make("feature:MSE", "stages:L1", "stages:AT", "logits:KL", student=(5, 7))
    kinds = {name: [type(adapter) for adapter in maps] for name, maps in objective.adapters.items()}
    assert kinds == {
        "feature:MSE": [nn.Linear],
        "stages:L1": [nn.Identity, nn.Conv2d],
        "stages:AT": [nn.Identity, nn.Identity],
        "logits:KL": [nn.Identity],
    }
    state = {name: tuple(value.shape) for name, value in objective.adapters.state_dict().items()}
    assert state["feature:MSE.0.weight"] == (6, 7) and state["stages:L1.1.weight"] == (6, 7, 1, 1) and len(state) == 4
    loss, _ = objective(student, IMAGES, LABELS)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.adapters.parameters())
    assert not any("adapter" in name for name in student.state_dict())


NO_FEATURES = nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten())


@pytest.mark.parametrize(
    ("teacher", "student", "term", "pattern"),
    [
        (TwoStages((5, 6), 10), TwoStages((5, 6), 9), "logits:KL", "9 classes.*10"),
        (TwoStages((5, 6), size=4), TwoStages((5, 6), size=2), "stages:MSE", r"\(6, 2, 2\).*\(6, 4, 4\)"),
        (TwoStages((5, 6)), NO_FEATURES, "feature:MSE", "unknown.*logits:KL"),
    ],
)
def test_networks_that_cannot_be_compared_are_refused(teacher, student, term, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        Distillation(teacher, student, IMAGES, [parse_term(term)])
    assert "\n" not in str(caught.value)


def test_any_network_can_be_compared_by_its_logits():
    loss, _ = Distillation(TwoStages((5, 6)), NO_FEATURES, IMAGES, [parse_term("logits:KL")])(
        NO_FEATURES, IMAGES, LABELS
    )
    assert loss.isfinite()


def test_features_of_torchvisions_networks_are_captured_and_compiled():
    net, images = models.build_torchvision("resnet18", 5).eval(), torch.randn(2, 3, 64, 64)
    wrapped = with_features(net)
    with torch.no_grad():
        expected = wrapped(images, return_features=True)
        assert torch.equal(expected[0], net(images)) and torch.equal(net.fc(expected[1]), expected[0])
        assert not wrapped.features and not wrapped.stages, "nothing is kept between two forward passes"
        torch._dynamo.reset()
        found = torch.compile(wrapped, backend="aot_eager", fullgraph=True)(images, return_features=True)
    assert [tuple(s.shape[1:]) for s in expected[2]] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    for a, b in zip([*expected[:2], *expected[2]], [*found[:2], *found[2]], strict=True):
        torch.testing.assert_close(a, b)


def load(folder, arch="resnet8"):
    return torch.load(folder / f"checkpoint.{arch}.pth.tar", weights_only=True)


def test_a_distilled_run_names_its_teacher_and_stays_deployable(train, teacher, capsys):
    folder = train("--arch_small", "resnet8", "--teacher", teacher, "--epochs", 1)
    results = tiny.results(folder)
    assert results["recipe"] == "prune_distill" and results["optimizer"] == "AHSG_HT"
    sha256 = hashlib.sha256(teacher.read_bytes()).hexdigest()
    facts = {"arch": "resnet8", "file": str(teacher), "accuracy": results["teacher"]["accuracy"], "sha256": sha256}
    assert results["teacher"] == facts and facts["accuracy"] >= 50
    printed = capsys.readouterr().out
    assert printed.index("**Teacher** Prec@1") < printed.index("==>>[")
    assert [f["kept"] for f in results["filters"]] == [11, 11, 11, 22, 22, 44, 44]
    saved = load(folder)
    assert saved["state_dict"].keys() == CifarResNet(8).state_dict().keys()
    assert len(saved["optimizer"]["state"]) == len(list(CifarResNet(8).parameters()))
    assert models.load(folder / "checkpoint.resnet8.pth.tar").num_classes == 10


def test_a_distilled_run_with_adapters_resumes_exactly(train, teacher, monkeypatch):
    class Wider(CifarResNet):
        """resnet8 whose features, seen from outside, are 96 wide, so that an adapter is needed."""

        def forward(self, x, return_features=False):
            if not return_features:
                return super().forward(x)
            logits, features, stages = super().forward(x, True)
            return logits, torch.cat([features, features[:, :32]], dim=1), stages

    monkeypatch.setitem(models.registry.REGISTRY, "wider", lambda num_classes=10: Wider(8, num_classes))
    # HTrate 1 is distillation without thresholding.
    flags = ["--arch_small", "wider", "--teacher", teacher, "--HTrate", 1]
    whole = train(*flags, "--epochs", 2, "--save_path", "whole")
    part = train(*flags, "--epochs", 1, "--save_path", "part")
    before = load(part, "wider")["adapters"]["feature:MSE.0.weight"]
    train(*flags, "--epochs", 2, "--resume", part / "checkpoint.wider.pth.tar")
    results = tiny.results(part)
    assert (results["recipe"], results["optimizer"]) == ("distill", "SGD")
    assert [f["kept"] for f in results["filters"]] == [16, 16, 16, 32, 32, 64, 64]
    a, b = load(whole, "wider"), load(part, "wider")
    assert a["adapters"]["feature:MSE.0.weight"].shape == before.shape == (64, 96)
    assert not torch.equal(a["adapters"]["feature:MSE.0.weight"], before), "it learns"
    assert torch.equal(a["adapters"]["feature:MSE.0.weight"], b["adapters"]["feature:MSE.0.weight"])
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    assert not any("feature:MSE" in name for name in a["state_dict"])


def test_teachers_that_cannot_teach_are_refused(train, teacher, tmp_path):
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
    with pytest.raises(UserError, match="is a resnet8, --arch is resnet20"):
        train("--arch_small", "resnet8", "--teacher", teacher, arch="resnet20")
    assert not (tmp_path / "runs").exists()
