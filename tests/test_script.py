"""cifar10_resnet_test.py from its command line to the files that it leaves."""

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cifar10_resnet_test as script
import data
from utils.base.errors import UserError
from utils.small.filters import kept_filters
from utils.train import setup
from utils.train.engine import evaluate
from utils.train.recipes import fit_schedule, learning_rate_at
from utils.train.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
RESNET8_FILTERS = [16, 16, 16, 32, 32, 64, 64]


def load(path):
    return torch.load(path, weights_only=True)


def test_k_alone_gives_the_prune_recipe():
    args = script.parse_args(["--k", "0.1"])
    got = (
        args.data_path,
        args.dataset,
        args.arch,
        args.HTrate,
        args.v,
        args.k,
        args.batch_size,
        args.epochs,
        args.learning_rate,
    )
    assert got == ("./data", "cifar10", "resnet20", 0.7, 0.1, 0.1, 64, 200, 0.01)
    assert (args.momentum, args.decay, args.schedule, args.gammas) == (
        0.9,
        5e-4,
        [1, 60, 120, 160],
        [10, 0.2, 0.2, 0.2],
    )


@pytest.mark.parametrize(
    ("recipe", "flags", "expected"),
    [
        ("baseline", [], dict(batch_size=128, k=None, HTrate=1, v=0, learning_rate=0.01, epochs=200)),
        ("prune", [], dict(batch_size=64, k=128, HTrate=0.7, v=0.1, learning_rate=0.01, epochs=200)),
        ("distill", [], dict(batch_size=128, k=None, HTrate=1, v=0, epochs=200)),
        (
            "prune_distill",
            [],
            dict(
                batch_size=64,
                k=128,
                HTrate=0.7,
                v=0.1,
                epochs=250,
                schedule=[1, 60, 120, 160, 200],
                gammas=[10, 0.2, 0.2, 0.2, 0.5],
            ),
        ),
        ("finetune", ["--resume", "x"], dict(batch_size=64, k=128, HTrate=0.7, v=0.1, learning_rate=0.001)),
    ],
)
def test_recipes_have_the_numbers_of_the_release(recipe, flags, expected):
    args = vars(script.parse_args(["--recipe", recipe, *flags]))
    assert {name: args[name] for name in expected} == expected


def test_released_command_line_is_understood():
    line = (
        "./data/cifar.python --dataset cifar10 --arch resnet56 --arch_small resnet20 --save_path ./logs/x --epochs 250 "
        "--schedule 1 60 120 160 200 --gammas 10 0.2 0.2 0.2 0.5 --learning_rate 0.01 --momentum 0.9 --decay 0.0005 --batch_size 64 --k 128 "
        "--HTrate 0.7 --v 0.1 --loss MSE --print_freq 100 --ngpu 1 --workers 4 --manualSeed 3 --use_state_dict"
    )
    args = script.parse_args(line.split())
    assert (args.arch, args.student, args.recipe, args.k, args.manualSeed) == (
        "resnet56",
        "resnet20",
        "prune_distill",
        128,
        3,
    )


def test_htrate_one_with_a_student_is_pure_distillation():
    args = script.parse_args(["--arch", "resnet56", "--arch_small", "resnet20", "--HTrate", "1"])
    assert (args.recipe, args.k, args.v) == ("distill", None, 0)


@pytest.mark.parametrize(("rate", "kept"), [("0.3", 0.7), ("0.9", 0.1), ("0", 1.0)])
def test_prune_rate_is_one_minus_htrate(rate, kept):
    args = script.parse_args(["--prune_rate", rate])
    assert (args.HTrate, args.prune_rate) == (kept, float(rate))


def test_hyphens_and_underscores_are_the_same():
    assert script.parse_args(["--batch-size", "32", "--learning-rate=0.5"]).batch_size == 32


def test_learning_rate_steps_at_the_milestones():
    settings = vars(script.parse_args([]))
    rates = [learning_rate_at(e, settings) for e in (0, 1, 59, 60.5, 120, 199)]
    assert rates == pytest.approx([0.01, 0.1, 0.1, 0.02, 0.004, 0.0008])


def test_fitted_schedule_scales_all_but_the_warm_up():
    assert fit_schedule([1, 60, 120, 160], 10, 200) == [1, 3, 6, 8]


def test_a_pruned_run_leaves_everything_behind(train, tmp_path, capsys):
    folder = train("--epochs", 2, "--save_path", "out", "--manualSeed", 5)
    assert folder == Path("out")
    assert sorted(os.listdir("out")) == sorted(
        [
            "log_seed_5.txt",
            "metrics.csv",
            "curves.png",
            "results.json",
            "checkpoint.resnet8.pth.tar",
            "previous.resnet8.pth.tar",
            "best.resnet8.pth.tar",
            "small.resnet8.pth.tar",
        ]
    )
    log = Path("out/log_seed_5.txt").read_text()
    printed = capsys.readouterr().out
    for text in (log, printed):
        assert re.search(
            r"==>>\[\d{4}-\d\d-\d\d-\d\d:\d\d:\d\d\] \[Epoch=001/002\] \[Need: 00:\d\d:\d\d\] "
            r"\[learning_rate=0\.1000\] \[Best : Accuracy=\d+\.\d\d, Error=\d+\.\d\d\]",
            text,
        )
        assert (
            len(re.findall(r"^  \*\*Train\*\* Prec@1 \d+\.\d{3} Prec@5 \d+\.\d{3} Error@1 \d+\.\d{3}$", text, re.M))
            == 2
        )
        assert len(re.findall(r"^  \*\*Test\*\* Prec@1", text, re.M)) == 2
        assert "HTrate=0.7" in text and "prune_rate=0.3" in text
        assert re.search(r"stage_2\.0\.conv_a\.weight +32x16x3x3 +22 +10", text)
        assert "schedule: 3 mini-batches in the first epoch: 16, 20, 24 (60 images)" in text
    rows = list(csv.DictReader(Path("out/metrics.csv").read_text().splitlines()))
    assert list(rows[0]) == [
        "epoch",
        "lr",
        "train_loss",
        "train_acc",
        "test_loss",
        "test_acc",
        "images_per_s",
        "seconds",
    ]
    assert [row["epoch"] for row in rows] == ["0", "1"]
    results = json.loads(Path("out/results.json").read_text())
    assert results["last_epoch_accuracy"] == pytest.approx(float(rows[-1]["test_acc"]))
    assert results["best_epoch_accuracy"] == pytest.approx(max(float(row["test_acc"]) for row in rows))
    assert (
        results["finished"]
        and results["seed"] == 5
        and results["settings"]["HTrate"] == 0.7
        and results["versions"]["torch"]
    )
    assert [f["kept"] for f in results["filters"]] == [11, 11, 11, 22, 22, 44, 44]
    assert Path("out/curves.png").read_bytes().startswith(b"\x89PNG")
    saved = load("out/checkpoint.resnet8.pth.tar")
    assert {"epoch", "arch", "state_dict", "best_prec1", "optimizer"} <= set(saved)
    assert (saved["epoch"], saved["arch"]) == (2, "resnet8")


def test_after_every_epoch_exactly_the_planned_filters_are_zero(train, monkeypatch):
    seen = []
    real = Trainer.checkpoint

    def watch(training):
        seen.append([len(kept) for kept in kept_filters(training.net).values()])
        return real(training)

    monkeypatch.setattr(Trainer, "checkpoint", watch)
    train("--epochs", 3)
    assert seen == [[11, 11, 11, 22, 22, 44, 44]] * 3


def test_thresholding_once_per_epoch_ends_in_the_same_counts(train):
    folder = train("--epochs", 1, "--threshold_every", "epoch")
    results = json.loads((folder / "results.json").read_text())
    assert [f["kept"] for f in results["filters"]] == [11, 11, 11, 22, 22, 44, 44]


def test_baseline_is_plain_sgd_and_keeps_all(train):
    folder = train("--recipe", "baseline", "--epochs", 1)
    results = json.loads((folder / "results.json").read_text())
    assert results["optimizer"] == "SGD"
    assert [f["kept"] for f in results["filters"]] == RESNET8_FILTERS


def assert_same(a, b, where=""):
    """Equality to the last bit of nested checkpoints, times aside."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("images_per_s", "seconds", "settings", "pieces"):
                assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


@pytest.mark.parametrize(
    ("arch", "flags"),
    [
        ("resnet8", []),
        ("resnet8", ["--k", "0.2", "--no_restart", "--max_batch_size", "30"]),
        ("resnet8", ["--heavy_ball", "released", "--workers", "2"]),
        ("resnet8", ["--recipe", "baseline"]),
        ("resnet8_dropout", []),
    ],
    ids=["cap", "step size over epochs", "released, workers", "baseline", "dropout"],
)
def test_four_epochs_equal_two_and_two_resumed(train, arch, flags):
    whole = train("--epochs", 4, "--save_path", "whole", *flags, arch=arch)
    part = train("--epochs", 2, "--save_path", "part", *flags, arch=arch)
    name = f"checkpoint.{arch}.pth.tar"
    again = train("--epochs", 4, "--resume", part / name, *flags, arch=arch)
    assert again == part
    assert_same(load(whole / name), load(part / name))
    assert len((part / "metrics.csv").read_text().splitlines()) == 5


def test_a_resumed_run_says_which_settings_changed(train, capsys):
    folder = train("--epochs", 1)
    train("--epochs", 2, "--HTrate", 0.5, "--resume", folder / "checkpoint.resnet8.pth.tar")
    assert "HTrate 0.7 -> 0.5" in capsys.readouterr().out


def test_resume_of_a_finished_run_does_nothing(train, capsys):
    folder = train("--epochs", 1)
    before = (folder / "checkpoint.resnet8.pth.tar").read_bytes()
    train("--epochs", 1, "--resume", folder / "checkpoint.resnet8.pth.tar")
    assert "nothing left to do" in capsys.readouterr().out
    assert (folder / "checkpoint.resnet8.pth.tar").read_bytes() == before


def test_resume_auto_continues_the_same_run_and_no_other(train):
    schedule = ("--schedule", 1, "--gammas", 10)
    first = train("--epochs", 1, "--resume", "auto", *schedule)
    assert train("--epochs", 2, "--resume", "auto", *schedule) == first
    other = train("--epochs", 1, "--resume", "auto", "--schedule", 2, "--gammas", 10)
    assert other != first
    assert load(first / "checkpoint.resnet8.pth.tar")["epoch"] == 2


def test_runs_without_save_path_get_folders_of_their_own(train):
    assert [train("--epochs", 1).name for _ in range(2)] == [
        "prune-cifar10-resnet8-HT0.7-seed1",
        "prune-cifar10-resnet8-HT0.7-seed1-2",
    ]


def test_finetune_takes_weights_and_momentum_but_not_epochs(train):
    pruned = train("--epochs", 1) / "checkpoint.resnet8.pth.tar"
    tuned = train("--recipe", "finetune", "--epochs", 1, "--resume", pruned, "--batch_size", 16, "--k", 24)
    results = json.loads((tuned / "results.json").read_text())
    assert results["epochs_done"] == 1 and results["settings"]["learning_rate"] == 0.001 and tuned != pruned.parent
    change = (
        load(tuned / "checkpoint.resnet8.pth.tar")["state_dict"]["classifier.weight"]
        - load(pruned)["state_dict"]["classifier.weight"]
    )
    assert 0 < change.abs().max() < 0.1


def test_evaluate_prints_the_accuracy_and_writes_nothing(train, capsys, tmp_path):
    folder = train("--epochs", 1, "--save_path", "out")
    accuracy = json.loads((folder / "results.json").read_text())["last_epoch_accuracy"]
    before = sorted(tmp_path.rglob("*"))
    assert train("--evaluate", "--resume", folder / "checkpoint.resnet8.pth.tar") is None
    assert f"**Test** Prec@1 {accuracy:.3f}" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_recalibrating_takes_the_statistics_of_the_training_images(train, tree, capsys, monkeypatch):
    """Against a loop over the same mini-batches: plain means of each one's mean and unbiased variance at the first BatchNorm."""
    folder = train("--epochs", 1, "--save_path", "out")
    file = folder / "checkpoint.resnet8.pth.tar"
    tested = {}

    def keep_network(net, *rest):
        tested["net"] = net
        return evaluate(net, *rest)

    monkeypatch.setattr(setup, "evaluate", keep_network)
    flags = ["--evaluate", "--resume", file, "--batch_size", 10, "--k", "none"]
    train(*flags, "--recalibrate", 2)
    assert "taken anew over 20 training images in 2 mini-batches" in capsys.readouterr().out
    net, first = tested["net"], tested["net"].bn_1
    images = data.load("cifar10", str(tree), seed=1)
    loader = data.DataLoader(images.train, 10, shuffle=True, seed=1)
    with torch.no_grad():
        seen = [net.conv_1_3x3(images.train.normalise(batch)) for batch, _ in itertools.islice(loader, 2)]
    torch.testing.assert_close(first.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert first.momentum == 0.1
    for name, value in load(file)["state_dict"].items():
        assert torch.equal(value, net.state_dict()[name]) or "running" in name or "batches" in name
    train(*flags)
    assert "anew" not in capsys.readouterr().out


def three_classes(tree, tmp_path):
    own = tmp_path / "own"
    for split in ("train", "test"):
        for c in ("class0", "class1", "class2"):
            shutil.copytree(tree / split / c, own / split / c)
    return own


def test_images_of_your_own(train, tree, tmp_path):
    folder = train(
        "--dataset", "folder", "--epochs", 1, "--batch_size", 6, "--k", 8, data=three_classes(tree, tmp_path)
    )
    assert load(folder / "checkpoint.resnet8.pth.tar")["state_dict"]["classifier.weight"].shape == (3, 64)


@pytest.fixture
def pruned(train):
    return train("--epochs", 1, "--save_path", "earlier") / "checkpoint.resnet8.pth.tar"


BAD = {
    "arch": (["--arch", "resnet21"], "resnet21.*choose from"),
    "dataset": (["--dataset", "cifar11"], "cifar11"),
    "lengths": (["--schedule", "1", "2", "--gammas", "10"], "2 epochs.*1 factors"),
    "descending": (["--schedule", "3", "2", "--gammas", "1", "1"], "ascend.*3 2"),
    "k between": (["--k", "15"], "None.*step size.*cap.*15"),
    "k zero": (["--k", "0"], "None.*step size.*cap"),
    "k word": (["--k", "many"], "many"),
    "HTrate 0": (["--HTrate", "0"], r"KEPT.*\(0, 1\].*0"),
    "HTrate 1.2": (["--HTrate", "1.2"], r"KEPT.*\(0, 1\].*1\.2"),
    "HTrate that keeps nothing": (["--HTrate", "0.05"], "keeps nothing.*0.0625"),
    "prune_rate 1": (["--prune_rate", "1"], "REMOVED"),
    "both rates": (["--prune_rate", "0.3", "--HTrate", "0.7"], "exclude each other"),
    "batch": (["--batch_size", "61", "--k", "none"], "61.*60 training images"),
    "lr": (["--learning_rate", "-1"], "> 0.*-1"),
    "nan": (["--v", "nan"], "nan"),
    "epochs": (["--epochs", "0"], ">= 1"),
    "unknown flag": (["--HTrat", "0.7"], "HTrat"),
    "evaluate alone": (["--evaluate"], "--resume"),
    "recalibrate in training": (["--recalibrate", "5"], "--recalibrate 5.*--evaluate"),
    "finetune alone": (["--recipe", "finetune"], "--resume"),
    "pruned baseline": (["--recipe", "baseline", "--HTrate", "0.5"], "baseline keeps every filter"),
    "no such checkpoint": (["--resume", "nowhere.pth.tar"], "nowhere.pth.tar"),
    "save path below a file": (["--save_path", "earlier/results.json/x"], "cannot write.*choose another"),
    "save path in use": (["--save_path", "earlier"], "holds a run already"),
    "exponential cap": (["--growth", "exponential"], "exponential"),
    "widths pruned again": (["--widths_of", "x.pth.tar"], "add --recipe baseline"),
    "widths and a head": (["--recipe", "baseline", "--widths_of", "x.pth.tar", "--head_width", "20"], "head_width 20"),
    "gpus": (["--ngpu", "2"], "--ngpu 2"),
    "loss between logits": (["--kd", "feature:KL", "--teacher", "x"], "KL compares logits"),
    "two losses of one name": (["--kd", "logits:KL", "--kd", "logits:KL:2", "--teacher", "x"], "given 2 times"),
    "weight": (["--kd", "logits:KL:-1", "--teacher", "x"], "must be >= 0"),
    "no teacher file": (["--recipe", "distill", "--teacher", "x"], "no checkpoint at 'x'"),
}


def snapshot(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_give_one_clear_line_and_lose_nothing(case, train, pruned, tmp_path):
    flags, pattern = BAD[case]
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=pattern) as caught:
        train(*flags)
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == before


def damaged_trees(tree, tmp_path):
    empty, corrupt, fewer = (tmp_path / name for name in ("empty", "corrupt", "fewer"))
    for copy in (empty, corrupt, fewer):
        shutil.copytree(tree, copy)
    for file in (empty / "train" / "class3").iterdir():
        file.unlink()
    (corrupt / "train" / "class4" / "004.png").write_bytes(b"\x89PNG not really")
    shutil.rmtree(fewer / "train" / "class9")
    shutil.rmtree(fewer / "test" / "class9")
    return {"empty": "class3.*no images", "corrupt": r"class4/004\.png", "fewer": "9 class folders.*--dataset folder"}


def test_bad_data_gives_one_clear_line(train, tree, tmp_path):
    cases = damaged_trees(tree, tmp_path)
    cases["no/such/path"] = "no/such/path.*is no folder, and none can be made"
    for name, pattern in cases.items():
        with pytest.raises(UserError, match=pattern):
            train("--epochs", 1, data=tmp_path / name)
    assert not (tmp_path / "runs").exists()


def test_bad_checkpoints_give_one_clear_line(train, pruned, tree, tmp_path):
    truncated = tmp_path / "truncated.pth.tar"
    truncated.write_bytes(pruned.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"truncated.*damaged"):
        train("--resume", truncated)
    with pytest.raises(UserError, match="checkpoint of resnet8, not of resnet20"):
        train("--resume", pruned, arch="resnet20")
    with pytest.raises(UserError, match="10 classes, the data has 3"):
        train(
            "--resume", pruned, "--dataset", "folder", "--batch_size", 6, "--k", 8, data=three_classes(tree, tmp_path)
        )


def test_an_older_checkpoint_does_not_overwrite_a_later_one(train, pruned):
    older = pruned.with_name("best.resnet8.pth.tar")
    train("--epochs", 2, "--resume", pruned)
    torch.save({**load(older), "epoch": 1}, older)
    with pytest.raises(UserError, match="further on"):
        train("--epochs", 3, "--resume", older)


def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint_intact(train, pruned):
    before = pruned.read_bytes()
    with pytest.raises(
        UserError, match=r"loss of mini-batch \d .*not finite by mini-batch \d of epoch 1; learning rate 1e\+19.*1 of 2"
    ):
        train("--epochs", 2, "--learning_rate", 1e18, "--resume", pruned)
    assert pruned.read_bytes() == before


def test_from_the_shell_a_mistake_is_one_line_and_status_2(tree, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "cifar10_resnet_test.py"), str(tree), "--HTrate", "1.2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


def test_removed_filters_leave_no_denormal_numbers_behind(train):
    """Momentum and running means of removed filters shrink by 0.9 a step; below 1e-38 a CPU would crawl."""
    folder = train("--epochs", 1, "--batch_size", 1, "--k", "none", "--momentum", 0.1)
    saved = load(folder / "checkpoint.resnet8.pth.tar")
    momentum = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
    tensors = momentum + [v for name, v in saved["state_dict"].items() if "running" in name]
    smallest_normal = torch.finfo(torch.float32).tiny
    assert not any(((t != 0) & (t.abs() < smallest_normal)).any() for t in tensors)
    assert sum((t == 0).sum() for t in momentum) > 1000


def test_a_run_without_standard_output_ends_well(tree, tmp_path):
    """As some services start it."""
    command = f"{sys.executable} {ROOT}/cifar10_resnet_test.py {tree} --epochs 1 --batch_size 30 --k none --save_path {tmp_path}/run >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "run/results.json").is_file()
