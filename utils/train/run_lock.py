"""One run per folder: a lock of the operating system, which is released when its process ends, in whatever way."""

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
# The error numbers of file systems without locks (some network and FUSE mounts).
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """Holds a folder, which exists, until `release` or the end of the process.

    A POSIX record lock and not flock: worker processes inherit the latter, so that after a kill -9 a folder would stay
    locked until they notice.

    Attributes:
        note: a line for the log where there are no locks, else None.

    Raises:
        UserError: another run holds it; the line names its process and host.
    """

    def __init__(self, folder: Path):
        self.path, self.note, self._file = folder / LOCK_NAME, None, None
        while self._file is None:
            file = open(self.path, "a+")  # noqa: SIM115 (open as long as the lock)
            try:
                if fcntl is None:
                    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                file.close()
                if error.errno not in UNSUPPORTED:
                    raise UserError(
                        f"save path '{folder}' is in use by {holder}; wait until it ends, or choose another --save_path"
                    ) from None
                self.path.unlink(missing_ok=True)
                self.note = f"note: no file locks in '{folder}' ({error.strerror}); two runs must not use one save path"
                return
            if os.fstat(file.fileno()).st_nlink:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                self._file = file
            else:
                # The run before has removed the file between our open and our lock.
                file.close()

    def release(self) -> None:
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def check_free(folder: Path) -> None:
    """Raises UserError when another run holds the folder; leaves nothing there."""
    if os.access(folder / LOCK_NAME, os.W_OK):
        RunLock(folder).release()
