"""The folder of one run: log, metrics.csv, results.json, curves.png and checkpoints."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path

from utils import checkpoint as checkpoints
from utils.errors import UserError

RUNS = Path("runs")
METRICS = ("epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "images_per_s", "seconds")


class RunFolder:
    """Writes what a run leaves behind.

    Args:
        path: the folder, made where absent.
        seed: names the log file, log_seed_<seed>.txt.
        new: a run that begins; its log must not exist yet, so of two runs that choose one folder at one time the second stops.
    """

    def __init__(self, path: Path, seed: int, *, new: bool = True):
        self.path = path
        self.log_path = path / f"log_seed_{seed}.txt"
        try:
            path.mkdir(parents=True, exist_ok=True)
            with open(self.log_path, "x" if new else "a"):
                pass
        except FileExistsError:
            raise UserError(
                f"another run has just begun in '{path}'; start this one again, or choose another --save_path"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot write to save path '{path}' ({error.strerror}); choose another --save_path"
            ) from None

    def log(self, text: str, *, show: bool = True) -> None:
        """Appends a line to the log file and prints it."""
        if show:
            print(text, flush=True)
        try:
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write '{self.log_path}' ({error.strerror}); the last checkpoint is intact"
            ) from None

    def checkpoint_path(self, arch: str, kind: str = "checkpoint") -> Path:
        """checkpoint.<arch>.pth.tar or best.<arch>.pth.tar."""
        return self.path / f"{kind}.{arch}.pth.tar"

    def save_checkpoint(self, checkpoint: dict, is_best: bool) -> None:
        arch = checkpoint["arch"]
        paths = [self.checkpoint_path(arch, "best")] if is_best else []
        checkpoints.write(checkpoint, *paths, self.checkpoint_path(arch))

    def write_metrics(self, history: list[dict]) -> None:
        """metrics.csv, a row per epoch; as a whole, so that it always agrees with the checkpoint beside it."""
        text = io.StringIO()
        writer = csv.DictWriter(text, METRICS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{row[name]:.6g}" for name in METRICS} for row in history)
        checkpoints.replace_file(self.path / "metrics.csv", text.getvalue().encode())

    def write_results(self, results: dict) -> None:
        text = json.dumps(_finite(results), indent=1, allow_nan=False) + "\n"
        checkpoints.replace_file(self.path / "results.json", text.encode())


class SilentFolder(RunFolder):
    """The run's folder as ranks other than the first have it: its path, and nothing is written or printed."""

    def __init__(self, path: Path):
        self.path = path

    def _nothing(self, *_, **__) -> None:
        pass

    log = save_checkpoint = write_metrics = write_results = _nothing


def _finite(value):
    """Numbers that JSON does not know (a diverged loss) as null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def holds_a_run(path: Path) -> bool:
    """Whether a folder has a log, results or a checkpoint."""
    if not path.is_dir():
        return False
    names = os.listdir(path)
    return "results.json" in names or any(n.startswith("log_seed_") or n.endswith(".pth.tar") for n in names)


def new_run_path(save_path: str | None, default_name: str) -> Path:
    """Where a new run goes: the path that was given, or the first free of runs/<default_name>, runs/<default_name>-2, ...

    Raises:
        UserError: the path given holds a run already, is no folder, or cannot be written to.
    """
    if save_path is None:
        number, path = 1, RUNS / default_name
        while holds_a_run(path):
            number += 1
            path = RUNS / f"{default_name}-{number}"
    else:
        path = Path(save_path)
        if holds_a_run(path):
            raise UserError(
                f"save path '{path}' holds a run already; continue it with --resume, or choose another --save_path"
            )
    check_writable(path)
    return path


def check_writable(path: Path) -> None:
    """Raises UserError when a folder at `path` could not be made or written to. Makes nothing."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write to save path '{path}' ('{existing}' is not a folder that can be written to); choose another --save_path"
        )
