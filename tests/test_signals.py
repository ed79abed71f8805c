"""When a signal stops what, which command continues, and run folders. Runs are stopped in test_crashes.py."""

import os
import signal
import subprocess
import sys

import pytest

from utils.base import signals
from utils.base.errors import UserError, run_main
from utils.base.signals import Stopped, StopRequest
from utils.train import distributed
from utils.train.resume import resume_command
from utils.train.run_folder import RunFolder
from utils.train.run_lock import LOCK_NAME, RunLock, check_free


def test_at_once_or_when_asked():
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
def test_the_command_that_continues_names_the_new_file_once(given, monkeypatch):
    bin_folder = os.path.dirname(sys.executable)
    argv, torchrun = ["data dir", *given, "--epochs", "3"], ["torchrun", "--nproc_per_node", "2"]
    monkeypatch.setattr("shutil.which", lambda name: os.path.join(bin_folder, name))
    line = resume_command("s.py", argv, "out/a b.tar", torchrun)
    assert line == "torchrun --nproc_per_node 2 s.py 'data dir' --epochs 3 --resume 'out/a b.tar'"
    # Outside of an activated environment there is no torchrun.
    monkeypatch.setattr("shutil.which", lambda name: None)
    line = resume_command("s.py", argv, "a.tar", torchrun)
    assert line.startswith(f"{sys.executable} -m torch.distributed.run --nproc_per_node 2 s.py")


def test_on_several_machines_the_command_names_where_they_meet(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "local_world_size", lambda: 2)
    monkeypatch.setenv("MASTER_ADDR", "first")
    words = "torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint first:29500 --nproc_per_node 2"
    assert " ".join(distributed.launcher()) == words


def test_a_lock_dies_with_its_process_however_that_ended(tmp_path):
    code = "import sys, pathlib, utils.train.run_lock as run_lock\n"
    code += "lock = run_lock.RunLock(pathlib.Path(sys.argv[1])); print(1, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], **pipes) as holder:
        holder.stdout.readline()
        for lock in (check_free, RunLock):
            with pytest.raises(UserError, match=f"in use by process {holder.pid} on"):
                lock(tmp_path)
        holder.kill()
    assert (tmp_path / LOCK_NAME).exists()
    check_free(tmp_path)
    RunLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_only_temporary_files_of_our_own_are_removed_from_a_folder(tmp_path):
    own, others = ".checkpoint.net.pth.tar.ahsg-ht.tmp", [".notes.tmp", ".#draft.txt.tmp", "x.tmp"]
    for name in (own, *others):
        (tmp_path / name).write_text("content")
    RunFolder(tmp_path, 1).close()
    assert {path.name for path in tmp_path.iterdir()} == {*others, "log_seed_1.txt"}
