"""run_cifar.sh table: the plan, what is skipped, what fails, several at a time, and interruption."""

import json
import os
import shlex
import signal
import sys
import textwrap
import threading
import time

import pytest

from utils.base.errors import UserError
from utils.base.signals import Stopped, stop
from utils.tables import side_by_side
from utils.tables.command_line import CommandLine
from utils.tables.grid import METHODS, fill, make_plan, parser
from utils.tables.runs import ROOT

# Behaves as the training script does towards the table, in a few milliseconds: FAIL and SLEEP name parts of folders.
FAKE = """
import json, os, shlex, signal, sys, time
from pathlib import Path
folder, begin = Path(sys.argv[sys.argv.index("--save_path") + 1]), time.monotonic()
def interrupted(signum, frame):
    (folder / "interrupted").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, interrupted)
(folder / "began").write_text(f"{os.environ.get('OMP_NUM_THREADS')} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
if os.environ.get("FAIL", "nothing") in folder.name:
    sys.exit("error: it failed as it was told to")
if os.environ.get("SLEEP", "nothing") in folder.name:
    time.sleep(60)
while len(list(folder.parent.glob("*/began"))) < int(os.environ.get("TOGETHER", 0)) and time.monotonic() < begin + 30:
    time.sleep(0.01)
results = dict(finished=True, command=shlex.join(["python", "cifar10_resnet_test.py", *sys.argv[1:]]))
(folder / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def go(tmp_path, monkeypatch, capsys):
    """go(rows) runs them with the fake script; ({row: why it failed}, printed lines)."""
    (tmp_path / "fake.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.setattr(side_by_side, "POLL_SECONDS", 0.01)

    def run(rows, jobs=2):
        failed = side_by_side.run_rows(rows, jobs, train=(sys.executable, str(tmp_path / "fake.py")))
        return {folder.name: why for folder, why in failed.items()}, capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def plan(tmp_path):
    def make(*flags, methods="baseline prune", seeds="1", table=(), length_of=None):
        words = ["--methods", *methods.split(), "--seeds", *seeds.split(), "--save_path", str(tmp_path / "t"), *table]
        return make_plan(CommandLine(["/data", *flags]), parser().parse_args(words), length_of)

    return make


def names(rows):
    return [row.folder.name.removeprefix("cifar10-") for row in rows]


def by_method(rows):
    return {
        row.folder.name.split("-")[2]: CommandLine(list(row.flags)) for row in rows if "-resnet20-" in str(row.folder)
    }


def test_the_plan_is_nets_by_rates_by_methods_by_seeds(plan):
    rows = plan(seeds="1 2", table=("--nets", "resnet20", "resnet32", "--rates", "0.3", "0.4"))
    assert len(rows) == len(set(names(rows))) == 2 * 2 * (1 + 2)
    assert names(rows)[:3] == ["resnet20-baseline-seed1", "resnet20-prune-HT0.7-seed1", "resnet20-prune-HT0.6-seed1"]
    assert shlex.join(rows[2].flags) == "/data --manualSeed 1 --arch resnet20 --recipe prune --HTrate 0.6"


def test_one_teacher_is_trained_first_for_all_seeds_or_given(plan, teacher):
    rows = plan(methods="prune_distill", seeds="5 6")
    pruned = "resnet20-prune_distill-HT0.7-from-resnet56-seed"
    assert names(rows) == ["resnet56-baseline-seed5", f"{pruned}5", f"{pruned}6"]
    file = rows[0].folder / "checkpoint.resnet56.pth.tar"
    assert f"--arch resnet56 --arch_small resnet20 --teacher {file}" in shlex.join(rows[2].flags)
    assert [row.needs for row in rows] == [(), (rows[0].folder,), (rows[0].folder,)]
    (row,) = plan(methods="prune_distill", table=("--teacher", str(teacher)))
    assert f"--arch resnet8 --arch_small resnet20 --teacher {teacher}" in shlex.join(row.flags) and row.needs == ()


def test_controls_differ_in_what_they_control_only(plan):
    rows = by_method(plan(methods=" ".join(METHODS)))
    for method, difference in (
        ("prune_per_epoch", {"threshold_every": ["epoch"]}),
        ("prune_released", {"heavy_ball": ["released"]}),
        ("prune_no_regrow", {"no_regrow": []}),
        ("prune_fixed_batch", {"k": ["none"]}),
    ):
        assert {n: v for n, v in rows[method].items() if rows["prune"].get(n) != v} == difference
    scratch = rows["scratch_epochs"]
    assert scratch.value("widths_of").endswith("t/cifar10-resnet20-prune-HT0.7-seed1/small.resnet20.pth.tar")
    assert [scratch.value(n) for n in ("recipe", "batch_size", "k", "HTrate")] == ["baseline", "64", "128", ""]


def test_a_shortened_table_shares_one_schedule(plan):
    rows = plan("--epochs", "10", methods="baseline prune prune_distill", length_of="baseline")
    lengths = {shlex.join(line.only("epochs", "schedule", "gammas")) for line in by_method(rows).values()}
    assert lengths == {"--epochs 10 --schedule 1 3 6 8 --gammas 10 0.2 0.2 0.2"} and "10-epochs" in names(rows)[0]


def test_flags_go_to_the_rows_they_concern(plan):
    flags = ("--k", "0.1", "--v", "0.2", "--kd", "logits:KL:1", "--decay", "0.001")
    rows = by_method(plan(*flags, methods="baseline prune distill scratch_cost"))
    having = {option: {name for name, line in rows.items() if option in line} for option in ("k", "v", "kd", "decay")}
    assert having == {"k": {"prune", "scratch_cost"}, "v": {"prune"}, "kd": {"distill"}, "decay": set(rows)}


def test_equal_cost_takes_its_epochs_from_the_finished_run(plan, go):
    before, row = plan("--epochs", "10", methods="scratch_cost", length_of="baseline")
    before.folder.mkdir(parents=True)
    results = json.loads((ROOT / "results/cpu-10-epochs/prune/results.json").read_text())
    results["command"] = shlex.join(["python", "cifar10_resnet_test.py", *before.command()])
    (before.folder / "results.json").write_text(json.dumps({**results, "small": {"error": "too different"}}))
    assert "has no small network: too different" in go([before, row])[0][row.folder.name]
    small = {"before": {"multiply_adds": 40_551_040}, "after": {"multiply_adds": 21_420_768}}
    (before.folder / "results.json").write_text(json.dumps({**results, "small": small}))
    given = CommandLine(row.command())
    assert (given["epochs"], given["schedule"]) == (["19"], ["1", "6", "11", "15"])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--arch resnet56", "the table sets --arch itself"),
        ("--prune-rate 0.3", "the table sets --prune_rate itself"),
        ("--nets resnet21", "unknown network 'resnet21'"),
        ("--nets resnet110 --methods distill", "no usual teacher for resnet110; name one with --teacher_net"),
        ("--rates 1.2", "REMOVED"),
        ("--methods magic", "invalid choice"),
        ("--jobs 0", "--jobs must be >= 1, got 0"),
        ("--epochs 5 mydata", "DATA stands before the flags"),
        ("--no_regrow mydata", "'mydata' after --no_regrow is no value"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, monkeypatch, flags, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=reason):
        fill(CommandLine(flags.split()))
    assert not list(tmp_path.iterdir())


def test_rows_run_once_and_done_ones_are_skipped(plan, go):
    rows = plan(methods="baseline prune prune_distill")
    failed, lines = go(rows)
    assert not failed and sum("begins" in line for line in lines) == 4
    (rows[1].folder / "results.json").unlink()
    other = (rows[0].folder / "results.json").read_text().replace("--recipe", "--v 0 --recipe")
    (rows[0].folder / "results.json").write_text(other)
    _, lines = go(rows)
    assert sum("begins" in line for line in lines) == 2 and sum("done already" in line for line in lines) == 2


def test_a_failing_row_is_reported_and_the_rest_goes_on(plan, go, monkeypatch):
    monkeypatch.setenv("FAIL", "resnet56")
    teacher, taught, plain = plan(methods="prune_distill baseline")
    failed, _ = go([teacher, taught, plain])
    assert "status 1: error: it failed as it was told to (all of it in" in failed[teacher.folder.name]
    assert failed[taught.folder.name] == f"needs {teacher.folder.name}, which failed" and plain.is_done()


def test_jobs_run_side_by_side_each_with_its_own_gpu_and_threads(plan, go, monkeypatch):
    for name, value in (("TOGETHER", "2"), ("OMP_NUM_THREADS", "6"), ("CUDA_VISIBLE_DEVICES", "4,7")):
        monkeypatch.setenv(name, value)
    rows, begin = plan(methods="baseline prune prune_released prune_no_regrow"), time.monotonic()
    assert not go(rows, jobs=2)[0] and time.monotonic() - begin < 25
    assert {(row.folder / "began").read_text() for row in rows} == {"3 4", "3 7"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_the_children_and_the_command_continues(plan, go, monkeypatch, number):
    first, second, third = rows = plan(methods="baseline prune prune_released")
    monkeypatch.setenv("SLEEP", "prune")

    def interrupt():
        end = time.monotonic() + 30
        while not (second.folder / "began").exists() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with stop.handled(), pytest.raises(Stopped, match="1 of 3 runs are done, repeat the command"):
        go(rows, jobs=1)
    thread.join()
    assert first.is_done() and (second.folder / "interrupted").exists() and not third.folder.exists()
    monkeypatch.delenv("SLEEP")
    with stop.handled():
        failed, lines = go(rows)
    assert not failed and "done already" in " ".join(lines)


def test_a_small_table_on_images_fills_and_is_compared(tree, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(f"{tree} --epochs 1 --batch_size 16 --ngpu 0 --seeds 1 --methods prune --jobs 2")
    fill(CommandLine([*words, "--dry_run"]))
    assert "--recipe prune --HTrate 0.7" in capfd.readouterr().out and not list(tmp_path.iterdir())
    fill(CommandLine(words))
    out = capfd.readouterr().out
    assert "AHSG-HT 30 %" in out and "**60 training, 20 test images**" in out
    fill(CommandLine(words))
    assert capfd.readouterr().out.count("done already") == 1
