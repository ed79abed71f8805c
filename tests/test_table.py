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
from utils.tables.side_by_side import run_rows

# Behaves as the training script does towards the table, in a few milliseconds: FAIL and SLEEP name parts of folders.
FAKE = """
import json, os, shlex, signal, sys, time
from pathlib import Path
folder, begin = Path(sys.argv[sys.argv.index("--save_path") + 1]), time.monotonic()
def interrupted(signum, frame):
    (folder / "interrupted").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, signal.SIG_IGN if "DEAF" in os.environ else interrupted)
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
    """go(rows) runs them with the fake script; (folders that failed, printed lines)."""
    file = tmp_path / "fake.py"
    file.write_text(textwrap.dedent(FAKE))
    monkeypatch.setattr(side_by_side, "POLL_SECONDS", 0.01)

    def run(rows, jobs=2):
        failed = run_rows(rows, jobs, train=(sys.executable, str(file)))
        return {folder.name: why for folder, why in failed.items()}, capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def plan(tmp_path):
    def make(*flags, methods="baseline prune", seeds="1", table=(), length_of=None):
        words = [
            "--methods",
            *methods.split(),
            "--seeds",
            *seeds.split(),
            "--save_path",
            str(tmp_path / "table"),
            *table,
        ]
        return make_plan(CommandLine(["/data", *flags]), parser().parse_args(words), length_of)

    return make


def names(rows):
    return [row.folder.name.removeprefix("cifar10-") for row in rows]


def options(row):
    return CommandLine(list(row.flags))


def test_the_plan_is_nets_by_rates_by_methods_by_seeds(plan):
    rows = plan(seeds="1 2", table=("--nets", "resnet20", "resnet32", "--rates", "0.3", "0.4"))
    assert len(rows) == len(set(names(rows))) == 2 * 2 * (1 + 2)
    assert names(rows)[:3] == ["resnet20-baseline-seed1", "resnet20-prune-HT0.7-seed1", "resnet20-prune-HT0.6-seed1"]
    words = "/data --manualSeed 1 --arch resnet20 --recipe prune --HTrate 0.6"
    assert sorted(rows[2].flags) == sorted(words.split())


def test_one_teacher_is_trained_first_for_all_seeds(plan):
    rows = plan(methods="prune_distill", seeds="5 6")
    pruned = "resnet20-prune_distill-HT0.7-from-resnet56-seed"
    assert names(rows) == ["resnet56-baseline-seed5", f"{pruned}5", f"{pruned}6"]
    assert all(row.needs == (rows[0].folder,) for row in rows[1:])
    given = options(rows[2])
    assert given.value("teacher") == str(rows[0].folder / "checkpoint.resnet56.pth.tar")
    assert (given.value("arch"), given.value("arch_small")) == ("resnet56", "resnet20")


def test_a_given_teacher_is_used(plan, teacher):
    (row,) = plan(methods="prune_distill", table=("--teacher", str(teacher)))
    assert row.needs == () and (options(row).value("arch"), options(row).value("teacher")) == ("resnet8", str(teacher))


def test_controls_differ_in_what_they_control_only(plan):
    rows = {
        row.folder.name.split("-")[2]: row for row in plan(methods=" ".join(METHODS)) if "resnet20" in str(row.folder)
    }
    prune = options(rows["prune"])
    for method, difference in (
        ("prune_per_epoch", {"threshold_every": ["epoch"]}),
        ("prune_released", {"heavy_ball": ["released"]}),
        ("prune_no_regrow", {"no_regrow": []}),
        ("prune_fixed_batch", {"k": ["none"]}),
    ):
        assert {n: v for n, v in options(rows[method]).items() if prune.get(n) != v} == difference
    scratch = rows["scratch_epochs"]
    assert scratch.needs == rows["scratch_cost"].needs == (rows["prune"].folder,)
    given = options(scratch)
    assert given.value("widths_of") == str(rows["prune"].folder / "small.resnet20.pth.tar") and "HTrate" not in given
    assert (given.value("recipe"), given.value("batch_size"), given.value("k")) == ("baseline", "64", "128")


def test_a_shortened_table_shares_one_schedule(plan):
    rows = plan("--epochs", "10", "--fit_schedule", methods="baseline prune prune_distill", length_of="baseline")
    lengths = {tuple(w for n in ("epochs", "schedule", "gammas") for w in options(row)[n]) for row in rows}
    assert lengths == {("10", "1", "3", "6", "8", "10", "0.2", "0.2", "0.2")} and all(
        "10-epochs" in n for n in names(rows)
    )


def test_flags_go_to_the_rows_they_concern(plan):
    flags = ("--k", "0.1", "--v", "0.2", "--loss", "KL", "--kd_T", "2", "--decay", "0.001")
    rows = {
        row.folder.name.split("-")[2]: options(row)
        for row in plan(*flags, methods="baseline prune distill scratch_cost")
    }
    assert {name for name, row in rows.items() if "k" in row} == {"prune", "scratch_cost"}
    assert {name for name, row in rows.items() if "v" in row} == {"prune"}
    assert {name for name, row in rows.items() if row.keys() & {"loss", "kd_T"}} == {"distill"}
    assert all(row.value("decay") == "0.001" for row in rows.values())


def test_equal_cost_takes_its_epochs_from_the_finished_run(plan, go):
    before, row = plan("--epochs", "10", methods="scratch_cost", length_of="baseline")
    row.needs[0].mkdir(parents=True)
    results = json.loads((ROOT / "results/cpu-10-epochs/prune/results.json").read_text())
    results["command"] = shlex.join(["python", "cifar10_resnet_test.py", *before.command()])
    (row.needs[0] / "results.json").write_text(json.dumps({**results, "small": {"error": "too different"}}))
    assert "has no small network: too different" in go([before, row])[0][row.folder.name]
    small = {"before": {"multiply_adds": 40_551_040}, "after": {"multiply_adds": 21_420_768}}
    (row.needs[0] / "results.json").write_text(json.dumps({**results, "small": small}))
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


def test_the_dry_run_prints_the_rows_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fill(CommandLine("--dry_run --seeds 1 2 --methods prune".split()))
    assert capsys.readouterr().out.count("--recipe prune --HTrate 0.7") == 2 and not list(tmp_path.iterdir())


def test_rows_run_once_and_done_ones_are_skipped(plan, go):
    rows = plan(methods="baseline prune prune_distill")
    failed, lines = go(rows)
    assert not failed and sum("begins" in line for line in lines) == 4
    (rows[1].folder / "results.json").unlink()
    results = json.loads((rows[0].folder / "results.json").read_text())
    (rows[0].folder / "results.json").write_text(json.dumps({**results, "command": results["command"] + " --v 0"}))
    _, lines = go(rows)
    assert [line for line in lines if "begins" in line] == [line for line in lines if "begins: python fake.py" in line]
    assert sum("begins" in line for line in lines) == 2 and sum("done already" in line for line in lines) == 2


def test_a_failing_row_is_reported_and_the_rest_goes_on(plan, go, monkeypatch):
    monkeypatch.setenv("FAIL", "resnet56")
    rows = plan(methods="prune_distill baseline")
    failed, lines = go(rows)
    teacher, taught, plain = (row.folder.name for row in rows)
    assert "status 1: error: it failed as it was told to (all of it in" in failed[teacher]
    assert failed[taught] == f"needs {teacher}, which failed" and any(
        f"ended: {rows[2].folder}" in line for line in lines
    )


def test_jobs_run_side_by_side_each_with_its_own_gpu_and_threads(plan, go, monkeypatch):
    monkeypatch.setenv("TOGETHER", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    rows = plan(methods="baseline prune prune_released prune_no_regrow")
    begin = time.monotonic()
    failed, _ = go(rows, jobs=2)
    assert not failed and time.monotonic() - begin < 25
    assert {(row.folder / "began").read_text() for row in rows} == {"3 4", "3 7"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("deaf", [False, True])
def test_an_interruption_stops_the_children_and_the_command_goes_on_later(plan, go, monkeypatch, number, deaf):
    rows = plan(methods="baseline prune prune_released")
    monkeypatch.setenv("SLEEP", "prune")
    if deaf:
        monkeypatch.setenv("DEAF", "1")
        monkeypatch.setattr(side_by_side, "STOP_SECONDS", 0.3)

    def interrupt():
        end = time.monotonic() + 30
        while not (rows[1].folder / "began").exists() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with stop.handled(), pytest.raises(Stopped, match="1 of 3 runs are done, repeat the command"):
        go(rows, jobs=1)
    thread.join()
    assert (rows[1].folder / "interrupted").exists() == (not deaf) and not rows[2].folder.exists()
    monkeypatch.delenv("SLEEP")
    with stop.handled():
        failed, lines = go(rows)
    assert not failed and "done already" in " ".join(lines)


def test_a_small_table_on_images_fills_and_is_compared(tree, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = [str(tree), *shlex.split("--epochs 1 --batch_size 16 --ngpu 0 --seeds 1 --methods prune --jobs 2")]
    fill(CommandLine(words))
    out = capfd.readouterr().out
    assert "AHSG-HT 30 %" in out and "**60 training and 20 test images**" in out
    fill(CommandLine(words))
    assert capfd.readouterr().out.count("done already") == 1
