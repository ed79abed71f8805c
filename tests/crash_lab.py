"""Runs that are killed: the CIFAR script in processes forked from one that has imported torch, so that they start fast.

`Lab` starts the forking process (this file, run as a program) and asks it for runs. A run can send itself a signal at
an exact point (the fifth step, the third fsync, ...) or be killed from outside after some time; what it was doing is
read from a file that it keeps.
"""

import contextlib
import importlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "checkpoint.resnet8_dropout.pth.tar"
FLAGS = ["--arch", "resnet8_dropout", "--batch_size", "16", "--k", "24", "--epochs", "3", "--print_freq", "1"]
FLAGS += ["--save_every", "2", "--save_path", "out"]
# What a run may be doing, and the function that does it.
POINTS = {
    "step": ("utils.train.engine", "train_step"),
    "evaluation": ("utils.train.trainer", "evaluate"),
    "test batch": ("utils.train.trainer", "Training._stop_while_testing"),
    "save": ("utils.base.checkpoint", "write"),
    "fsync": ("os", "fsync"),
    "link": ("os", "link"),
    "rename": ("os", "replace"),
    "small network": ("utils.train.trainer", "make_small"),
    "curves": ("utils.train.trainer", "draw_curves"),
    "log line": ("utils.train.run_folder", "append_line"),
}


@dataclass
class Run:
    """A run that was asked for: the processes of its ranks, and its working folder, in which `out` is the save path."""

    lab: "Lab"
    pids: list[int]
    folder: Path
    statuses: list[int] = field(default_factory=list)

    def wait(self) -> "Run":
        """Waits for its end; exit statuses are negative for a signal."""
        self.statuses = [self.lab.ask({"wait": pid}) for pid in self.pids]
        return self

    def kill(self, signum: int = signal.SIGKILL) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def doing(self) -> str:
        """What the first process was doing last."""
        file = self.folder / "doing"
        return (file.read_text().split("\0")[0] if file.exists() else "") or "start-up"

    @property
    def errors(self) -> str:
        return (self.folder / "stderr0").read_text()


class Lab:
    """Use as a context manager."""

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen([sys.executable, Path(__file__).resolve()], cwd=ROOT, env=environment, **pipes)
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait(20)
        self.server.stdout.close()

    def ask(self, request: dict):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, folder: Path, argv: list, *, ranks=1, point=None, count=0, signum=signal.SIGKILL) -> Run:
        """Starts the script in `folder`; with a `point` rank 0 sends itself the signal there, at the count-th time."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "doing").unlink(missing_ok=True)
        request = {"folder": str(folder), "argv": [str(word) for word in argv], "count": count, "signum": int(signum)}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        pids = []
        for rank in range(ranks):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            environment = {name: str(value) for name, value in {**numbers, **place}.items()} if ranks > 1 else {}
            pids.append(self.ask({**request, "environment": environment, "point": None if rank else point}))
        return Run(self, pids, folder)

    def run(self, folder: Path, argv: list, **options) -> Run:
        return self.start(folder, argv, **options).wait()


def same(a, b) -> bool:
    """Equality to the last bit of nested checkpoints, wall-clock times and settings (which name --resume) aside."""
    import torch

    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        skipped = ("images_per_s", "seconds", "settings")
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in skipped)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def figures(folder: Path) -> dict[str, object]:
    """What log, metrics.csv and results.json say, wall-clock times aside; a resumed run logs some lines twice."""
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
    import torch

    names = (NAME, NAME.replace("checkpoint", "best"))
    found = [n for n in names if not same(*(torch.load(path / n, weights_only=True) for path in (folder, whole)))]
    ours, theirs = figures(folder), figures(whole)
    found += [name for name in ours if ours[name] != theirs[name]]
    return found + [path.name for path in folder.glob(".*")]


def resume_argv(text: str) -> list[str] | None:
    """The arguments of the command line that a stopped run printed, None where there is none."""
    if "this continues the run:" not in text:
        return None
    words = shlex.split(text.split("this continues the run:\n")[1].splitlines()[0])
    return words[next(i for i, word in enumerate(words) if word.endswith("cifar10_resnet_test.py")) + 1 :]


def serve() -> None:
    """The forking process: a JSON line in, a JSON line out."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    torch.set_num_threads(1)
    # Imported once here, not in every run: the optimizer's base class imports the compiler.
    for name in ("matplotlib.pyplot", "torch._dynamo", "cifar10_resnet_test"):
        importlib.import_module(name)
    from tiny import NETWORKS

    import models.registry

    models.registry.REGISTRY.update(NETWORKS)
    out = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork() or _child(request)
        os.write(out, (json.dumps(answer) + "\n").encode())
    os._exit(0)


def _child(request: dict) -> None:
    """One run of the script; does not return."""
    import multiprocessing
    import traceback

    import cifar10_resnet_test as script
    from utils.base.errors import run_main

    os.environ.update(request["environment"])
    rank = request["environment"].get("RANK", "0")
    os.chdir(request["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{stream}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["cifar10_resnet_test.py", *request["argv"]]
    if rank == "0":
        _watch(request["point"], request["count"], request["signum"])
        _measure()
    status = 99
    try:
        run_main(script.main)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(status)


def _measure() -> None:
    """Writes resident memory (bytes), open files and threads of this process to `measured`, a line per epoch."""
    from utils.train.run_folder import RunFolder

    real = RunFolder.append_metrics

    def append_metrics(run, row):
        real(run, row)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
        with open("measured", "a") as file:
            file.write(f"{pages * os.sysconf('SC_PAGE_SIZE')} {files} {threads}\n")

    if os.path.isdir("/proc/self/task"):
        RunFolder.append_metrics = append_metrics


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


if __name__ == "__main__":
    serve()
