"""run_cifar.sh and what it adds to the training script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
from utils.base.errors import UserError
from utils.compare.published import published_rows
from utils.compare_tables import comparison_line
from utils.jobs import run_recipe
from utils.train.experiment import run_name

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Runs run_recipe.main with given words and returns the command lines that it would train with."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def fake_script(flags):
        calls.append(flags)
        args = run_recipe.script.parse_args(flags)
        folder = Path(args.save_path or run_recipe.RUNS / run_name(args))
        folder.mkdir(parents=True, exist_ok=True)
        results = dict(
            arch=args.student,
            last_epoch_accuracy=50.0,
            best_epoch_accuracy=60.0,
            epochs_done=args.epochs,
            seed=1,
            finished=True,
            settings=vars(args),
        )
        (folder / "results.json").write_text(json.dumps(results))
        (folder / f"checkpoint.{args.student}.pth.tar").write_bytes(b"")
        return folder

    monkeypatch.setattr(run_recipe.script, "main", fake_script)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["run_recipe", *words])
        run_recipe.main()
        return [run_recipe.script.parse_args([f for f in call if f not in ("--resume", "auto")]) for call in calls]

    return run


@pytest.fixture
def no_data(monkeypatch):
    def nothing(*_):
        raise data.NoData("no cifar10 here")

    monkeypatch.setattr(data, "find_or_download", nothing)


@pytest.fixture
def with_data(monkeypatch):
    monkeypatch.setattr(data, "find_or_download", lambda name, path: Path(path))


def test_the_default_is_to_prune_resnet20(recorded, with_data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (args,) = recorded()
    assert (args.recipe, args.arch, args.HTrate, args.epochs, args.dataset) == (
        "prune",
        "resnet20",
        0.7,
        200,
        "cifar10",
    )


def test_without_data_or_network_it_is_synthetic_and_says_so_in_capitals(recorded, no_data, capsys):
    (args,) = recorded()
    assert args.dataset == "synthetic"
    assert "NO CIFAR-10 HERE AND NO NETWORK" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["prune", "elsewhere"], ["prune", "--dataset", "cifar10"]])
def test_data_that_was_asked_for_is_never_replaced(recorded, no_data, words):
    with pytest.raises(UserError, match="no cifar10 here"):
        recorded(*words)


def test_without_gpu_the_run_is_short_and_says_how_to_get_the_full_one(recorded, with_data, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (args,) = recorded()
    assert args.epochs == 5 and max(args.schedule) < 5
    out = capsys.readouterr().out
    assert "SHORT RUN" in out and "--epochs 200" in out


def test_a_given_length_is_kept(recorded, with_data):
    (args,) = recorded("prune", "--epochs", "200")
    assert args.epochs == 200 and args.schedule == [1, 60, 120, 160]


def test_distilling_trains_a_teacher_then_both_students(recorded, with_data):
    teacher, student, plain = recorded("prune_distill", "--epochs", "40", "--fit_schedule", "--manualSeed", "3")
    assert (teacher.recipe, teacher.student, teacher.batch_size, teacher.k) == ("baseline", "resnet56", 128, None)
    assert (student.recipe, student.student) == ("prune_distill", "resnet20")
    assert student.teacher == "runs/baseline-cifar10-resnet56-seed3/checkpoint.resnet56.pth.tar"
    assert (plain.recipe, plain.student, plain.teacher, plain.manualSeed) == ("prune", "resnet20", None, 3)
    same = ("epochs", "schedule", "gammas", "batch_size", "k", "HTrate", "v", "learning_rate")
    assert [getattr(plain, n) for n in same] == [getattr(student, n) for n in same]


def test_a_teacher_that_is_there_is_used_again(recorded, with_data):
    assert len(recorded("distill", "--epochs", "5")) == 3
    again = recorded("distill", "--epochs", "5")[3:]
    assert [args.recipe for args in again] == ["distill", "baseline"]


def test_an_unknown_recipe_is_named(recorded):
    with pytest.raises(UserError, match="'prnue'; choose from baseline"):
        recorded("prnue")


def test_a_teacher_trained_too_briefly_or_on_other_data_is_not_used(recorded, with_data, capsys):
    recorded("distill", "--epochs", "5")
    assert [args.recipe for args in recorded("distill", "--epochs", "6")[3:]] == ["baseline", "distill", "baseline"]
    assert [args.recipe for args in recorded("distill", "elsewhere", "--epochs", "5")[6:]] == [
        "baseline",
        "distill",
        "baseline",
    ]
    Path("runs/baseline-cifar10-resnet56-seed1/results.json").write_text("{")
    recorded("distill", "--epochs", "5")
    assert "is damaged and passed over" in capsys.readouterr().out


def test_short_and_hyphenated_names_mean_the_same(recorded, with_data):
    teacher, student, _ = recorded(
        "prune_distill", "-a", "vgg13_bn", "--arch-small", "resnet32", "-b", "32", "--head-width", "20", "--epochs", "5"
    )
    assert (teacher.arch, teacher.batch_size, teacher.head_width) == ("vgg13_bn", 128, None)
    assert (student.arch, student.student, student.batch_size, student.head_width) == ("vgg13_bn", "resnet32", 32, 20)


def test_the_recipe_may_be_an_option(recorded, with_data):
    (args,) = recorded("--recipe", "baseline", "--epochs", "5")
    assert args.recipe == "baseline"


def test_recipes_of_several_runs_take_no_checkpoint(recorded, with_data):
    with pytest.raises(UserError, match="leave out --resume"):
        recorded("distill", "--resume", "x")


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        ("--a 1 --gone 2 --b", "--a 1 --b"),
        ("--gone=2 --b", "--b"),
        ("--many 1 2 3 --b 4", "--b 4"),
        ("x --switch --b", "x --b"),
    ],
)
def test_options_are_taken_out_with_their_values(flags, left):
    assert run_recipe.without(flags.split(), {"gone": 1, "many": "+", "switch": 0}) == left.split()


def results(**changes):
    base = dict(
        synthetic_data=False,
        dataset="cifar10",
        arch="resnet20",
        prune_rate=0.3,
        last_epoch_accuracy=90.5,
        recipe="prune",
        epochs_run_here=200,
        train_images=50_000,
        test_images=10_000,
    )
    return base | changes


def test_comparison_names_the_published_rows():
    line = comparison_line(results())
    assert "90.50 (last epoch)" in line and "SFP 90.83 +- 0.31" in line and "NOT COMPARABLE" not in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(epochs_run_here=5), "NOT COMPARABLE: 5 epochs instead of 200"),
        (dict(train_images=60, test_images=20), "NOT COMPARABLE: 60 training"),
        (dict(synthetic_data=True), "none, the data is SYNTHETIC"),
        (dict(settings={"widths_of": "small.resnet20.pth.tar"}), "none, they have no small network"),
        (dict(prune_rate=0.35), "none, no published row for resnet20 on cifar10 with 35 %"),
        (
            dict(recipe="finetune", settings={}),
            "none, no published row for resnet20 on cifar10 with 30 % of the filters removed, pretrained",
        ),
    ],
)
def test_what_cannot_be_compared_is_not(changes, expected):
    assert expected in comparison_line(results(**changes))


def test_published_rows_are_those_trained_from_scratch():
    rows = published_rows("cifar10", "resnet56", 0.4)
    assert rows and all(row.init == "scratch" for row in rows)
    assert {row.acc for row in rows} == {92.26, 92.93, 92.89}


@pytest.mark.parametrize("words", [["nonsense"], ["prune", "--HTrate", "1.2"]])
def test_from_the_shell_a_mistake_is_one_line_and_status_2(words, tmp_path):
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "python").symlink_to(sys.executable)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "run_cifar.sh"), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
