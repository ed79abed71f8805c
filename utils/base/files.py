"""Writing that survives a crash, a power cut and a full disk: files by replacement, lines by appending."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from utils.base.errors import UserError

# Seconds after which a server that does not answer is given up.
PROBE_SECONDS = 15
# Ends the names of temporary files, which begin with a dot; what a killed process left is recognised by it.
TEMPORARY = ".ahsg-ht.tmp"


def replace_file(path: Path, content: bytes | memoryview, *, keep: Path | None = None) -> None:
    """Puts `content` at `path` atomically and durably: readers and crashes see the old file or the new one.

    Args:
        keep: the new path of the file that was there before; None: it is deleted.

    Raises:
        UserError: the disk is full or the folder not writable; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    second = None if keep is None else path.with_name(f".{keep.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if second is not None and path.exists():
            second.unlink(missing_ok=True)
            try:
                os.link(path, second)  # so that the file keeps its first name until that is replaced
                os.replace(second, keep)
            except OSError:
                os.replace(path, keep)  # no hard links on this file system
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write '{path}' ({error.strerror}); what was there before is intact") from None
    finally:
        temporary.unlink(missing_ok=True)
        if second is not None:
            second.unlink(missing_ok=True)  # replacing does nothing where both names are one file already


def _sync_folder(folder: Path) -> None:
    """Makes a renaming in a folder durable, on systems that can sync folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Appends a line, given without its newline, completely or not at all.

    Raises:
        OSError: of the system; the file ends with the line before.
    """
    # Unbuffered: one write per line, so that a killed process leaves no half of it.
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        content = (line + "\n").encode("utf-8", errors="replace")
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def end_last_line(path: Path) -> None:
    """Ends a last line that a power cut has left without its newline."""
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        append_line(path, "")


@contextlib.contextmanager
def network_timeout() -> Iterator[None]:
    """Within it a server that does not answer within PROBE_SECONDS is an OSError; torch and torchvision set no
    timeout.
    """
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PROBE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)
