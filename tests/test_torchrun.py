"""The scripts as torchrun starts them: two processes, of which one is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import imagenet_resnet_test as script

ROOT = Path(__file__).resolve().parent.parent
NAME = "checkpoint.resnet18.pth.tar"


def torchrun(*words, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=cwd, **pipes)


def process_of_rank(rank, launcher):
    """The process that a torchrun started with this rank."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            parent = (environment.parent / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == launcher.pid and f"\0RANK={rank}\0" in environment.read_text():
                return int(environment.parent.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found through /proc")
def test_a_killed_rank_ends_the_run_and_one_process_goes_on(jpegs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["-a", "resnet18", "-b", "9", "--image_size", "32", "--lr", "0.002", "-j", "0", "--epochs", "500"]
    run = torchrun(ROOT / "imagenet_resnet_test.py", jpegs, *flags, "--save_dir", "out", cwd=tmp_path)
    try:
        until = time.monotonic() + 240
        while not Path("out", NAME).is_file():
            assert run.poll() is None and time.monotonic() < until, run.communicate()[0]
            time.sleep(0.1)
        os.kill(process_of_rank(1, run), signal.SIGKILL)
        killed = time.monotonic()
        printed, _ = run.communicate(timeout=60)
        assert time.monotonic() - killed < 60
    finally:
        run.kill()
    assert run.returncode != 0
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 0: of 2 processes one has died or does not answer (")
    assert f"with any number of processes continue with --resume out/{NAME}" in line
    log = Path("out/log_seed_1.txt").read_text()
    assert "processes: 2, 2 on this machine, gloo" in log
    assert log.count("[Epoch=000/500]") == 1, "ranks other than the first write nothing"

    saved = torch.load(f"out/{NAME}", weights_only=True)
    assert len(saved["random_states_of_ranks"]) == 2 and saved["test_hits"] is None  # each rank has its share only
    done = saved["epoch"]
    assert script.main(["--resume", f"out/{NAME}", "--epochs", str(done + 1), "-j", "0"]) == Path("out")
    assert torch.load(f"out/{NAME}", weights_only=True)["epoch"] == done + 1
    assert "was written by 2 processes, this run has 1" in Path("out/log_seed_1.txt").read_text()
    assert json.loads(Path("out/results.json").read_text())["arithmetic"] == "float32, 2 processes; float32"
    rows = Path("out/metrics.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows[1:]] == [str(epoch) for epoch in range(done + 1)]
