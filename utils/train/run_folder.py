"""The folder of one run: its lock, log, metrics.csv, results.json, curves.png and checkpoints."""

import errno
import json
import os
import socket
from pathlib import Path
from typing import IO

from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.base.files import TEMPORARY, append_line, end_last_line, replace_file

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

RUNS = Path("runs")
METRICS = ("epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "images_per_s", "seconds")
LOCK_NAME = ".lock"
# The error numbers of file systems without locks (some network and FUSE mounts).
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunFolder:
    """Writes the files of a run. A context manager: the folder is locked until it is left, or until `close`.

    Args:
        path: the folder, made where absent.
        seed: names the log file, log_seed_<seed>.txt.
        resumed: the checkpoint in this folder that the run continues from, and its modification time in ns when it was
            read; None for a run that begins.

    Raises:
        UserError: the folder cannot be written to, or another run is in it.
    """

    def __init__(self, path: Path, seed: int, *, resumed: tuple[Path, int] | None = None):
        self.path = path
        self.log_path = path / f"log_seed_{seed}.txt"
        # A damaged checkpoint, which another was resumed in place of, must not become `previous`.
        self._keeps_latest = resumed is None or resumed[0].name.startswith("checkpoint.")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(path)
            # Of two runs that chose this folder at one time, the second finds it changed when the first has ended.
            changed = holds_a_run(path) if resumed is None else resumed[0].stat().st_mtime_ns != resumed[1]
            if changed:
                self.close()
                raise UserError(
                    f"another run has just begun in '{path}'; start this one again, or choose another --save_path"
                )
            self.log_path.touch()
            end_last_line(self.log_path)
            for left_over in path.glob(f".*{TEMPORARY}"):
                left_over.unlink()
        except OSError as error:
            reason = f"cannot write to save path '{path}' ({error.strerror})"
            raise UserError(f"{reason}; choose another --save_path") from None
        if self._lock is None:
            self.log(f"note: no file locks in '{path}'; two runs must not use one save path")

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Releases the folder's lock."""
        if self._lock is not None:
            self._lock.close()

    def log(self, text: str, *, show: bool = True) -> None:
        """Appends a line to the log file and prints it."""
        if show:
            print(text, flush=True)
        try:
            append_line(self.log_path, text)
        except OSError as error:
            raise UserError(
                f"cannot write '{self.log_path}' ({error.strerror}); the last checkpoint is intact"
            ) from None

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

    def write_metrics(self, history: list[dict]) -> None:
        """Writes metrics.csv, a row per epoch. Comes after the epoch's checkpoint, and before the first epoch: a crash
        between the two leaves a row missing."""
        lines = [",".join(METRICS), *(",".join(f"{row[name]:.6g}" for name in METRICS) for row in history)]
        replace_file(self.path / "metrics.csv", "".join(f"{line}\n" for line in lines).encode())

    def write_results(self, results: dict) -> None:
        """Writes results.json."""
        replace_file(self.path / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())


class SilentFolder(RunFolder):
    """The run's folder on ranks other than the first: its path, and nothing is written or printed."""

    def __init__(self, path: Path):
        self.path = path

    def _nothing(self, *_, **__) -> None:
        pass

    log = save_checkpoint = write_metrics = write_results = close = _nothing


def lock_folder(folder: Path) -> IO | None:
    """Locks a folder, which exists, for this process: the lock's open file, None where there are no locks.

    The system releases the lock when that file is closed or the process ends, in whatever way. A POSIX record lock and
    not flock: worker processes inherit the latter, so that after a kill -9 a folder would stay locked until they end.
    The file stays: with another one of its name two runs could hold one folder.

    Raises:
        UserError: another run holds it; the line names its process and host.
    """
    if fcntl is None:
        return None
    file = open(folder / LOCK_NAME, "a+")  # noqa: SIM115 (open as long as the lock)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read(200).strip() or "another process"
        file.close()
        if error.errno in UNSUPPORTED:
            return None
        raise UserError(
            f"save path '{folder}' is in use by {holder}; wait until it ends, or choose another --save_path"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def check_free(folder: Path) -> None:
    """Raises UserError when another run holds the folder."""
    if os.access(folder / LOCK_NAME, os.W_OK) and (lock := lock_folder(folder)):
        lock.close()


def holds_a_run(path: Path) -> bool:
    """Whether a folder has results or a checkpoint; the log alone, of a run that was killed before, does not count."""
    names = os.listdir(path) if path.is_dir() else []
    return "results.json" in names or any(name.endswith(".pth.tar") for name in names)


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
    while not save_path and (holds_a_run(path) or _is_locked(path)):
        number += 1
        path = RUNS / f"{default_name}-{number}"
    check_writable(path)
    check_free(path)
    return path


def _is_locked(folder: Path) -> bool:
    try:
        check_free(folder)
    except UserError:
        return True
    return False


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
