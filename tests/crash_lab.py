"""Runs that are killed: the CIFAR script in processes forked from one that has imported torch, so that they start fast.

A run can send itself a signal at an exact point (the fifth step, the third fsync, ...) or be killed from outside after
some time; what it was doing is read from a file that it keeps.
"""

import importlib
import json
import multiprocessing
import os
import re
import shlex
import signal
import socket
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tiny import NETWORKS

NAME = "checkpoint.resnet8_dropout.pth.tar"
FLAGS = ["--arch", "resnet8_dropout", "--batch_size", "16", "--k", "24", "--epochs", "3", "--print_freq", "1"]
FLAGS += ["--save_every", "2", "--save_path", "out"]
# What a run may be doing, and the function that does it.
POINTS = {
    "step": ("utils.train.trainer", "train_step"),
    "evaluation": ("utils.train.trainer", "evaluate"),
    "test batch": ("utils.train.trainer", "Trainer._stop_while_testing"),
    "save": ("utils.base.checkpoint", "write"),
    "fsync": ("os", "fsync"),
    "link": ("os", "link"),
    "rename": ("os", "replace"),
    "small network": ("utils.train.report", "make_small"),
    "curves": ("utils.train.report", "draw_curves"),
    "log line": ("utils.train.run_folder", "append_line"),
}


# Imported once, not in every run: the optimizer's base class imports the compiler.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "matplotlib.pyplot", "cifar10_resnet_test"])


@dataclass
class Run:
    """A run: the processes of its ranks, and its working folder, in which `out` is the save path."""

    processes: list[BaseProcess]
    folder: Path

    @property
    def statuses(self) -> list[int]:
        """Exit statuses, negative for a signal; waits for the end."""
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    @property
    def errors(self) -> str:
        return (self.folder / "stderr0").read_text()

    def doing(self) -> str:
        """What the first process was doing last."""
        file = self.folder / "doing"
        return (file.read_text().split("\0")[0] if file.exists() else "") or "start-up"


def start(folder: Path, argv: list, *, ranks=1, point=None, count=0, signum=signal.SIGKILL) -> Run:
    """Starts the script in `folder`; with a `point` rank 0 sends itself the signal there, at the count-th time."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "doing").unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    processes = []
    for rank in range(ranks):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = {name: str(value) for name, value in {**numbers, **place}.items()} if ranks > 1 else {}
        settings = (folder, [str(word) for word in argv], rank, environment, point, count, signum)
        processes.append(FORKS.Process(target=_run_script, args=settings))
        processes[-1].start()
    return Run(processes, folder)


def run(folder: Path, argv: list, **options) -> Run:
    started = start(folder, argv, **options)
    assert started.statuses
    return started


def same(a, b) -> bool:
    """Equality to the last bit of nested checkpoints, wall-clock times and settings (which name --resume) aside."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        skipped = ("images_per_s", "seconds", "settings", "pieces")
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in skipped)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def figures(folder: Path) -> dict[str, object]:
    """What log, metrics.csv and results.json contain, wall-clock times aside; a resumed run logs some lines twice."""
    log = (folder / "log_seed_1.txt").read_text(errors="replace").splitlines()
    results = json.loads((folder / "results.json").read_text())
    keys = ("finished", "last_epoch_accuracy", "best_epoch_accuracy", "epochs_done", "filters")
    times = r"\[\d{4}-.*?\]|\[Need.*?\]|Time [\d.]+"
    return {
        "log": {re.sub(times, "", line) for line in log if line.startswith(("==>>", "  Epoch:", "  **"))},
        "metrics.csv": [line.split(",")[:6] for line in (folder / "metrics.csv").read_text().splitlines()],
        "results.json": {key: results[key] for key in keys},
    }


def differences(folder: Path, whole: Path) -> list[str]:
    """What of a resumed run (its save path) differs from the uninterrupted one."""
    names = (NAME, NAME.replace("checkpoint", "best"))
    found = [n for n in names if not same(*(torch.load(path / n, weights_only=True) for path in (folder, whole)))]
    ours, theirs = figures(folder), figures(whole)
    found += [name for name in ours if ours[name] != theirs[name]]
    return found + [path.name for path in folder.glob(".*.tmp")]


def resume_argv(text: str) -> list[str] | None:
    """The arguments of the command line that a stopped run printed, None where there is none."""
    if "this continues the run:" not in text:
        return None
    words = shlex.split(text.split("this continues the run:\n")[1].splitlines()[0])
    return words[next(i for i, word in enumerate(words) if word.endswith("cifar10_resnet_test.py")) + 1 :]


def _run_script(folder: Path, argv: list[str], rank: int, environment: dict, point, count, signum) -> None:
    """What a process does: the script, as if it were started from a command line."""
    import cifar10_resnet_test as script
    import models.registry
    from utils.base.errors import run_main

    torch.set_num_threads(1)
    # The run's own workers start as they would from a command line: the first of the methods is the system's default.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    models.registry.REGISTRY.update(NETWORKS)
    os.environ.update(environment)
    os.chdir(folder)
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{stream}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["cifar10_resnet_test.py", *argv]
    if rank == 0:
        _watch(point, count, signum)
        _measure()
    run_main(script.main)


def _measure() -> None:
    """Writes resident memory (bytes), open files and threads of this process to `measured`, a line per epoch."""
    from utils.train.run_folder import RunFolder

    real = RunFolder.write_metrics

    def write_metrics(run, history):
        real(run, history)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
        with open("measured", "a") as file:
            file.write(f"{pages * os.sysconf('SC_PAGE_SIZE')} {files} {threads}\n")

    if os.path.isdir("/proc/self/task"):
        RunFolder.write_metrics = write_metrics


def _watch(point: str | None, count: int, signum: int) -> None:
    """Keeps the file `doing` up to date, and sends the process a signal at a point."""
    doing = os.open("doing", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    stack, seen = ["start-up"], dict.fromkeys(POINTS, 0)

    def note() -> None:
        os.pwrite(doing, stack[-1].encode() + b"\0" * 30, 0)

    def watch(name: str, owner, attribute: str) -> None:
        real = getattr(owner, attribute)

        def watched(*args, **kwargs):
            stack.append(name)
            note()
            seen[name] += 1
            if (name, seen[name]) == (point, count):
                os.kill(os.getpid(), signum)
            try:
                return real(*args, **kwargs)
            finally:
                stack.pop()
                stack[0] = "between steps"
                note()

        setattr(owner, attribute, watched)

    for name, (module, attribute) in POINTS.items():
        *path, attribute = attribute.split(".")
        owner = importlib.import_module(module)
        for part in path:
            owner = getattr(owner, part)
        watch(name, owner, attribute)
