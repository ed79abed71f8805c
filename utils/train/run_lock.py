"""One run per folder: a lock of the operating system, which is gone when its process is, however that ended."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from utils.base.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK_NAME = ".lock"
# What a file system without locks answers (some network and FUSE mounts).
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[str] = set()


class RunLock:
    """Holds a folder until `release` or the end of the process.

    A POSIX record lock and not flock: worker processes inherit the latter, so that after a kill -9 a folder would stay locked until
    the orphans notice. Locks of one process do not exclude each other, hence the list of folders that this process holds.

    Args:
        folder: exists already.

    Attributes:
        note: a line for the log where the file system knows no locks, else None.

    Raises:
        UserError: another run holds it; the line names its process and host.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK_NAME
        self.note = None
        self._file = None
        self._key = str(folder.resolve())
        if self._key in _held:
            raise UserError(_in_use(folder, f"process {os.getpid()}, this one"))
        if fcntl is None:
            self.note = "note: no file locks on this system; two runs must not use one save path"
            return
        while True:
            file = open(self.path, "a+")  # noqa: SIM115 (open as long as the lock)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read(200).strip()
                file.close()
                if error.errno in UNSUPPORTED:
                    self.path.unlink(missing_ok=True)
                    self.note = (
                        f"note: no file locks in '{folder}' ({error.strerror}); two runs must not use one save path"
                    )
                    return
                raise UserError(_in_use(folder, holder or "another process")) from None
            if _is_at(file, self.path):
                break
            # The holder before has removed the file between our open and our lock.
            file.close()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file
        _held.add(self._key)

    def release(self) -> None:
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None
        _held.discard(self._key)


def check_free(folder: Path) -> None:
    """Raises UserError when a run holds the folder. Makes nothing."""
    if str(folder.resolve()) in _held:
        raise UserError(_in_use(folder, f"process {os.getpid()}, this one"))
    path = folder / LOCK_NAME
    if fcntl is None or not path.is_file() or not os.access(path, os.W_OK):
        return
    with open(path, "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise UserError(_in_use(folder, file.read(200).strip() or "another process")) from None


def _in_use(folder: Path, holder: str) -> str:
    return f"save path '{folder}' is in use by {holder}; wait until it ends, or choose another --save_path"


def _is_at(file, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
