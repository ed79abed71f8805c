"""The training loops that utils.bench.training compares, each in a process of its own, and the clocks inside them.

A process of its own gives each loop its own memory allocator, thread pool, workers and peak memory.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import models
from AHSG_HT import AHSG_HT
from utils.base.errors import UserError
from utils.bench.original_loop import release_loader, train_epoch_as_released
from utils.bench.per_filter_loop import PerFilterLoop
from utils.train.acceleration import Acceleration, accelerate
from utils.train.device import flush_denormals, reuse_freed_memory, seed_everything
from utils.train.distillation import Distillation
from utils.train.engine import evaluate, train_epoch
from utils.train.objective import cross_entropy

OPTIMIZER = dict(lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True, v=0.1, HTrate=0.7)
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Setup:
    """What one loop trains.

    Attributes:
        loop: "release", or "this" project's.
        teacher: architecture of a network with random weights that guides the student, or None: only time is measured.
        images: how many of the training images are used, at most; every class has the same share.
        batch_size, k: mini-batch schedule, see data.DataLoader.
        workers: processes that make mini-batches.
        threads: CPU threads of the training process; None: torch's choice.
        amp, compile: this project's options of these names.
    """

    loop: str
    arch: str
    teacher: str | None
    dataset: str
    data_path: str
    images: int
    batch_size: int
    k: float | None
    workers: int
    seed: int
    device: str
    threads: int | None
    amp: bool = False
    compile: bool = False

    @property
    def label(self) -> str:
        return self.loop + " --amp" * self.amp + " --compile" * self.compile


class Clock:
    """Seconds spent in named parts of the loop. On a GPU only a synchronised clock tells them apart."""

    def __init__(self, device: torch.device, synchronise: bool):
        self.seconds: dict[str, float] = {}
        self.wait = (lambda: torch.cuda.synchronize(device)) if synchronise else (lambda: None)

    @contextmanager
    def part(self, name: str):
        self.wait()
        begin = time.perf_counter()
        yield
        self.wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            with self.part(name):
                return function(*arguments, **options)

        return call


class Watch(TorchDispatchMode):
    """Adds up calls and seconds of every tensor operation that runs under it, those of backward passes included.

    On a GPU each operation is waited for, so that its time is its own; small ones then take longer than in a queue.
    """

    def __init__(self, wait: Callable):
        super().__init__()
        self.wait = wait
        self.calls: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.wait()
        begin = time.perf_counter()
        result = operation(*args, **(kwargs or {}))
        self.wait()
        name = operation._schema.name
        # Not the marks that torch's own profiler sets.
        if not name.startswith("profiler::"):
            self.calls[name] += 1
            self.seconds[name] += time.perf_counter() - begin
        return result


class TimedLoader:
    """A loader whose waiting times are counted, and the mini-batches of its last epoch."""

    def __init__(self, loader):
        self.loader = loader
        self.clock: Clock | None = None
        self.given = 0

    def sizes(self, epoch: int) -> list[int]:
        return self.loader.sizes(epoch)

    def __iter__(self):
        batches = iter(self.loader)
        self.given = 0
        while True:
            with self.clock.part("data"):
                batch = next(batches, None)
            if batch is None:
                return
            self.given += 1
            yield batch


class Loop:
    """One of the loops, ready to train epoch after epoch."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.device = torch.device(setup.device)
        if setup.threads:
            torch.set_num_threads(setup.threads)
        released = setup.loop == "release"
        if not released:
            flush_denormals()
            reuse_freed_memory()
        seed_everything(setup.seed)
        self.images = data.load(setup.dataset, setup.data_path, seed=setup.seed)
        take_share(self.images.train, setup.images, len(self.images.classes))
        classes = len(self.images.classes)
        layout = torch.contiguous_format if released else torch.channels_last
        self.net = models.build(setup.arch, num_classes=classes).to(self.device, memory_format=layout)
        if released:
            on_gpu = self.device.type == "cuda"
            loader = release_loader(
                self.images.train,
                setup.batch_size,
                setup.k,
                seed=setup.seed,
                workers=setup.workers,
                pin_memory=on_gpu,
            )
        else:
            if self.device.type == "cuda":
                self.images.train.to(self.device), self.images.test.to(self.device)
            workers = 0 if self.device.type == "cuda" else setup.workers
            loader = data.DataLoader(
                self.images.train,
                setup.batch_size,
                setup.k,
                shuffle=True,
                seed=setup.seed,
                num_workers=workers,
                persistent_workers=workers > 0,
            )
        self.objective = cross_entropy
        if setup.teacher:
            teacher = models.build(setup.teacher, num_classes=classes).to(self.device, memory_format=layout)
            sample, _ = self.images.test.__getitems__([0, 1])
            self.objective = Distillation(teacher, self.net, sample.to(self.device))
        if not released:
            self.objective = accelerate(
                self.net,
                self.objective,
                self.device,
                Acceleration(amp=setup.amp, compile=setup.compile),
                int(setup.k or setup.batch_size),
            )
        self.optimizer = (PerFilterLoop if released else AHSG_HT)(list(self.net.parameters()), **OPTIMIZER)
        self.loader = TimedLoader(loader)
        self.epoch = 0

    def set_learning_rate(self, lr: float) -> None:
        groups = self.optimizer.sgd.param_groups if self.setup.loop == "release" else self.optimizer.param_groups
        for group in groups:
            group["lr"] = lr

    def train(self, synchronise: bool = False) -> dict:
        """One epoch: {"seconds", "images", "loss", and seconds of "data", "optimizer", "forward and backward"}."""
        clock = self.loader.clock = Clock(self.device, synchronise)
        own = {name: getattr(self.optimizer, name) for name in ("step", "update_HSG")}
        for name, function in own.items():
            setattr(self.optimizer, name, clock.timed("optimizer", function))
        self.wait()
        begin = time.perf_counter()
        run = train_epoch_as_released if self.setup.loop == "release" else train_epoch
        result = run(self.net, self.loader, self.objective, self.optimizer, self.device, epoch=self.epoch)
        self.wait()
        seconds = time.perf_counter() - begin
        for name, function in own.items():
            setattr(self.optimizer, name, function)
        self.epoch += 1
        parts = {"data": 0.0, "optimizer": 0.0} | clock.seconds
        parts["forward and backward"] = seconds - sum(parts.values())
        loss = result[0] if self.setup.loop == "release" else result.loss
        return {"seconds": seconds, "images": len(self.images.train), "loss": loss, **parts, "memory": self.memory()}

    def watch(self) -> dict:
        """One epoch, operation by operation: {"seconds" with the cost of watching, "steps", "operations": {name: {"calls", "seconds"}}}."""
        with Watch(self.wait) as seen:
            seconds = self.train()["seconds"]
        operations = {name: {"calls": seen.calls[name], "seconds": seen.seconds[name]} for name in seen.calls}
        return {"seconds": seconds, "steps": self.loader.given, "operations": operations}

    def test(self) -> dict:
        """Loss and accuracy on the test images, by the same code for every loop."""
        result = evaluate(self.net, data.DataLoader(self.images.test, EVALUATION_BATCH), self.device)
        return {"loss": result.loss, "accuracy": result.top1}

    def memory(self) -> dict:
        """Peak memory so far, in MiB: of this process, of its workers (their own pages, now), and of the GPU."""
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        peak = next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)
        workers = sum(private_memory(child.pid) for child in multiprocessing.active_children())
        gpu = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else None
        return {"process": peak, "workers": workers, "gpu": gpu}

    def matmul_flops(self, n: int = 2048, repeats: int = 10) -> float:
        """FLOP/s of a product of two n x n matrices in the loop's number format: what this device reaches at best."""
        dtype = torch.bfloat16 if self.setup.amp else torch.float32
        n = 4 * n if self.device.type == "cuda" else n
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        return 2 * n**3 / self._least_seconds(lambda: a @ b, repeats)

    def copy_bytes(self, n: int = 10**8, repeats: int = 10) -> float:
        """Bytes/s of a copy of n numbers, larger than any cache, read and written: what the memory gives at best."""
        a, b = (torch.zeros(n, device=self.device) for _ in range(2))
        return 2 * a.nbytes / self._least_seconds(lambda: b.copy_(a), repeats)

    def _least_seconds(self, work: Callable, repeats: int) -> float:
        best = float("inf")
        for _ in range(repeats):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            best = min(best, time.perf_counter() - begin)
        return best

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def take_share(images: data.ImageArrays, count: int, classes: int) -> None:
    """Keeps `count` images, the first count/classes of every class."""
    if count < len(images):
        each = [(images.labels == c).nonzero()[: -(-count // classes), 0] for c in range(classes)]
        chosen = torch.cat(each)[:count] if count % classes == 0 else torch.cat(each).sort().values[:count]
        images.images, images.labels = images.images[chosen].clone(), images.labels[chosen].clone()


def private_memory(pid: int) -> float:
    """Memory in MiB that belongs to a process alone; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_")) / 1024


class LoopProcess:
    """A Loop in a process of its own; `call("train")` and the like run there, one process at a time."""

    def __init__(self, setup: Setup):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # Not a daemon: the release's loop has worker processes of its own.
        self.process = context.Process(target=_serve, args=(setup, theirs, multiprocessing.get_start_method()))
        self.process.start()
        theirs.close()
        try:
            self.call("memory")
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments):
        """The method's result.

        Raises:
            UserError: the loop could not be made, of the images for instance.
        RuntimeError: it failed there; its traceback is on stderr.
        """
        try:
            self.pipe.send((method, arguments))
            result = self.pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError("the loop's process ended; its error is above") from None
        if isinstance(result, UserError):
            raise result
        return result

    def close(self) -> None:
        self.pipe.close()
        self.process.join(timeout=30)
        if self.process.is_alive():
            self.process.kill()

    def __enter__(self) -> LoopProcess:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _serve(setup: Setup, pipe, start_method: str) -> None:
    # A spawned process spawns by default; the loader's workers are to start as in a script.
    multiprocessing.set_start_method(start_method, force=True)
    try:
        loop = Loop(setup)
    except UserError as error:
        pipe.recv()
        pipe.send(error)
        return
    while True:
        try:
            method, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        pipe.send(getattr(loop, method)(*arguments))
