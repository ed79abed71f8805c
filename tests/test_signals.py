"""When a signal stops what, which command continues, and run folders. Runs are stopped in test_crashes.py."""

import multiprocessing
import os
import signal
import sys

import pytest

from utils.base import signals
from utils.base.errors import UserError, run_main
from utils.base.signals import Stopped, StopRequest
from utils.train import distributed
from utils.train.resume import resume_command
from utils.train.run_folder import LOCK_NAME, RunFolder, check_free, lock_folder, new_run_path


def test_a_signal_stops_at_once_or_is_deferred():
    stop = StopRequest()
    with pytest.raises(Stopped), stop.handled():
        signal.raise_signal(signal.SIGTERM)
    with stop.handled(), stop.deferred():
        assert stop.pending() == 0
        signal.raise_signal(signal.SIGINT)
        assert stop.pending() == signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_same_request_twice_is_one_and_a_second_one_ends_the_process(monkeypatch):
    stop, ended = StopRequest(), []
    monkeypatch.setattr(os, "_exit", ended.append)
    with stop.handled(), stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert not ended
        monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", -1.0)
        signal.raise_signal(signal.SIGTERM)
    assert ended == [143]


def test_the_largest_signal_of_all_ranks_counts_when_it_is_known():
    stop, late = StopRequest(), [0, 0, 15, 0]
    stop.reduce = lambda own: late.pop(0)
    assert [stop.pending() for _ in range(4)] == [0, 0, 15, 15]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_status_and_last_words(signum, status, capsys):
    def main():
        raise Stopped(signum, "'x' holds 1 of 2 epochs", "python script.py --resume x")

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == status
    assert "'x' holds 1 of 2 epochs; this continues the run:\npython script.py --resume x" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--resume", "old file"], ["--resume=old"], []])
def test_the_command_that_continues_names_the_new_file_once(given):
    """Outside of an activated environment `python` and `torchrun` may be missing."""
    argv = ["data dir", *given, "--epochs", "3"]
    line = resume_command("s.py", argv, "out/a b.tar", ["torchrun", "--nproc_per_node", "2"])
    start = f"{sys.executable} -m torch.distributed.run --nproc_per_node 2"
    assert line == f"{start} s.py 'data dir' --epochs 3 --resume 'out/a b.tar'"
    assert resume_command("s.py", argv, "a", ["python"]) == f"{sys.executable} s.py 'data dir' --epochs 3 --resume a"


def test_on_several_machines_the_command_names_where_they_meet(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "local_world_size", lambda: 2)
    monkeypatch.setenv("MASTER_ADDR", "first")
    words = "torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint first:29500 --nproc_per_node 2"
    assert " ".join(distributed.launcher()) == words


def hold(folder, pipe):
    held = lock_folder(folder)
    pipe.send(os.getpid())
    pipe.recv()
    held.close()


def test_a_lock_dies_with_its_process_however_that_ended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, (ours, theirs) = tmp_path / "runs/name", multiprocessing.Pipe()
    folder.mkdir(parents=True)
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(folder, theirs))
    holder.start()
    assert ours.recv() == holder.pid
    for lock in (check_free, lock_folder):
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on"):
            lock(folder)
    assert new_run_path(None, "name").name == "name-2"
    holder.kill()
    holder.join()
    assert (folder / LOCK_NAME).exists()
    check_free(folder)
    assert new_run_path(None, "name").name == "name"
    lock_folder(folder).close()


def test_only_temporary_files_of_our_own_are_removed_from_a_folder(tmp_path):
    own, others = ".checkpoint.net.pth.tar.ahsg-ht.tmp", [".notes.tmp", ".#draft.txt.tmp", "x.tmp"]
    for name in (own, *others):
        (tmp_path / name).write_text("content")
    RunFolder(tmp_path, 1).close()
    assert {path.name for path in tmp_path.iterdir()} == {*others, "log_seed_1.txt", LOCK_NAME}


def test_of_two_runs_that_choose_one_folder_at_one_time_the_second_stops(tmp_path):
    RunFolder(tmp_path, 1).close()
    file = tmp_path / "checkpoint.net.pth.tar"
    file.write_text("of the first")
    for resumed in (None, (file, file.stat().st_mtime_ns - 1)):
        with pytest.raises(UserError, match="has just begun"):
            RunFolder(tmp_path, 1, resumed=resumed)
    RunFolder(tmp_path, 1, resumed=(file, file.stat().st_mtime_ns)).close()
