"""The folder of one run: log, metrics.csv, results.json, curves.png and checkpoints."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.base.files import TEMPORARY, append_line, end_last_line, replace_file
from utils.train.run_lock import RunLock

RUNS = Path("runs")
METRICS = ("epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "images_per_s", "seconds")


class RunFolder:
    """Writes the files of a run. A context manager: the folder is locked until it is left, or until `close`.

    Args:
        path: the folder, made where absent.
        seed: names the log file, log_seed_<seed>.txt.
        new: a run that begins: of two that choose one folder at one time the second stops.
        resumed: the file that a run in its own folder continues from, and its `file_stamp` when it was read.

    Raises:
        UserError: the folder cannot be written to, or another run is in it.
    """

    def __init__(self, path: Path, seed: int, *, new: bool = True, resumed: tuple[Path, tuple] | None = None):
        self.path = path
        self.log_path = path / f"log_seed_{seed}.txt"
        self.metrics_path = path / "metrics.csv"
        # A damaged checkpoint, which another was resumed in place of, must not become `previous`.
        self._keeps_latest = resumed is None or resumed[0].name.startswith("checkpoint.")
        self._lock = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(path)
            if (new and holds_a_run(path)) or (resumed is not None and file_stamp(resumed[0]) != resumed[1]):
                raise UserError(
                    f"another run has just begun in '{path}'; start this one again, or choose another --save_path"
                )
            self.log_path.touch()
            end_last_line(self.log_path)
            for left_over in path.glob(f".*{TEMPORARY}"):
                left_over.unlink()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                reason = f"cannot write to save path '{path}' ({error.strerror})"
                raise UserError(f"{reason}; choose another --save_path") from None
            raise
        if self._lock.note:
            self.log(self._lock.note)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Releases the folder's lock."""
        if self._lock is not None:
            self._lock.release()

    def log(self, text: str, *, show: bool = True) -> None:
        """Appends a line to the log file and prints it."""
        if show:
            print(text, flush=True)
        self._append(self.log_path, text)

    def _append(self, path: Path, line: str, *, durable: bool = False) -> None:
        try:
            append_line(path, line, durable=durable)
        except OSError as error:
            raise UserError(f"cannot write '{path}' ({error.strerror}); the last checkpoint is intact") from None

    def checkpoint_path(self, arch: str, kind: str = "checkpoint") -> Path:
        """checkpoint.<arch>.pth.tar, previous.<arch>.pth.tar or best.<arch>.pth.tar."""
        return self.path / f"{kind}.{arch}.pth.tar"

    def save_checkpoint(self, checkpoint: dict, is_best: bool) -> None:
        """Writes the latest checkpoint, the one before becoming `previous`; where it is the best, that one too."""
        arch = checkpoint["arch"]
        paths = [self.checkpoint_path(arch, "best")] if is_best else []
        keep = self.checkpoint_path(arch, "previous") if self._keeps_latest else None
        checkpoints.write(checkpoint, *paths, self.checkpoint_path(arch), keep=keep)
        self._keeps_latest = True

    def append_metrics(self, row: dict) -> None:
        """A line of metrics.csv, the header before the first one. Comes after the epoch's checkpoint."""
        if not self.metrics_path.exists():
            self._append(self.metrics_path, ",".join(METRICS), durable=True)
        self._append(self.metrics_path, _metrics_line(row), durable=True)

    def rewrite_metrics(self, history: list[dict]) -> None:
        """Makes metrics.csv that of a run's history: after a crash a row may be missing, cut, or too much."""
        content = "".join(f"{line}\n" for line in [",".join(METRICS), *map(_metrics_line, history)]).encode()
        there = self.metrics_path.read_bytes() if self.metrics_path.exists() else b""
        if there != content and (there or history):
            replace_file(self.metrics_path, content)

    def write_results(self, results: dict) -> None:
        """Writes results.json."""
        text = json.dumps(_finite(results), indent=1, allow_nan=False) + "\n"
        replace_file(self.path / "results.json", text.encode())


class SilentFolder(RunFolder):
    """The run's folder on ranks other than the first: its path, and nothing is written or printed."""

    def __init__(self, path: Path):
        self.path = path

    def _nothing(self, *_, **__) -> None:
        pass

    log = save_checkpoint = append_metrics = rewrite_metrics = write_results = close = _nothing


def _metrics_line(row: dict) -> str:
    return ",".join(f"{row[name]:.6g}" for name in METRICS)


def _finite(value):
    """Numbers that JSON does not have (of a diverged loss) as null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_stamp(path: Path) -> tuple | None:
    """What changes when a file is replaced; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def holds_a_run(path: Path) -> bool:
    """Whether a folder has a log, results or a checkpoint."""
    names = os.listdir(path) if path.is_dir() else []
    return "results.json" in names or any(n.startswith("log_seed_") or n.endswith(".pth.tar") for n in names)


def new_run_path(save_path: str | None, default_name: str) -> Path:
    """Where a new run goes: the path that was given, or the first free of runs/<default_name>, <default_name>-2, ...

    Raises:
        UserError: the path given holds a run already, is no folder, or cannot be written to.
    """
    number, path = 1, Path(save_path) if save_path else RUNS / default_name
    if save_path and holds_a_run(path):
        raise UserError(
            f"save path '{path}' holds a run already; continue it with --resume auto, or choose another --save_path"
        )
    while holds_a_run(path):
        number += 1
        path = RUNS / f"{default_name}-{number}"
    check_writable(path)
    return path


def check_writable(path: Path) -> None:
    """Raises UserError when a folder at `path` could not be made or written to. Makes nothing."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write to save path '{path}' ('{existing}' is not a folder that can be written to); "
            "choose another --save_path"
        )
