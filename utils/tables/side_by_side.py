"""Runs of the training script as processes: one after another that it needs, several at a time, each on its own GPU."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.base.errors import UserError
from utils.base.signals import Stopped, stop
from utils.tables.runs import ROOT

TRAIN = (sys.executable, str(ROOT / "cifar10_resnet_test.py"))
CONSOLE = "console.txt"
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Row:
    """A run of a table."""

    folder: Path
    flags: tuple[str, ...]  # less --save_path and --resume
    needs: tuple[Path, ...] = ()  # folders of runs that must be done before
    more_flags: Callable[[], Sequence[str]] = tuple  # flags that depend on their results

    def command(self) -> list[str]:
        return [*self.flags, *self.more_flags(), "--save_path", str(self.folder), "--resume", "auto"]

    def is_done(self) -> bool:
        """Whether the folder has the finished results of this very command."""
        try:
            results = json.loads((self.folder / "results.json").read_text())
            return results["finished"] is True and shlex.split(results["command"])[2:] == self.command()
        except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError):
            return False


def run_rows(rows: list[Row], jobs: int = 1, train: Sequence[str] = TRAIN) -> dict[Path, str]:
    """Runs every row that is not done, at most `jobs` at a time; after a failure what does not need that row goes on.

    Returns:
        {folder: why} of the rows that failed.

    Raises:
        Stopped: on Ctrl-C or SIGTERM, when every run has stopped.
    """
    waiting, ended = list(rows), {}  # folder: why it failed, "" where it did not
    running: dict[int, tuple[Row, subprocess.Popen]] = {}  # by slot
    with stop.deferred():
        try:
            while (waiting or running) and not stop.pending():
                for slot in [slot for slot, (_, process) in running.items() if process.poll() is not None]:
                    row, process = running.pop(slot)
                    ended[row.folder] = (
                        f"status {process.returncode}{last_line(row.folder / CONSOLE)}" if process.returncode else ""
                    )
                    say(f"ended: {row.folder} {ended[row.folder]}")
                for row in [row for row in waiting if ended.keys() >= set(row.needs)]:
                    slot = min(set(range(jobs)) - running.keys(), default=None)
                    broken = [folder.name for folder in row.needs if ended[folder]]
                    if broken or row.is_done():
                        ended[row.folder] = f"needs {broken[0]}, which failed" if broken else ""
                        say(f"{ended[row.folder] or 'done already'}: {row.folder}")
                    elif slot is None:
                        continue
                    else:
                        try:
                            running[slot] = row, start(row, slot, jobs, train)
                        except UserError as error:
                            ended[row.folder] = str(error)
                    waiting.remove(row)
                time.sleep(POLL_SECONDS if running else 0)
        finally:
            for _, process in running.values():
                process.send_signal(signal.SIGINT)  # it finishes its mini-batch and writes a checkpoint
            for _, process in running.values():
                process.wait()
    if stop.pending():
        done = list(ended.values()).count("")
        raise Stopped(stop.signum, f"{done} of {len(rows)} runs are done, repeat the command to continue")
    return {folder: why for folder, why in ended.items() if why}


def start(row: Row, slot: int, jobs: int, train: Sequence[str]) -> subprocess.Popen:
    """Starts a row; of several each gets a share of the CPU's threads, the GPU of its slot and an output file."""
    say(f"begins: python {shlex.join([Path(train[1]).name, *row.command()])}")
    row.folder.mkdir(parents=True, exist_ok=True)
    if jobs == 1:
        return subprocess.Popen([*train, *row.command()])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or cores) // jobs
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads))}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [str(gpu) for gpu in range(torch.cuda.device_count())]
    environment |= {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
    with open(row.folder / CONSOLE, "ab") as out:
        return subprocess.Popen(
            [*train, *row.command()], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment
        )


def last_line(file: Path) -> str:
    """What a run printed last, and where the rest is; "" where its output was shown."""
    lines = file.read_text(errors="replace").strip().splitlines() if file.is_file() else []
    return f": {lines[-1].strip()} (all of it in {file})" if lines else ""


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
