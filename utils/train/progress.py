"""Progress of an epoch: a bar with the time left on a terminal, plain lines every print_freq mini-batches elsewhere."""

from __future__ import annotations

import sys
import time
from itertools import groupby

from tqdm import tqdm

from utils.train.distributed import is_first
from utils.train.engine import RunningMeans
from utils.train.run_folder import RunFolder

TIME_FORMAT = "%Y-%m-%d-%H:%M:%S"


class EpochProgress:
    """Shows one training epoch; use as a context manager and pass `on_step` to train_epoch.

    Args:
        run: the log file gets the plain lines in any case.
        epoch, epochs: number of this epoch, from 0, and of all.
        steps: mini-batches of this epoch.
        print_freq: mini-batches between two lines. Only then are the means read, which waits for the device.
        first: mini-batches that an interrupted run has behind it.
    """

    def __init__(self, run: RunFolder, epoch: int, epochs: int, steps: int, print_freq: int, first: int = 0):
        self.run, self.epoch, self.steps, self.print_freq = run, epoch, steps, print_freq
        self.bar = None
        if sys.stderr.isatty() and is_first():
            self.bar = tqdm(
                total=steps,
                initial=first,
                desc=f"epoch {epoch + 1}/{epochs}",
                unit="batch",
                dynamic_ncols=True,
                leave=False,
            )

    def __enter__(self) -> EpochProgress:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def is_due(self, t: int) -> bool:
        """Whether mini-batch t gets a line."""
        return t % self.print_freq == 0 or t == self.steps - 1

    def on_step(self, t: int, size: int, means: RunningMeans) -> None:
        if self.bar is not None:
            self.bar.update()
        if self.is_due(t):
            now = means.read()
            self.run.log(
                f"  Epoch: [{self.epoch:03d}][{t:03d}/{self.steps:03d}]   Batch {size}   Time {now.seconds:.1f}   Loss "
                f"{now.loss:.4f}   Prec@1 {now.top1:.3f}   Prec@5 {now.top5:.3f}   [{time.strftime(TIME_FORMAT)}]",
                show=self.bar is None,
            )
            if self.bar is not None:
                self.bar.set_postfix(batch=size, loss=f"{now.loss:.3f}", top1=f"{now.top1:.2f}")


def format_seconds(seconds: float) -> str:
    """HH:MM:SS."""
    seconds = round(seconds)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def describe_schedule(sizes: list[int]) -> str:
    """The mini-batches of an epoch: their sizes, and how many of each where they repeat."""
    runs = [(size, len(list(same))) for size, same in groupby(sizes)]
    parts = [f"{size} x{n}" if n > 1 else f"{size}" for size, n in runs]
    if len(parts) > 12:
        parts = [*parts[:4], "...", *parts[-4:]]
    return f"{len(sizes)} mini-batches in the first epoch: {', '.join(parts)} ({sum(sizes)} images)"
