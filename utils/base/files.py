"""Writing that survives a crash, a power cut and a full disk: whole files by replacement, lines by appending."""

from __future__ import annotations

import os
from pathlib import Path

from utils.base.errors import UserError


def replace_file(path: Path, content: bytes | memoryview, *, keep: Path | None = None) -> None:
    """Puts `content` at `path` atomically and durably: readers and crashes see the old file or the new one, nothing between.

    Args:
        path: of the file.
        content: all of it.
        keep: where the file that was there before goes; None: it is gone.

    Raises:
        UserError: the disk is full or the folder not writable; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _keep(path, keep)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if keep is not None:
            _second_name(path, keep).unlink(missing_ok=True)
        raise UserError(f"cannot write '{path}' ({error.strerror}); what was there before is intact") from None


def _keep(path: Path, keep: Path) -> None:
    """Gives a file a second name, so that it is there under the first one until that is replaced."""
    second = _second_name(path, keep)
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:
        # No hard links on this file system: for a moment the file is there under the second name only.
        os.replace(path, keep)
        return
    os.replace(second, keep)
    # Where both names were one file already, replacing does nothing and leaves the third.
    second.unlink(missing_ok=True)


def _second_name(path: Path, keep: Path) -> Path:
    return path.with_name(f".{keep.name}.tmp")


def append_line(path: Path, line: str, *, durable: bool = False) -> None:
    """Appends a line, all of it or nothing.

    Args:
        path: of the file, made where absent.
        line: without its newline.
        durable: on the disk when this returns.

    Raises:
        OSError: as the system says; the file ends with the line before.
    """
    # Unbuffered: one write per line, so that a killed process leaves no half of it.
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        content = (line + "\n").encode("utf-8", errors="replace")
        try:
            if file.write(content) != len(content):
                raise OSError(28, "No space left on device")
            if durable:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def end_last_line(path: Path) -> None:
    """Ends a last line that a power cut has left without its newline."""
    if path.exists() and path.stat().st_size:
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def sync_folder(folder: Path) -> None:
    """Makes a renaming in a folder durable; systems that cannot sync folders do it in their own time."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
