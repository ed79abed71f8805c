"""run_cifar.sh and what it adds to the training script."""

import os
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
    """recorded(words...) gives the options of every run that they would start."""
    monkeypatch.chdir(tmp_path)
    lines = []
    monkeypatch.setattr(recipe.os, "execv", lambda program, command: lines.append(command[2:]))
    monkeypatch.setattr(grid, "run_rows", lambda rows, jobs: lines.extend(row.command() for row in rows) or {})

    def run(*words):
        lines.clear()
        recipe.main(list(words))
        return [CommandLine(line) for line in lines]

    return run


@pytest.fixture
def no_data(monkeypatch):
    def nothing(*_):
        raise data.NoData("no cifar10 here")

    monkeypatch.setattr(data, "find_or_download", nothing)


@pytest.fixture
def with_data(monkeypatch):
    monkeypatch.setattr(data, "find_or_download", lambda name, path: Path(path))


def test_the_default_is_the_full_prune_recipe_which_continues(recorded, with_data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (line,) = recorded()
    assert dict(line) == {"recipe": ["prune"], "resume": ["auto"]} and line.words == []


def test_without_data_or_network_it_is_synthetic_and_says_so_in_capitals(recorded, no_data, capsys):
    (line,) = recorded()
    assert line.value("dataset") == "synthetic" and "NO CIFAR-10 HERE AND NO NETWORK" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["prune", "elsewhere"], ["prune", "--dataset", "cifar10"]])
def test_data_that_was_asked_for_is_never_replaced(recorded, no_data, words):
    with pytest.raises(UserError, match="no cifar10 here"):
        recorded(*words)


def test_without_gpu_the_run_is_short_and_says_how_to_get_the_full_one(recorded, with_data, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (line,) = recorded("prune", "mydata", "--no-regrow")
    assert (line.value("epochs"), "fit_schedule" in line, line.words) == ("5", True, ["mydata"])
    out = capsys.readouterr().out
    assert "SHORT RUN" in out and "--epochs 200" in out


def test_a_given_length_is_kept(recorded, with_data):
    (line,) = recorded("--recipe", "baseline", "--epochs", "200", "--resume", "x.pth.tar", "-b", "32")
    given = {"recipe": ["baseline"], "epochs": ["200"], "resume": ["x.pth.tar"], "batch_size": ["32"]}
    assert dict(line) == given


def test_distilling_trains_a_teacher_then_the_student_with_and_without_it(recorded, with_data):
    words = "--epochs 40 --manualSeed 3 --kd_weight 2 -b 32 --k 64 --prune_rate 0.4".split()
    teacher, student, plain = recorded("prune_distill", "mydata", *words)
    assert (teacher.value("recipe"), teacher.value("arch"), teacher.value("epochs")) == ("baseline", "resnet56", "40")
    assert (student.value("recipe"), student.value("arch_small")) == ("prune_distill", "resnet20")
    assert student.value("teacher") == f"{teacher.value('save_path')}/checkpoint.resnet56.pth.tar"
    assert (plain.value("recipe"), plain.value("arch")) == ("prune", "resnet20")
    assert not plain.keys() & {"teacher", "kd_weight", "arch_small"} and teacher.keys().isdisjoint({"k", "HTrate"})
    same = ("epochs", "schedule", "gammas", "batch_size", "k", "HTrate", "manualSeed")
    assert [plain[n] for n in same] == [student[n] for n in same] and student["HTrate"] == ["0.6"]
    assert len({line.value("save_path") for line in (teacher, student, plain)}) == 3
    assert all(line.words == ["mydata"] and line.value("resume") == "auto" for line in (teacher, student, plain))


def test_a_full_recipe_with_a_teacher_gives_the_plain_student_its_epochs(recorded, with_data, monkeypatch, teacher):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    student, plain = recorded("prune_distill", "--teacher", str(teacher), "--arch_small", "resnet32")
    assert student["teacher"] == [str(teacher)] and student["arch_small"] == plain["arch"] == ["resnet32"]
    assert student["epochs"] == plain["epochs"] == ["250"] and plain["schedule"][-1] == "200"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["prnue"], "'prnue'; choose from baseline"),
        (["distill", "--resume", "x"], "leave out --resume"),
        (["prune", "--epochs", "5", "mydata"], "'mydata' after --epochs"),
    ],
)
def test_mistakes_are_named(recorded, with_data, words, reason):
    with pytest.raises(UserError, match=reason):
        recorded(*words)


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("x --a 1 --gone 2 --b", "--a 1 --b"),
        ("--gone=2 --b", "--b"),
        ("--kd-T 1 --kd_weight 2 --b -4", "--b -4"),
        ("-j 2 --b", "-j 2 --b"),
    ],
)
def test_options_are_taken_out_with_their_values(words, left):
    assert CommandLine(words.split()).flags("gone", "kd_*") == left.split()


@pytest.mark.parametrize("words", [["nonsense"], ["prune", "--HTrate", "1.2", "--dataset", "synthetic"]])
def test_from_the_shell_a_mistake_is_one_line_and_status_2(words, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "run_cifar.sh"), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
