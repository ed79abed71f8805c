"""run_cifar.sh table: the plan, what is skipped, what fails, interruption, and the hours it estimates."""

import json
import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import cifar10_resnet_test as script
from utils.base.errors import UserError
from utils.compare import side_by_side
from utils.compare.own_runs import find_runs
from utils.compare.side_by_side import SideBySide
from utils.jobs import hours, table
from utils.jobs.hours import Speed
from utils.jobs.table_plan import METHODS, make_plan, state

# Behaves as the training script does towards the table, in a few milliseconds: FAIL and SLEEP name parts of folders.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
def value(name, default=None):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default
folder, begin = Path(value("--save_path")), time.monotonic()
def interrupted(signum, frame):
    (folder / "interrupted").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, signal.SIG_IGN if "DEAF" in os.environ else interrupted)
(folder / "began").write_text(os.environ["OMP_NUM_THREADS"])
if os.environ.get("FAIL", "nothing") in folder.name:
    sys.exit("error: it failed as it was told to")
if os.environ.get("SLEEP", "nothing") in folder.name:
    time.sleep(60)
if "TOGETHER" in os.environ:
    while len(list(folder.parent.glob("*/began"))) < 2 and time.monotonic() < begin + 30:
        time.sleep(0.01)
settings = dict(data_path=sys.argv[1], teacher=value("--teacher"), epochs=int(value("--epochs", 250 if "prune_distill" in folder.name else 200)))
results = dict(finished=True, settings=settings, epochs_done=settings["epochs"], last_epoch_accuracy=50.0)
(folder / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def fake(tmp_path):
    file = tmp_path / "fake.py"
    file.write_text(textwrap.dedent(FAKE))
    return sys.executable, str(file)


@pytest.fixture
def plan(tmp_path):
    def make(*flags, nets=("resnet20",), rates=(0.3,), methods=("baseline", "prune"), seeds=(1,), **options):
        return make_plan(nets, rates, methods, seeds, ["/data", *flags], tmp_path / "table", **options)

    return make


@pytest.fixture
def go(fake):
    """go(rows) runs them with the fake script; (the SideBySide, its lines)."""

    def run(rows, jobs=1, threads=3):
        lines = []
        running = SideBySide(rows, jobs, threads, lines.append, train=fake)
        running.run()
        return running, lines

    return run


def names(rows):
    return [row.name for row in rows]


def test_the_plan_is_nets_by_rates_by_methods_by_seeds(plan):
    rows = plan(nets=("resnet20", "resnet32"), rates=(0.3, 0.4), seeds=(1, 2))
    assert len(rows) == len(set(names(rows))) == 2 * 2 * (1 + 2)
    assert names(rows)[:3] == [
        "cifar10-resnet20-baseline-seed1",
        "cifar10-resnet20-prune-HT0.7-seed1",
        "cifar10-resnet20-prune-HT0.6-seed1",
    ]
    settings = rows[2].settings()
    assert (settings.recipe, settings.HTrate, settings.epochs, settings.manualSeed) == ("prune", 0.6, 200, 1)


def test_one_teacher_is_trained_first_for_all_seeds(plan):
    rows = plan(methods=("prune_distill",), seeds=(5, 6))
    assert names(rows) == [
        "cifar10-resnet56-baseline-seed5",
        "cifar10-resnet20-prune_distill-HT0.7-from-resnet56-seed5",
        "cifar10-resnet20-prune_distill-HT0.7-from-resnet56-seed6",
    ]
    assert all(row.needs == (rows[0].folder,) for row in rows[1:])
    settings = rows[2].settings()
    assert settings.teacher == str(rows[0].folder / "checkpoint.resnet56.pth.tar")
    assert (settings.arch, settings.student, settings.recipe, settings.epochs) == (
        "resnet56",
        "resnet20",
        "prune_distill",
        250,
    )
    # A network of the plan that teaches another has one run for both purposes.
    assert len(plan(nets=("resnet56", "resnet20"), methods=("baseline", "distill"), teacher_net="resnet56")) == 4


def test_a_given_teacher_is_used(plan, teacher):
    (row,) = plan(methods=("prune_distill",), teacher=str(teacher))
    assert row.needs == () and (row.settings().arch, row.settings().teacher) == ("resnet8", str(teacher))


def test_a_network_without_a_usual_teacher_is_named(plan):
    with pytest.raises(UserError, match="no usual teacher for resnet110; name one with --teacher_net"):
        plan(nets=("resnet110",), methods=("distill",))


def test_controls_differ_in_what_they_control_only(plan):
    rows = {row.method: row for row in plan(methods=list(METHODS), seeds=(1,))}
    prune = vars(rows["prune"].settings())
    for method, difference in (
        ("prune_per_epoch", {"threshold_every": "epoch"}),
        ("prune_released", {"heavy_ball": "released"}),
        ("prune_no_regrow", {"no_regrow": True}),
        ("prune_fixed_batch", {"k": None}),
    ):
        other = vars(rows[method].settings())
        assert {n: v for n, v in other.items() if v != prune[n] and n != "save_path"} == difference
    scratch, cost = rows["scratch_epochs"], rows["scratch_cost"]
    assert scratch.needs == cost.needs == (rows["prune"].folder,)
    settings = scratch.settings()
    assert settings.widths_of == str(rows["prune"].folder / "small.resnet20.pth.tar")
    assert (settings.recipe, settings.HTrate, settings.v, settings.epochs) == ("baseline", 1.0, 0, 200)
    assert (settings.batch_size, settings.k) == (prune["batch_size"], prune["k"])


def test_a_shortened_table_shares_one_schedule(plan):
    rows = plan("--epochs", "10", "--fit_schedule", methods=[m for m in METHODS if m != "scratch_cost"])
    assert {tuple(row.settings().schedule) for row in rows} == {(1, 3, 6, 8)}
    assert {row.settings().epochs for row in rows} == {10} and all("10-epochs" in row.name for row in rows)
    full = {row.method: row.settings().schedule for row in plan(methods=("prune", "prune_distill"))}
    assert full["prune_distill"] == [1, 60, 120, 160, 200] and full["prune"] == [1, 60, 120, 160]


def test_flags_go_to_the_rows_they_concern(plan):
    flags = ("--k", "0.1", "--batch_size", "32", "--loss", "L1", "--decay", "0.001")
    rows = {
        row.method: row.settings()
        for row in plan(*flags, methods=("baseline", "prune", "distill", "prune_fixed_batch"))
    }
    assert {method: settings.k for method, settings in rows.items() if settings.k is not None} == {"prune": 0.1}
    assert {method for method, settings in rows.items() if settings.loss == "L1"} == {"distill"}
    assert all((settings.decay, settings.batch_size) == (0.001, 32) for settings in rows.values())


def test_equal_cost_takes_its_epochs_from_the_finished_run(plan):
    row = plan("--epochs", "10", "--fit_schedule", methods=("scratch_cost",))[1]
    with pytest.raises(UserError, match="is damaged"):
        row.command()
    folder = row.needs[0]
    folder.mkdir(parents=True)
    committed = json.loads((Path(script.__file__).parent / "results/cpu-10-epochs/prune/results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**committed, "small": {"error": "too different"}}))
    with pytest.raises(UserError, match="has no small network: too different"):
        row.command()
    (folder / "results.json").write_text(json.dumps(committed))
    (folder / "small.resnet20.pth.tar").write_bytes(b"")
    settings = script.parse_args([f for f in row.command() if f not in ("--resume", "auto")])
    # 40,551,040 / 21,420,768 of 10 epochs.
    assert (settings.epochs, settings.schedule) == (19, [1, 6, 11, 15])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--arch resnet56", "the table sets --arch itself"),
        ("--prune-rate 0.3", "the table sets --prune_rate itself"),
        ("--nets resnet21", "unknown network 'resnet21'"),
        ("--rates 1.2", "share of filters REMOVED"),
        ("--methods magic", "invalid choice"),
        ("--jobs 0", "whole number >= 1"),
        ("--teacher x --teacher_net resnet56", "give one of them"),
        ("--decay -1", "number >= 0"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, monkeypatch, flags, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=reason):
        table.main(["--dataset", "synthetic", *flags.split()])
    assert not list(tmp_path.iterdir())


def test_rows_run_once_and_done_ones_are_skipped(plan, go):
    rows = plan(methods=("baseline", "prune", "prune_distill"))
    running, lines = go(rows)
    assert len(running.done) == 4 and not running.failed and sum("begun" in line for line in lines) == 4
    assert (rows[0].folder / "began").read_text() == "3"
    (rows[1].folder / "results.json").unlink()
    running, lines = go(rows)
    assert len(running.done) == 4 and [line for line in lines if "begun" in line] == [f"begun: {rows[1].name}"]


def test_a_failing_row_is_reported_and_the_rest_goes_on(plan, go, monkeypatch):
    monkeypatch.setenv("FAIL", "resnet56")
    rows = plan(methods=("prune_distill", "baseline"))
    running, _ = go(rows)
    failed = {path.name: why for path, why in running.failed.items()}
    assert "status 1: error: it failed as it was told to" in failed["cifar10-resnet56-baseline-seed1"]
    assert "needs cifar10-resnet56-baseline-seed1, which failed" in failed[rows[1].name]
    assert running.done == {rows[2].folder}


def test_a_run_with_other_settings_is_not_taken_for_the_row(plan, go):
    (row,) = plan("--epochs", "5", methods=("baseline",))
    go([row])
    results = json.loads((row.folder / "results.json").read_text())
    for settings in (dict(decay=0.1), dict(data_path="/elsewhere"), dict(epochs=4)):
        changed = {**results, "settings": {**results["settings"], **settings}}
        (row.folder / "results.json").write_text(json.dumps(changed))
        running, _ = go([row])
        assert f"holds a run with {next(iter(settings))}" in running.failed[row.folder]
    (row.folder / "results.json").write_text("{")
    assert state(row) == ("begun", "results.json is damaged")


def test_jobs_run_side_by_side(plan, go, monkeypatch):
    monkeypatch.setenv("TOGETHER", "1")
    begin = time.monotonic()
    running, lines = go(plan(), jobs=2)
    assert len(running.done) == 2 and time.monotonic() - begin < 25
    assert [line.split(":")[0] for line in lines] == ["begun", "begun", "done", "done"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_the_children_and_the_command_goes_on_later(plan, go, monkeypatch, number):
    rows = plan(methods=("baseline", "prune", "prune_released"))
    monkeypatch.setenv("SLEEP", "prune")
    before = signal.getsignal(number)

    def interrupt():
        end = time.monotonic() + 30
        while not (rows[1].folder / "began").exists() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        go(rows)
    thread.join()
    assert signal.getsignal(number) is before
    assert (rows[1].folder / "interrupted").exists() and not rows[2].folder.exists()
    monkeypatch.delenv("SLEEP")
    running, lines = go(rows)
    assert len(running.done) == 3 and lines[0].startswith("done already: cifar10-resnet20-baseline")


def test_a_child_that_does_not_stop_is_killed(plan, fake, monkeypatch):
    monkeypatch.setenv("SLEEP", "baseline")
    monkeypatch.setenv("DEAF", "1")
    monkeypatch.setattr(side_by_side, "STOP_SECONDS", 0.3)
    (row,) = plan(methods=("baseline",))
    seen = []

    def tick(running):
        if (row.folder / "began").exists():
            seen.extend(running.children)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        SideBySide([row], 1, 1, lambda line: None, tick, train=fake).run()
    assert seen[0].process.returncode == -signal.SIGKILL


def test_the_dry_run_prints_the_plan_with_hours_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hours, "calibrate", lambda row, threads: Speed(100.0, "calibrated"))
    flags = "--dataset synthetic --epochs 36 --seeds 1 2 --methods baseline --nets resnet44 --jobs 2 --dry_run"
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    table.main(flags.split())
    out = capsys.readouterr().out
    # 36 epochs of 10,000 images and a third of 2,000 more at 100 images per second: 64 minutes.
    assert out.count("36 epochs") == 2 and out.count("01:04:00  calibrated") == 2
    assert "left about 2.1 hours of runs, 1.1 hours (01:04:00) with 2 at a time" in out
    assert not list(tmp_path.iterdir())


def test_a_calibration_measures_the_rows_own_kind(plan):
    hours.CALIBRATION_SECONDS, before = 0.01, hours.CALIBRATION_SECONDS
    try:
        for row in plan("--batch_size", "8", methods=("prune",)):
            assert hours.calibrate(row, 1).images_per_s > 1
    finally:
        hours.CALIBRATION_SECONDS = before


def test_finished_runs_of_a_like_machine_give_the_speed(tmp_path, plan):
    (row,) = plan(methods=("prune",))
    folder = tmp_path / "runs/a"
    folder.mkdir(parents=True)
    committed = Path(script.__file__).parent / "results/cpu-10-epochs/prune"
    results = json.loads((committed / "results.json").read_text())
    (folder / "metrics.csv").write_text("epoch,images_per_s\n0,100\n1,300\n2,200\n")
    speeds = hours.Speeds([tmp_path / "runs"], 2)
    machine = hours.describe_machine(hours.choose_device(None))
    for threads, expected in ((2, {row: 200.0}), (1, {})):
        (folder / "results.json").write_text(json.dumps({**results, "machine": {**machine, "threads": threads}}))
        found = hours.measured_speeds([tmp_path / "runs"], hours.choose_device(None), 2)
        assert [speed.images_per_s for speed in found.values()] == list(expected.values())
        if found:
            assert speeds.of(row).images_per_s == 200.0 and "measured in" in speeds.of(row).source


def test_a_small_table_on_images_fills_and_is_compared(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(hours, "calibrate", lambda row, threads: Speed(100.0, "calibrated"))
    flags = [str(tree), "--epochs", "1", "--batch_size", "16", "--seeds", "1", "--methods", "prune", "--jobs", "2"]
    table.main([*flags, "--progress", "1"])
    out = capsys.readouterr().out
    assert "1 of 1 runs are done" in out and "time left about 00:00:0" in out and "OWN AHSG-HT" in out
    assert "60 training and 20 test images; 1 epoch instead of 200" in out
    (run,), _ = find_runs([tmp_path / "runs/table"])
    assert run.results["machine"]["threads"] == 1
    table.main(flags)
    assert capsys.readouterr().out.count("done already") == 1
