"""The training benchmark trains what it is told to, and reports what it measured."""

import argparse
import copy
import json

import pytest
import torch

from AHSG_HT import AHSG_HT
from models.resnet_cifar import CifarResNet
from utils.base.errors import UserError
from utils.bench import latency, shrinking, training
from utils.bench.optimizer import HT_RECIPE
from utils.bench.original_loop import PerFilterLoop, train_epoch_original
from utils.train.engine import RunningMeans, cross_entropy, train_step

CPU = torch.device("cpu")


def test_both_loops_take_the_same_steps():
    """In double precision: losses, accuracies, weights, BatchNorm statistics and removed filters after four steps."""
    generator = torch.Generator().manual_seed(0)
    shape = dict(generator=generator, dtype=torch.float64)
    sizes = [8, 12, 16, 3]
    batches = [(torch.randn(n, 3, 16, 16, **shape), torch.randint(0, 10, (n,), generator=generator)) for n in sizes]
    torch.manual_seed(0)
    ours = CifarResNet(8).double()
    theirs = copy.deepcopy(ours)
    ours.to(memory_format=torch.channels_last).train()
    recipe = HT_RECIPE | {"lr": 0.05}
    fast, means = AHSG_HT(ours.parameters(), **recipe), RunningMeans(CPU)
    for t, (x, y) in enumerate(batches):
        train_step(cross_entropy, ours, x, y, fast, means, device=CPU, size=sizes[t])
    loop = PerFilterLoop(list(theirs.parameters()), **recipe)
    expected = train_epoch_original(theirs, batches, cross_entropy, loop, CPU)
    found = means.read()
    assert (found.loss, found.top1, found.top5) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-6, atol=1e-9)
    assert sum(not f.any() for f in theirs.stage_1[0].conv_a.weight) == 5


def test_every_loop_and_loss_trains_the_images_asked_for(tree):
    args = argparse.Namespace(dataset="folder", data_path=str(tree), images=24, batch_size=16, device=CPU, workers=0)
    images = training.load_images(args)
    assert len(images) == 24
    teacher = CifarResNet(14, num_classes=args.classes).eval()
    for loop, term in [
        ("original", "none"),
        ("plain", "none"),
        ("amp", "none"),
        ("plain", "logits:KL"),
        ("plain", "stages:AT"),
    ]:
        train = training.make_loop(loop, term, "resnet8", teacher, images, args)
        losses = [train() for _ in range(4)]
        assert losses[-1] < losses[0], (loop, term)
    args.images = 61
    with pytest.raises(UserError, match="--images 61: the data set has 60"):
        training.load_images(args)


def test_the_table_has_a_row_for_every_loop_and_the_teachers_share(tree, tmp_path, capsys):
    flags = [str(tree), "--dataset", "folder", "--arch", "resnet8", "--teacher", "resnet20", "--loops", "plain", "amp"]
    flags += ["--images", "32", "--batch_size", "16", "--repeats", "2", "--device", "cpu"]
    training.main([*flags, "--save_path", str(tmp_path)])
    rows = json.loads((tmp_path / "training_cpu_resnet8_from_resnet20.json").read_text())["timings"]
    assert [(row["loop"], row["loss"]) for row in rows] == [
        ("plain", "none"), ("plain", "logits:KL"), ("amp", "none"), ("amp", "logits:KL"), (training.FORWARD, "none"),
    ]  # fmt: skip
    assert all(0 < row["slowest"] <= row["images/s"] <= row["fastest"] for row in rows)
    added = 1 / rows[1]["times the first"] - 1
    assert rows[1]["teacher's share"] == pytest.approx(added * rows[4]["times the first"])
    assert "| resnet8 | resnet20 | amp | logits:KL | " in capsys.readouterr().out


def test_a_cut_run_is_timed_beside_the_masked_one(tmp_path):
    flags = ["--arch", "resnet8", "--images", "16", "--batch_size", "8", "--repeats", "5", "--device", "cpu"]
    shrinking.main([*flags, "--save_path", str(tmp_path)])
    masked, cut = json.loads((tmp_path / "shrinking_cpu.json").read_text())["timings"]
    assert (masked["run"], cut["run"], masked["of the masked run's"]) == ("masked", "cut", 1)
    assert cut["of the masked run's"] == cut["whole run (s)"] / masked["whole run (s)"]
    assert cut["after / before"] == cut["after"] / cut["images/s before"]


@pytest.mark.parametrize(
    "main, flags, message",
    [
        (training.main, ["--arch", "resnet21"], "resnet21"),
        (shrinking.main, ["--repeats", "4"], "of which 5 are needed"),
        (latency.main, [], "name a checkpoint, or a network with --arch"),
        (latency.main, ["--arch", "lenet"], "unknown network 'lenet'"),
        (latency.main, ["--arch", "resnet8", "--HTrate", "0.001"], r"--HTrate 0\.001"),
        (latency.main, ["--arch", "resnet8", "--device", "cuda"], "no CUDA GPU"),
    ],
)
def test_bad_flags_are_one_line(main, flags, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        main(flags)
