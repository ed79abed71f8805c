"""Runs of the training script as processes: one after another that it needs, several at a time, each on its own GPU."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.base.signals import Stopped, stop
from utils.tables.runs import ROOT
from utils.train.device import usable_cores
from utils.train.options import command_words

TRAIN = (sys.executable, str(ROOT / "cifar10_resnet_test.py"))
CONSOLE = "console.txt"
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Row:
    """A run of a table."""

    folder: Path
    options: dict  # of the training script, less save_path and resume
    needs: Path | None = None  # folder of a run that must be done before

    def command(self) -> list[str]:
        return command_words({**self.options, "save_path": self.folder, "resume": "auto"})

    def is_done(self) -> bool:
        """Whether the folder has the finished results of this very command."""
        try:
            results = json.loads((self.folder / "results.json").read_text())
            own = shlex.join([Path(TRAIN[1]).name, *self.command()])
            return results["finished"] is True and results["command"].endswith(own)
        except (OSError, ValueError, LookupError):
            return False


def run_rows(rows: list[Row], jobs: int = 1, train: Sequence[str] = TRAIN) -> dict[Path, str]:
    """Runs every row that is not done, at most `jobs` at a time; after a failure what does not need that row goes on.

    Returns:
        {folder: why} of the rows that failed.

    Raises:
        Stopped: on Ctrl-C or SIGTERM, when every run has stopped.
    """
    ended = {row.folder: "" for row in rows if row.is_done()}  # folder: why it failed, "" where it did not
    waiting = [row for row in rows if row.folder not in ended]
    print(f"{len(ended)} of {len(rows)} runs are done already", flush=True)
    running: dict[int, tuple[Row, subprocess.Popen]] = {}  # by slot
    with stop.deferred():
        try:
            while (waiting or running) and not stop.pending():
                for slot in [slot for slot, (_, process) in running.items() if process.poll() is not None]:
                    row, process = running.pop(slot)
                    where = f", see {row.folder / CONSOLE}" if jobs > 1 else ""
                    ended[row.folder] = f"status {process.returncode}{where}" if process.returncode else ""
                for row in [row for row in waiting if ended.get(row.needs)]:
                    waiting.remove(row)
                    ended[row.folder] = f"needs {row.needs.name}, which failed"
                ready = [row for row in waiting if row.needs is None or row.needs in ended]
                for slot, row in zip(sorted(set(range(jobs)) - running.keys()), ready, strict=False):
                    waiting.remove(row)
                    running[slot] = row, start(row, slot, jobs, train)
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
    print(
        f"[{time.strftime('%H:%M:%S')}] begins: python {shlex.join([Path(train[1]).name, *row.command()])}", flush=True
    )
    row.folder.mkdir(parents=True, exist_ok=True)
    if jobs == 1:
        return subprocess.Popen([*train, *row.command()])
    threads = int(os.environ.get("OMP_NUM_THREADS") or usable_cores()) // jobs
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads))}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [str(gpu) for gpu in range(torch.cuda.device_count())]
    environment |= {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
    with open(row.folder / CONSOLE, "ab") as out:
        command = [*train, *row.command()]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
