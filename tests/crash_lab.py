"""Runs that are killed: the training script in processes that are forked from one that has imported torch, so that each starts at once.

`Lab` starts the forking process (this file, run as a program) and asks it for runs. A run can kill itself at an exact point (before the
third fsync, in the fifth optimizer step, ...) or be killed from outside after some time; what it was doing then is read from a file
that it keeps.
"""

import contextlib
import csv
import json
import os
import random
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
# Exact points at which a run can end itself, and what it is doing there.
POINTS = {
    "step": ("utils.train.engine", "add_gradients"),
    "evaluation": ("utils.train.engine", "RunningMeans.read"),
    "written, not on the disk": ("os", "fsync"),
    "kept twice": ("os", "link"),
    "before the renaming": ("os", "replace"),
    "test batch": ("utils.train.trainer", "Training._stop_while_testing"),
    "small network": ("utils.train.trainer", "make_small"),
    "log line": ("utils.train.run_folder", "append_line"),
}


@dataclass
class Run:
    """A run that was asked for.

    Attributes:
        pids: its process, or those of its ranks.
        folder: its working folder; `out` in it is the save path.
    """

    lab: "Lab"
    pids: list[int]
    folder: Path
    statuses: list[int] = field(default_factory=list)

    def wait(self) -> int:
        """The exit status, negative for a signal; of several ranks the first's."""
        self.statuses = [self.lab.ask({"wait": pid}) for pid in self.pids]
        return self.statuses[0]

    def kill(self, signum: int = signal.SIGKILL, ranks: slice = slice(None)) -> None:
        for pid in self.pids[ranks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def doing(self) -> str:
        """What the first process was doing last."""
        try:
            return (self.folder / "doing").read_text().split("\0")[0] or "start-up"
        except FileNotFoundError:
            return "start-up"

    def text(self, stream: str) -> str:
        return (self.folder / f"{stream}0").read_text()


class Lab:
    """Use as a context manager."""

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve())]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait(20)
        self.server.stdout.close()

    def ask(self, request: dict):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(
        self,
        folder: Path,
        argv: list[str],
        *,
        ranks: int = 1,
        point: str | None = None,
        count: int = 0,
        signum: int = signal.SIGKILL,
    ) -> Run:
        """Starts the CIFAR script in `folder`; with a `point` it sends itself the signal there, at the count-th time."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "doing").unlink(missing_ok=True)
        request = {"folder": str(folder), "argv": [str(a) for a in argv], "point": point, "count": count}
        request["signum"] = int(signum)
        if ranks == 1:
            return Run(self, [self.ask(request)], folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(ranks):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            environment = {**numbers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in environment.items()}
            point_here = point if rank == 0 else None
            pids.append(self.ask({**request, "environment": environment, "point": point_here}))
        return Run(self, pids, folder)

    def run(self, folder: Path, argv: list[str], **options) -> Run:
        run = self.start(folder, argv, **options)
        run.wait()
        return run


def same(a, b) -> bool:
    """Equality to the last bit of nested checkpoints, wall-clock times and settings (which name --resume) aside."""
    import torch

    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        skipped = ("images_per_s", "seconds", "settings")
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in skipped)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def log_entries(text: str) -> dict[tuple, set[str]]:
    """{(epoch, mini-batch or kind of line): what the log says there, times aside}. A resumed run says some things twice."""
    entries, epoch = {}, None
    for line in text.splitlines():
        if found := re.match(r"==>>.*\[Epoch=(\d+)/", line):
            epoch = found[1]
            entries.setdefault((epoch, "begin"), set()).add(re.sub(r"\[\d{4}-.*?\]|\[Need.*?\]", "", line))
        elif found := re.match(r"  Epoch: \[(\d+)\]\[(\d+)/", line):
            entries.setdefault((found[1], found[2]), set()).add(re.sub(r"Time [\d.]+|\[\d{4}-.*?\]", "", line))
        elif found := re.match(r"  \*\*(\w+)\*\*", line):
            entries.setdefault((epoch, found[1]), set()).add(line)
    return entries


def metrics(folder: Path) -> list[list[str]]:
    """metrics.csv without its wall-clock columns."""
    rows = list(csv.reader((folder / "metrics.csv").read_text().splitlines()))
    return [row[:6] for row in rows]


def differences(folder: Path, whole: Path) -> list[str]:
    """What of a resumed run (its save path) differs from the uninterrupted one."""
    import torch

    found = []
    for name in (NAME, NAME.replace("checkpoint", "best")):
        a, b = (torch.load(path / name, weights_only=True) for path in (folder, whole))
        found += [] if same(a, b) else [name]
    found += [] if metrics(folder) == metrics(whole) else ["metrics.csv"]
    a, b = (log_entries((path / "log_seed_1.txt").read_text(errors="replace")) for path in (folder, whole))
    found += [] if a == b else ["log"]
    a, b = (json.loads((path / "results.json").read_text()) for path in (folder, whole))
    keys = ("finished", "last_epoch_accuracy", "best_epoch_accuracy", "epochs_done", "filters")
    found += [] if all(a[key] == b[key] for key in keys) else ["results.json"]
    found += [str(p.name) for p in folder.iterdir() if p.name.endswith(".tmp") or p.name == ".lock"]
    return found


def resume_argv(text: str) -> list[str] | None:
    """The arguments of the command line that a stopped run printed, None where there is none."""
    if "this continues the run:" not in text:
        return None
    words = shlex.split(text.split("this continues the run:\n")[1].splitlines()[0])
    return words[next(i for i, word in enumerate(words) if word.endswith("cifar10_resnet_test.py")) + 1 :]


def random_delays(n: int, seconds: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [draw.uniform(0.02, seconds) for _ in range(n)]


def serve() -> None:
    """The forking process: a JSON line in, a JSON line out."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    torch.set_num_threads(1)
    # Imported once here, not in every run: the optimizer's base class imports the compiler.
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo
    from tiny import NETWORKS

    import cifar10_resnet_test  # noqa: F401
    import models.registry

    models.registry.REGISTRY.update(NETWORKS)
    out = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                _child(request)
        os.write(out, (json.dumps(answer) + "\n").encode())
    os._exit(0)


def _child(request: dict) -> None:
    """One run of the script; does not return."""
    import cifar10_resnet_test as script
    from utils.base.errors import run_main

    environment = request.get("environment", {})
    os.environ.update(environment)
    rank = environment.get("RANK", "0")
    os.chdir(request["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{stream}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["cifar10_resnet_test.py", *request["argv"]]
    if rank == "0":
        _watch(request["point"], request["count"], request["signum"])
        _measure()
    status = 0
    try:
        run_main(script.main)
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    import multiprocessing

    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(status)


def _measure() -> None:
    """Writes this process's resident memory (bytes), open files and threads to `measured`, a line per complete epoch."""
    from utils.train.trainer import Training

    real = Training._save

    def save(training, *, is_best):
        real(training, is_best=is_best)
        if training.position == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            numbers = (
                pages * os.sysconf("SC_PAGE_SIZE"),
                len(os.listdir("/proc/self/fd")),
                len(os.listdir("/proc/self/task")),
            )
            with open("measured", "a") as file:
                file.write(" ".join(map(str, numbers)) + "\n")

    if os.path.isdir("/proc/self/task"):
        Training._save = save


def _watch(point: str | None, count: int, signum: int) -> None:
    """Keeps the file `doing` up to date, and sends the process a signal at a point."""
    import importlib

    doing = os.open("doing", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    seen = 0

    def note(text: str) -> None:
        os.pwrite(doing, text.encode() + b"\0" * 30, 0)

    def wrap(name: str, owner, attribute: str) -> None:
        real = getattr(owner, attribute)

        def watched(*args, **kwargs):
            nonlocal seen
            if name == point:
                seen += 1
                if seen == count:
                    os.kill(os.getpid(), signum)
            return real(*args, **kwargs)

        setattr(owner, attribute, watched)

    def during(text: str, module: str, attribute: str) -> None:
        owner = importlib.import_module(module)
        real = getattr(owner, attribute)

        def noted(*args, **kwargs):
            note(text)
            try:
                return real(*args, **kwargs)
            finally:
                note("between")

        setattr(owner, attribute, noted)

    for name, (module, attribute) in POINTS.items():
        owner = importlib.import_module(module)
        *path, attribute = attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        wrap(name, owner, attribute)
    during("step", "utils.train.engine", "train_step")
    during("evaluation", "utils.train.trainer", "evaluate")
    during("save", "utils.base.checkpoint", "write")
    during("small network", "utils.train.trainer", "make_small")
    during("curves", "utils.train.trainer", "draw_curves")


if __name__ == "__main__":
    serve()
