"""run_cifar.sh and what it adds to the training script."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
from utils.base.errors import UserError
from utils.tables import grid, recipe
from utils.tables.runs import ROOT


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """recorded(words...) gives the command lines of the runs that they would start; found=False: there is no data."""
    monkeypatch.chdir(tmp_path)
    lines = []
    monkeypatch.setattr(recipe.os, "execv", lambda program, command: lines.append(shlex.join(command[2:])))
    monkeypatch.setattr(grid, "run_rows", lambda rows, jobs: lines.extend(shlex.join(r.command()) for r in rows) or {})

    def nothing(*_):
        raise data.NoData("no cifar10 here")

    def run(words, gpu=False, found=True):
        monkeypatch.setattr(data, "find_or_download", (lambda name, path: path) if found else nothing)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        recipe.main(words.split())
        return lines

    return run


def test_the_default_is_the_full_prune_recipe_which_continues_and_what_is_given_is_kept(recorded):
    recorded("", gpu=True)
    recorded("--resume y.pth.tar")  # a run of any recipe, which its checkpoint names
    assert recorded("--recipe baseline --epochs=200 --resume x.pth.tar -b 32") == [
        "--resume auto --recipe prune",
        "--resume y.pth.tar",
        "--resume x.pth.tar --recipe baseline --epochs 200 --batch_size 32",
    ]


def test_without_data_or_network_it_is_synthetic_and_says_so_in_capitals(recorded, capsys):
    (line,) = recorded("", found=False)
    assert "--dataset synthetic" in line and "NO CIFAR-10 HERE AND NO NETWORK" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["prune elsewhere", "prune --dataset cifar10"])
def test_data_that_was_asked_for_is_never_replaced(recorded, words):
    with pytest.raises(UserError, match="no cifar10 here"):
        recorded(words, found=False)


def test_without_gpu_the_run_is_short_and_says_how_to_get_the_full_one(recorded, capsys):
    (line,) = recorded("prune --no-regrow mydata")
    assert line == "mydata --resume auto --no_regrow --epochs 5 --fit_schedule --recipe prune"
    assert "SHORT RUN" in (out := capsys.readouterr().out) and "--epochs 200" in out


def test_distilling_trains_a_teacher_then_the_student_with_and_without_it(recorded):
    words = "prune_distill mydata --arch resnet56 --epochs 40 --seed 3 --ce_weight 2 -b 32 --k 64 --prune_rate 0.4"
    teacher, student, plain = recorded(words)
    file = Path("runs/distill/cifar10-resnet56-baseline-40-epochs-seed3/checkpoint.resnet56.pth.tar")
    length = "mydata --epochs 40 --schedule 1 10 19 26 32 --gammas 10.0 0.2 0.2 0.2 0.5"
    own = "--arch resnet20 --manualSeed 3"
    assert (
        f"{length} --batch_size 32 --recipe baseline --arch resnet56 --manualSeed 3 --save_path {file.parent}"
        in teacher
    )
    pruned = f"--recipe prune_distill {own} --HTrate 0.6 --teacher {file}"
    assert f"{length} --ce_weight 2.0 --batch_size 32 --k 64 {pruned}" in student
    assert f"{length} --batch_size 32 --k 64 --recipe prune {own} --HTrate 0.6 --save_path" in plain


def test_a_full_recipe_with_a_teacher_gives_the_plain_student_its_epochs(recorded):
    lines = recorded("distill --teacher some.pth.tar --arch_small resnet32", gpu=True)
    assert len(lines) == 2 and "--teacher some.pth.tar" in lines[0] and "--teacher" not in lines[1]
    assert all("--epochs 200" in line and "--arch resnet32" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("prnue", "choose from baseline"),
        ("distill --resume x", "leave out --resume"),
        ("distill --epochs ten", "--epochs: must be"),
    ],
)
def test_mistakes_are_named(recorded, words, reason):
    with pytest.raises(UserError, match=reason):
        recorded(words)


def test_from_the_shell_a_mistake_is_one_line_and_status_2(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "run_cifar.sh"), "prune", "--HTrate", "1.2", "--dataset", "synthetic"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
