"""Runs that are killed and resumed, stopped by signals, locked out, and left running for long. More: crash_table.py."""

import os
import signal
import time

import pytest
from crash_lab import FLAGS, NAME, differences, resume_argv, run, start


@pytest.fixture(scope="module")
def plain(tree):
    return [tree, *FLAGS]


@pytest.fixture(scope="module")
def whole(plain, tmp_path_factory):
    """The save path of an uninterrupted run."""
    done = run(tmp_path_factory.mktemp("whole"), plain)
    assert done.statuses == [0], done.errors
    return done.folder / "out"


@pytest.mark.parametrize(
    ("point", "count", "more"),
    [
        ("step", 6, ["--workers", "2"]),
        ("evaluation", 3, []),
        ("link", 2, []),
        ("rename", 1, []),
        ("small network", 1, []),
    ],
)
def test_a_killed_run_ends_like_an_uninterrupted_one(plain, whole, tmp_path, point, count, more):
    assert run(tmp_path, [*plain, *more], point=point, count=count).statuses == [-signal.SIGKILL]
    resumed = run(tmp_path, [*plain, *more, "--resume", "auto"])
    assert resumed.statuses == [0], resumed.errors
    assert differences(tmp_path / "out", whole) == []


@pytest.mark.parametrize(
    ("signum", "point", "count"),
    [
        (signal.SIGTERM, "step", 5),
        (signal.SIGTERM, "step", 9),  # the last one of the run: only the test pass is left
        (signal.SIGINT, "test batch", 2),
        (signal.SIGTERM, "small network", 1),
    ],
)
def test_a_stopped_run_prints_how_to_continue(plain, whole, tmp_path, signum, point, count):
    stopped = run(tmp_path, plain, point=point, count=count, signum=signum)
    assert stopped.statuses == [128 + signum]
    assert "Traceback" not in stopped.errors and "out/checkpoint" in stopped.errors
    resumed = run(tmp_path, resume_argv(stopped.errors))
    assert resumed.statuses == [0], resumed.errors
    assert differences(tmp_path / "out", whole) == []


def test_a_signal_to_one_rank_stops_all_after_the_same_mini_batch(plain, tmp_path):
    whole = run(tmp_path / "whole", plain, ranks=2)
    assert whole.statuses == [0, 0], whole.errors
    stopped = run(tmp_path / "part", plain, ranks=2, point="step", count=5, signum=signal.SIGTERM)
    assert stopped.statuses == [143, 143], stopped.errors
    resumed = run(tmp_path / "part", [*plain, "--resume", "auto"], ranks=2)
    assert resumed.statuses == [0, 0], resumed.errors
    assert differences(tmp_path / "part/out", tmp_path / "whole/out") == []


def test_a_mistake_that_shows_when_the_processes_have_met_is_printed_once(tmp_path):
    done = run(tmp_path, ["nowhere", *FLAGS, "--dataset", "folder"], ranks=2)
    assert done.statuses == [2, 2] and (tmp_path / "stderr1").read_text() == ""
    assert done.errors.count("\n") == 1 and "nowhere" in done.errors and done.errors.startswith("error: ")


def test_before_there_is_anything_to_save_a_signal_ends_the_run_at_once(plain, tmp_path):
    stopped = run(tmp_path, plain, point="log line", count=2, signum=signal.SIGTERM)
    assert stopped.statuses == [143]
    assert "nothing had been trained" in stopped.errors and "Traceback" not in stopped.errors


def test_a_second_run_is_locked_out_until_the_first_is_gone(plain, whole, tmp_path):
    first = start(tmp_path, [*plain, "--workers", "2"], point="step", count=5, signum=signal.SIGSTOP)
    while not (tmp_path / "out" / NAME).exists():
        assert first.processes[0].is_alive()
        time.sleep(0.02)
    try:
        second = run(tmp_path / "elsewhere", [*plain[:-1], tmp_path / "out", "--resume", "auto"])
    finally:
        first.processes[0].kill()
    assert second.statuses == [2]
    assert second.errors.count("\n") == 1 and f"in use by process {first.processes[0].pid} on" in second.errors
    assert first.statuses == [-signal.SIGKILL]
    # Its worker processes still live, for seconds.
    assert run(tmp_path, [*plain, "--resume", "auto"]).statuses == [0]
    assert differences(tmp_path / "out", whole) == []


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="measured through /proc")
def test_thirty_epochs_take_no_more_memory_files_or_threads_than_five(plain, tmp_path):
    flags = [*plain, "--epochs", "30", "--print_freq", "100", "--HTrate", "1", "--v", "0", "--workers", "2"]
    done = run(tmp_path, flags)
    assert done.statuses == [0], done.errors
    lines = [[int(n) for n in line.split()] for line in (tmp_path / "measured").read_text().splitlines()]
    assert len(lines) == 31
    assert all(last <= 1.02 * fifth for fifth, last in zip(lines[5], lines[-1], strict=True))
