"""run_cifar.sh table: the plan, what is skipped, what fails, several at a time, and interruption."""

import os
import shlex
import signal
import sys
import threading
import time

import pytest

from utils.base.errors import UserError
from utils.base.signals import Stopped, stop
from utils.tables import recipe, side_by_side
from utils.tables.grid import plan_rows, table_parser
from utils.train.command_line import parse
from utils.train.options import command_words

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
    """go(rows) runs them with the fake script; ({row: why it failed}, what was printed)."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(side_by_side, "POLL_SECONDS", 0.01)

    def run(rows, jobs=2):
        failed = side_by_side.run_rows(rows, jobs, train=(sys.executable, str(tmp_path / "fake.py")))
        return {folder.name: why for folder, why in failed.items()}, capsys.readouterr().out

    return run


@pytest.fixture
def plan(tmp_path):
    """plan("FLAGS", "method", ...) are the rows of that table, of one seed where the flags name none."""

    def make(flags, *methods):
        words = [*shlex.split(f"/data --seeds 1 {flags}"), "--save_path", str(tmp_path / "t"), "--methods", *methods]
        given = parse(table_parser(), words)
        return plan_rows({name: value for name, value in given.items() if name not in ("jobs", "dry_run")})

    return make


def names(rows):
    return [row.folder.name.removeprefix("cifar10-") for row in rows]


def test_the_plan_is_nets_by_rates_by_methods_by_seeds(plan):
    rows = plan("--seeds 1 2 --nets resnet20 resnet32 --rates 0.3 0.4", "baseline", "prune --k none")
    assert len(rows) == len(set(names(rows))) == 2 * 2 * (1 + 2)
    assert names(rows)[:2] == ["resnet20-baseline-seed1", "resnet20-prune-k-none-HT0.7-seed1"]
    words = "/data --k none --recipe prune --arch resnet20 --manualSeed 1 --HTrate 0.6"
    assert shlex.join(command_words(rows[2].options)) == words


def test_one_teacher_is_trained_first_for_all_seeds_or_given(plan):
    rows = plan("--seeds 5 6", "prune_distill")
    assert names(rows) == ["resnet56-baseline-seed5", *(f"resnet20-prune_distill-HT0.7-seed{n}" for n in (5, 6))]
    assert [row.needs for row in rows] == [None, rows[0].folder, rows[0].folder]
    assert rows[2].options["teacher"] == str(rows[0].folder / "checkpoint.resnet56.pth.tar")
    (row,) = plan("--teacher some.pth.tar", "prune_distill")
    assert row.options["teacher"] == "some.pth.tar" and row.options["arch"] == "resnet20" and row.needs is None
    (row,) = plan("--teacher public.th --teacher_net resnet110", "distill")
    assert row.options["arch"] == "resnet110" and row.options["arch_small"] == "resnet20"


def test_flags_go_to_the_rows_they_concern_and_a_shortened_table_shares_one_schedule(plan):
    flags = "--epochs 10 --k 0.1 --kd logits:KL:1 --macs_cut 0.5 --decay 0.001 --rates 0.3 0.4"
    rows = plan(flags, "baseline", "prune_gradual", "prune_distill")
    having = [{name for name in ("k", "kd", "macs_cut", "HTrate", "decay") if name in row.options} for row in rows]
    gradual, taught = {"k", "macs_cut", "decay"}, {"k", "kd", "HTrate", "decay"}
    assert having == [{"decay"}, gradual, {"decay"}, taught, taught]
    lengths = [(row.options["epochs"], row.options["schedule"], row.options["gammas"]) for row in rows]
    assert lengths == [(10, [1, 3, 6, 8], [10.0, 0.2, 0.2, 0.2])] * 5 and "10-epochs" in names(rows)[0]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--prune-rate 0.3", "the table sets --prune_rate itself"),
        ("--nets resnet21", "unknown network 'resnet21'"),
        ("--rates 1.2", "REMOVED"),
        ("--methods magic", "unknown method 'magic'"),
        ("--methods ''", "unknown method ''"),
        ('--methods "prune \'"', "unknown method 'prune ''"),
        ("--methods 'prune --kay 3'", "--kay"),
        ("--methods 'prune --HTrate 0.5'", "method 'prune --HTrate 0.5': the table sets --HTrate itself; use --nets"),
        ("--methods 'prune --evaluate'", "the table sets --evaluate itself"),
        ("--methods 'distill --teacher t.th'", "the table sets --teacher itself; give it outside of the quotes"),
        ("--jobs 0", "--jobs: must be a whole number >= 1, got '0'"),
        ("--epochs five", "--epochs: must be"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, monkeypatch, flags, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=reason):
        recipe.main(["table", "--dataset", "synthetic", *shlex.split(flags)])
    assert not list(tmp_path.iterdir())


def test_rows_run_once_and_done_ones_are_skipped(plan, go):
    rows = plan("", "baseline", "prune", "prune_distill")
    failed, out = go(rows)
    assert not failed and "0 of 4 runs are done" in out and out.count("begins") == 4
    (rows[1].folder / "results.json").unlink()
    other = (rows[0].folder / "results.json").read_text().replace("test.py", "test.py --decay 0.1")
    (rows[0].folder / "results.json").write_text(other)
    _, out = go(rows)
    assert "2 of 4 runs are done" in out and out.count("begins") == 2


def test_a_failing_row_is_reported_and_the_rest_goes_on(plan, go, monkeypatch):
    monkeypatch.setenv("FAIL", "resnet56")
    teacher, taught, plain = rows = plan("", "prune_distill", "baseline")
    failed, _ = go(rows)
    assert failed[teacher.folder.name].startswith("status 1, see")
    assert "it failed as it was told to" in (teacher.folder / "console.txt").read_text()
    assert failed[taught.folder.name] == f"needs {teacher.folder.name}, which failed" and plain.is_done()


def test_jobs_run_side_by_side_each_with_its_own_gpu_and_threads(plan, go, monkeypatch):
    for name, value in (("TOGETHER", "2"), ("OMP_NUM_THREADS", "6"), ("CUDA_VISIBLE_DEVICES", "4,7")):
        monkeypatch.setenv(name, value)
    rows, begin = plan("--rates 0.3 0.4 0.5", "baseline", "prune"), time.monotonic()
    assert not go(rows, jobs=2)[0] and time.monotonic() - begin < 25
    assert {(row.folder / "began").read_text() for row in rows} == {"3 4", "3 7"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_the_children_and_the_command_continues(plan, go, monkeypatch, number):
    first, second, third = rows = plan("--rates 0.3 0.4", "baseline", "prune")
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
        failed, out = go(rows)
    assert not failed and "1 of 3 runs are done already" in out


def test_a_small_table_on_images_fills_and_is_compared(tree, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(f"table {tree} --epochs 1 --batch_size 16 --ngpu 0 --seeds 1 --methods prune --jobs 2")
    recipe.main([*words, "--dry_run"])
    assert "--recipe prune" in capfd.readouterr().out and not list(tmp_path.iterdir())
    recipe.main(words)
    out = capfd.readouterr().out
    assert "AHSG-HT 30 %" in out and "**60 training, 20 test images**" in out
    recipe.main(words)
    assert "1 of 1 runs are done already" in capfd.readouterr().out
