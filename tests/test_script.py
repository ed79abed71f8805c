"""cifar10_resnet_test.py from its command line to the files that it leaves."""

import csv
import importlib
import itertools
import math
import os
import re
import shutil
import sys
from pathlib import Path

import conftest
import pytest
import torch
from tiny import load, results, settings_of

import cifar10_resnet_test as script
import data
import models
from utils.base.errors import UserError, run_main
from utils.train import setup, trainer
from utils.train.engine import evaluate
from utils.train.recipes import fit_schedule, learning_rate_at
from utils.train.report import unpack_hits

NAME = "checkpoint.resnet8.pth.tar"


PRUNE = dict(batch_size=64, k=128, HTrate=0.7, v=0.1, learning_rate=0.01, epochs=200)
PLAIN = dict(batch_size=128, k=None, HTrate=1, v=0, learning_rate=0.01, epochs=200)
STEPS = dict(momentum=0.9, decay=5e-4, schedule=[1, 60, 120, 160], gammas=[10, 0.2, 0.2, 0.2])
LONGER = dict(epochs=250, schedule=[1, 60, 120, 160, 200], gammas=[10, 0.2, 0.2, 0.2, 0.5])
RELEASED = (
    "./data/cifar.python --dataset cifar10 --arch resnet56 --arch_small resnet20 --save_path ./logs/x --epochs 250 "
    "--schedule 1 60 120 160 200 --gammas 10 0.2 0.2 0.2 0.5 --learning_rate 0.01 --momentum 0.9 --decay 0.0005 "
    "--batch_size 64 --k 128 --HTrate 0.7 --v 0.1 --loss MSE --print_freq 100 --ngpu 1 --workers 4 --manualSeed 3 "
    "--use_state_dict"
)
SETTINGS = {
    "--k 0.1": dict(PRUNE, **STEPS, k=0.1, data_path="./data", dataset="cifar10", arch="resnet20", recipe="prune"),
    "--recipe baseline": dict(PLAIN, **STEPS),
    "--recipe prune": PRUNE,
    "--recipe distill": PLAIN,
    "--recipe prune_distill": dict(PRUNE, **LONGER),
    "--recipe finetune --resume x": dict(PRUNE, learning_rate=0.001),
    RELEASED: dict(PRUNE, **LONGER, arch="resnet56", student="resnet20", recipe="prune_distill", manualSeed=3),
    "--arch resnet56 --arch_small resnet20 --HTrate 1": dict(recipe="distill", k=None, v=0),
    "--prune_rate 0.3": dict(HTrate=0.7, prune_rate=0.3),
    "--prune_rate 0.9": dict(HTrate=0.1, prune_rate=0.9),
    "--prune_rate 0": dict(HTrate=1.0, prune_rate=0.0),
    "--batch-size 32 --learning-rate=0.5": dict(batch_size=32, learning_rate=0.5),
    "--epochs 10 --fit_schedule": dict(schedule=[1, 3, 6, 8]),
    "--tf32": dict(tf32=True, amp=False),
    "--no_amp": dict(tf32=False, amp=False),
    "--teacher x --loss KL": dict(kd=["logits:KL:1"]),
    "--teacher x --loss L1": dict(kd=["feature:L1:1"]),
}


@pytest.mark.parametrize("line", SETTINGS, ids=lambda line: line[:30])
def test_settings_are_those_of_the_release(line):
    args = vars(settings_of(script, line.split()))
    assert {name: args[name] for name in SETTINGS[line]} == SETTINGS[line]


def test_learning_rate_rises_and_falls_along_a_cosine(train, monkeypatch):
    """Within epochs, too."""
    settings = vars(settings_of(script, ["--recipe", "prune_gradual", "--epochs", "11"]))
    rates = [learning_rate_at(e, settings) for e in (0, 0.5, 1, 6, 8.5, 11)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.05, 0.05 * (1 - math.sqrt(0.5)), 0])
    rates, step = [], trainer.train_step
    monkeypatch.setattr(
        trainer, "train_step", lambda *a, **o: (rates.append(a[4].param_groups[0]["lr"]), step(*a, **o))[1]
    )
    train("--recipe", "baseline", "--lr_schedule", "cosine", "--warmup", 1, "--lr", 0.1, "--epochs", 2)
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, *(0.05 * (1 + math.cos(math.pi * t / 4)) for t in range(4))])


def test_learning_rate_steps_at_the_milestones():
    settings = vars(settings_of(script, []))
    rates = [learning_rate_at(e, settings) for e in (0, 1, 59, 60.5, 120, 199)]
    assert rates == pytest.approx([0.01, 0.1, 0.1, 0.02, 0.004, 0.0008])
    assert fit_schedule([1, 60, 120, 160], 2, 200) == [1, 2, 3, 4], "all but the warm-up are scaled, and stay apart"


EPOCH = (
    r"==>>\[\d{4}-\d\d-\d\d-\d\d:\d\d:\d\d\] \[Epoch=001/002\] \[Need: 00:\d\d:\d\d\] "
    r"\[learning_rate=0\.1000\] \[Best : Accuracy=\d+\.\d\d, Error=\d+\.\d\d\]"
)
LINES = {
    EPOCH: 1,
    r"^  \*\*Train\*\* Prec@1 \d+\.\d{3} Prec@5 \d+\.\d{3} Error@1 \d+\.\d{3}$": 2,
    r"^  \*\*Test\*\* Prec@1 \d+\.\d{3} Prec@5": 2,
    r"^  Epoch: \[000\]\[002/003\]   Batch 24   Time \d+\.\d   Loss \d+\.\d{4}   Prec@1 \d+\.\d{3}   Prec@5 ": 1,
    r"^  \*\*Filters\*\* zero: 5 of 16 \(3 convolutions\), 10 of 32 \(2 ": 2,
    "HTrate=0.7 of the filters, that is prune_rate=0.3": 1,
    r"stage_2\.0\.conv_a\.weight +32x16x3x3 +22 +10": 1,
    r"schedule: 3 mini-batches in the first epoch: 16, 20, 24 \(60 images\)": 1,
    "arithmetic: float32, eager, channels_last": 1,
}


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, before the tests hide it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def test_tests_do_not_see_a_gpu(gpu, request):
    conftest.pytest_runtest_setup(request.node)
    assert not torch.cuda.is_available() and os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("name", ["cifar10_resnet_test", "imagenet_resnet_test"])
def test_one_process_of_a_machine_reads_the_data_first(name, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "first_on_machine", lambda make: 1 / 0)
    monkeypatch.setattr(module.data, "load", lambda *a, **o: pytest.fail("read before"))
    monkeypatch.setattr(module.data, "load_imagenet", lambda *a, **o: pytest.fail("read before"))
    with pytest.raises(ZeroDivisionError):
        module.main(["DATA"])


def test_a_pruned_run_leaves_everything_behind(train, tree, capsys):
    folder = train("--epochs", 2, "--save_path", "out", "--manualSeed", 5)
    assert folder == Path("out")
    checkpoints = {f"{kind}.resnet8.pth.tar" for kind in ("checkpoint", "previous", "best", "small")}
    files = {"log_seed_5.txt", "metrics.csv", "curves.png", "results.json", ".lock"}
    assert set(os.listdir("out")) == checkpoints | files
    for text in (Path("out/log_seed_5.txt").read_text(), capsys.readouterr().out):
        assert {pattern: len(re.findall(pattern, text, re.M)) for pattern in LINES} == LINES
    header = "epoch,lr,train_loss,train_acc,test_loss,test_acc,images_per_s,seconds"
    assert Path("out/metrics.csv").read_text().startswith(header)
    rows = list(csv.DictReader(Path("out/metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    found = results(folder)
    assert found["last_epoch_accuracy"] == pytest.approx(float(rows[-1]["test_acc"]))
    assert found["best_epoch_accuracy"] == pytest.approx(max(float(row["test_acc"]) for row in rows))
    assert (
        found["finished"] and found["seed"] == 5 and found["settings"]["HTrate"] == 0.7 and found["versions"]["torch"]
    )
    assert [f["kept"] for f in found["filters"]] == [11, 11, 11, 22, 22, 44, 44]
    assert Path("out/curves.png").read_bytes().startswith(b"\x89PNG")
    small, images = models.load("out/small.resnet8.pth.tar"), data.load("cifar10", tree, seed=0).test
    right = small(images.normalise(images.images)).argmax(1) == images.labels
    name, hits = unpack_hits(found["test_hits"], len(right))
    assert hits.tolist() == right.tolist() and name == images.fingerprint()
    images.labels = images.labels.flip(0)
    assert name != images.fingerprint()
    saved = load("out/checkpoint.resnet8.pth.tar")
    assert {"epoch", "arch", "state_dict", "best_prec1", "optimizer"} <= set(saved)
    assert (saved["epoch"], saved["arch"]) == (2, "resnet8")
    weights = [w for w in saved["state_dict"].values() if w.dim() == 4]
    assert [sum(bool(filter.any()) for filter in w) for w in weights] == [11, 11, 11, 22, 22, 44, 44]


@pytest.mark.parametrize(
    ("flags", "optimizer", "kept"),
    [
        (["--threshold_every", "epoch"], "AHSG_HT", [11, 11, 11, 22, 22, 44, 44]),
        (["--recipe", "baseline"], "SGD", [16, 16, 16, 32, 32, 64, 64]),
    ],
)
def test_thresholding_once_per_epoch_and_not_at_all(train, flags, optimizer, kept):
    found = results(train("--epochs", 1, *flags))
    assert found["optimizer"] == optimizer and [f["kept"] for f in found["filters"]] == kept


def test_evaluate_prints_the_accuracy_and_writes_nothing(train, tree, capsys, tmp_path, monkeypatch):
    """--recalibrate: plain means over the same mini-batches of their mean and unbiased variance at the first
    BatchNorm.
    """
    folder = train("--epochs", 1, "--save_path", "out")
    before = sorted(tmp_path.rglob("*"))
    assert train("--evaluate", "--resume", folder / NAME, "--batch_size", 1000) is None
    assert f"**Test** Prec@1 {results(folder)['last_epoch_accuracy']:.3f}" in capsys.readouterr().out
    tested = []
    monkeypatch.setattr(setup, "evaluate", lambda net, *rest: (tested.append(net), evaluate(net, *rest))[1])
    train("--evaluate", "--resume", folder / NAME, "--batch_size", 10, "--k", "none", "--recalibrate", 2)
    assert "recomputed over 20 training images in 2 mini-batches" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    net, first = tested[0], tested[0].bn_1
    images = data.load("cifar10", str(tree), seed=1)
    loader = data.DataLoader(images.train, 10, shuffle=True, seed=1)
    with torch.no_grad():
        seen = [net.conv_1_3x3(images.train.normalise(batch)) for batch, _ in itertools.islice(loader, 2)]
    torch.testing.assert_close(first.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert first.momentum == 0.1
    for name, value in load(folder / NAME)["state_dict"].items():
        assert torch.equal(value, net.state_dict()[name]) or "running" in name or "batches" in name


def test_images_of_your_own(train, tree, tmp_path):
    for part in ("train/class0", "train/class1", "train/class2", "test/class0", "test/class1", "test/class2"):
        shutil.copytree(tree / part, tmp_path / "own" / part)
    own = ["--dataset", "folder", "--batch_size", 6, "--k", 8, "--epochs", 1]
    folder = train(*own, data=tmp_path / "own")
    assert load(folder / NAME)["state_dict"]["classifier.weight"].shape == (3, 64)
    with pytest.raises(UserError, match="3 classes, the data has 10"):
        train("--resume", folder / NAME, "--dataset", "cifar10")
    large = train(*own, "--image_size", 40, data=tmp_path / "own")
    assert load(large / NAME)["input_shape"] == [3, 40, 40]
    # What a network costs is that of the size that it is trained on.
    first = results(folder)["network"]
    again = results(train("--resume", folder / NAME, "--image_size", 40, "--epochs", 2, data=tmp_path / "own"))
    assert again["network"] == results(large)["network"] != first
    with pytest.raises(UserError, match=r"vgg11 does not take images of 64x64 .*or another --image_size"):
        train(*own, "--image_size", 64, data=tmp_path / "own", arch="vgg11")


# Values that no option takes are tried in test_options_fuzz.py.
BAD = {
    "--arch resnet21": "resnet21.*choose from",
    "--schedule 1 2 --gammas 10": "2 epochs.*1 factors",
    "--schedule 3 2 --gammas 1 1": "ascend.*3 2",
    "--k 15": "None.*step size.*cap.*15",
    "--k 0": "None.*step size.*cap",
    "--HTrate 0": r"KEPT.*\(0, 1\].*0",
    "--HTrate 0.05": "keeps nothing.*0.0625",
    "--prune_rate 0.3 --HTrate 0.7": "exclude each other",
    "--batch_size 61 --k none": "61.*60 training images",
    "--evaluate": "--resume",
    "--recalibrate 5": "--recalibrate 5.*--evaluate",
    "--recipe finetune": "--resume",
    "--recipe finetune --resume auto": "finds no such run",
    "--recipe baseline --HTrate 0.5": "baseline keeps every filter",
    "--recipe baseline --v 0.5": "plain SGD",
    "--recipe baseline --teacher x": "use --recipe distill",
    "--recipe prune --teacher x": "prune_distill",
    "--recipe distill --teacher x": "no checkpoint at 'x'",
    "--recipe distill": r"trained teacher.*--teacher FILE.*cifar10_resnet_test\.py .* --recipe baseline",
    "--ce_weight 0.5": "needs a teacher",
    "--kd stages:MSE": "needs a teacher",
    "--kd feature:KL --teacher x": "KL compares logits",
    "--kd logits:KL --kd logits:KL:2 --teacher x": "given 2 times",
    "--macs_cut 0.5": "--macs_cut is for --recipe prune_gradual",
    "--recipe prune_gradual --macs_cut 0.5 --HTrate 0.7": "exclude each other",
    "--recipe prune_gradual --prune_begin 0.7": "is after",
    "--heavy_ball released --threshold_every epoch": "every step",
    "--growth exponential": "exponential",
    "--widths_of x.pth.tar": "add --recipe baseline",
    "--recipe baseline --widths_of x.pth.tar --head_width 20": "head_width 20",
    "--ngpu 2": "--ngpu 2",
    "--resume nowhere.pth.tar": "nowhere.pth.tar",
    "--resume=": "must be a path",
    "--save_path used/results.json/x": "cannot write.*choose another",
    "--save_path used": "holds a run already",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_give_one_clear_line_and_write_nothing(flags, train, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/results.json").touch()
    with pytest.raises(UserError, match=BAD[flags]) as caught:
        train(*flags.split())
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "results.json"]


def test_bad_data_gives_one_clear_line(train, tree, tmp_path):
    for name in ("empty", "corrupt", "fewer"):
        shutil.copytree(tree, tmp_path / name)
    shutil.rmtree(tmp_path / "empty/train/class3")
    (tmp_path / "empty/train/class3").mkdir()
    (tmp_path / "corrupt/train/class4/004.png").write_bytes(b"\x89PNG not really")
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "fewer" / split / "class9")
    cases = {"empty": "class3.*no images", "corrupt": r"class4/004\.png", "fewer": "9 class folders.*--dataset folder"}
    for name, pattern in {**cases, "no/such/path": "no/such/path' is no folder"}.items():
        with pytest.raises(UserError, match=pattern):
            train("--epochs", 1, data=tmp_path / name)
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint_intact(train):
    file = train("--epochs", 1) / NAME
    before = file.read_bytes()
    where = r"loss of mini-batch \d .*not finite by mini-batch \d of epoch 1; learning rate 1e\+19.*1 of 2"
    with pytest.raises(UserError, match=where):
        train("--epochs", 2, "--learning_rate", 1e18, "--resume", file)
    assert file.read_bytes() == before


def test_removed_filters_leave_no_denormal_numbers_behind(train):
    """Momentum and running means of removed filters shrink by 0.9 a step; below 1e-38 a CPU would crawl."""
    saved = load(train("--epochs", 1, "--batch_size", 1, "--k", "none", "--momentum", 0.1) / NAME)
    momentum = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
    tensors = momentum + [v for name, v in saved["state_dict"].items() if "running" in name]
    smallest_normal = torch.finfo(torch.float32).tiny
    assert not any(((t != 0) & (t.abs() < smallest_normal)).any() for t in tensors)
    assert sum((t == 0).sum() for t in momentum) > 1000


def test_a_run_without_standard_output_ends_well(train, monkeypatch):
    """As some services start it."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    run_main(lambda: train("--epochs", 1, "--batch_size", 30, "--k", "none", "--save_path", "run"))
    assert results(Path("run"))["finished"]
