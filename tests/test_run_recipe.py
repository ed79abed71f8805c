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
from utils.tables.command_line import CommandLine
from utils.tables.runs import ROOT


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """recorded(words...) gives the options of every run that they would start; data=False: none is found."""
    monkeypatch.chdir(tmp_path)
    lines = []
    monkeypatch.setattr(recipe.os, "execv", lambda program, command: lines.append(command[2:]))
    monkeypatch.setattr(grid, "run_rows", lambda rows, jobs: lines.extend(row.command() for row in rows) or {})

    def nothing(*_):
        raise data.NoData("no cifar10 here")

    def run(*words, gpu=False, found=True):
        monkeypatch.setattr(data, "find_or_download", (lambda name, path: path) if found else nothing)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        recipe.main(list(words))
        return [CommandLine(line) for line in lines]

    return run


def test_the_default_is_the_full_prune_recipe_which_continues_and_what_is_given_is_kept(recorded):
    recorded(gpu=True)
    line, given = recorded("--recipe", "baseline", "--epochs=200", "--resume", "x.pth.tar", "-b", "32")
    assert line.flags() == ["--recipe", "prune", "--resume", "auto"] and line.words == []
    assert shlex.join(given.flags()) == "--epochs 200 --resume x.pth.tar --batch_size 32 --recipe baseline"


def test_without_data_or_network_it_is_synthetic_and_says_so_in_capitals(recorded, capsys):
    (line,) = recorded(found=False)
    assert line.value("dataset") == "synthetic" and "NO CIFAR-10 HERE AND NO NETWORK" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["prune", "elsewhere"], ["prune", "--dataset", "cifar10"]])
def test_data_that_was_asked_for_is_never_replaced(recorded, words):
    with pytest.raises(UserError, match="no cifar10 here"):
        recorded(*words, found=False)


def test_without_gpu_the_run_is_short_and_says_how_to_get_the_full_one(recorded, capsys):
    (line,) = recorded("prune", "mydata", "--no-regrow")
    assert line.words == ["mydata"] and line.only("epochs", "fit_schedule") == ["--epochs", "5", "--fit_schedule"]
    assert "SHORT RUN" in (out := capsys.readouterr().out) and "--epochs 200" in out


def test_distilling_trains_a_teacher_then_the_student_with_and_without_it(recorded):
    words = "prune_distill mydata --epochs 40 --manualSeed 3 --ce_weight 2 -b 32 --k 64 --prune_rate 0.4"
    teacher, student, plain = lines = recorded(*words.split())
    assert shlex.join(teacher.only("recipe", "arch", "epochs")) == "--epochs 40 --arch resnet56 --recipe baseline"
    assert student.value("teacher") == f"{teacher.value('save_path')}/checkpoint.resnet56.pth.tar"
    assert [line.value("recipe") for line in lines[1:]] == ["prune_distill", "prune"]
    assert student.value("arch_small") == plain.value("arch") == "resnet20" and not plain.keys() & {
        "teacher",
        "ce_weight",
    }
    same = ("epochs", "schedule", "gammas", "batch_size", "k", "HTrate", "manualSeed")
    assert plain.only(*same) == student.only(*same) and student["HTrate"] == ["0.6"] and "k" not in teacher
    assert len({line.value("save_path") for line in lines}) == 3
    assert all(line.words == ["mydata"] and line.value("resume") == "auto" for line in lines)


def test_a_full_recipe_with_a_teacher_gives_the_plain_student_its_epochs(recorded, teacher):
    student, plain = recorded("prune_distill", "--teacher", str(teacher), "--arch_small", "resnet32", gpu=True)
    assert student["teacher"] == [str(teacher)] and student["arch_small"] == plain["arch"] == ["resnet32"]
    assert student["epochs"] == plain["epochs"] == ["250"] and plain["schedule"][-1] == "200"


@pytest.mark.parametrize(
    "words, reason",
    [
        ("prnue", "choose from baseline"),
        ("distill --resume x", "leave out --resume"),
        ("distill --epochs ten", "--epochs must be"),
    ],
)
def test_mistakes_are_named(recorded, words, reason):
    with pytest.raises(UserError, match=reason):
        recorded(*words.split())


def test_from_the_shell_a_mistake_is_one_line_and_status_2(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "run_cifar.sh"), "prune", "--HTrate", "1.2", "--dataset", "synthetic"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
