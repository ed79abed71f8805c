"""Keeps the pixels of a decoded image tree in one file beside it, so that later runs start within seconds.

`.ahsg_cache_<size>.pt` is written by torch.save and read with weights_only. It is used only while its pixels have the
checksum, and the names, sizes and modification times of all images the fingerprint that are stored with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

# Part of every fingerprint: change it when the same source files are to give other pixels.
FORMAT = "ahsg-ht cache 2"
# {split: (uint8 images (N, 3, size, size), int64 labels (N,))} and class names in label order.
Arrays = tuple[dict[str, tuple[Tensor, Tensor]], list[str]]


def fingerprint(files: Iterable[tuple[str, os.stat_result]]) -> str:
    """SHA-256 over (name, size, modification time in ns) of files, in the order given."""
    digest = hashlib.sha256(FORMAT.encode())
    for name, stat in files:
        digest.update(f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_cached(folder: Path, source: str, size: int, read: Callable[[], Arrays]) -> Arrays:
    """The arrays of a cache in `folder` that fits the source, else those of `read()`, which are then cached.

    Args:
        source: fingerprint, taken before anything is read, so that a file changed meanwhile is noticed next time.
        size: height and width of the images.
    """
    path = folder / f".ahsg_cache_{size}.pt"
    arrays = _load(path, source)
    if arrays is None:
        arrays = read()
        kept = _save(path, source, arrays)
        print(f"the images are kept in {path}" if kept else f"note: cannot write '{path}', each run decodes the images")
    return arrays


def _load(path: Path, source: str) -> Arrays | None:
    try:
        stored = torch.load(path, weights_only=True)
        intact = stored["source"] == source and stored["checksum"] == _checksum(stored["arrays"])
        return stored["arrays"] if intact else None
    except (
        Exception
    ):  # absent, or damaged, which makes the unpickler raise almost anything: the images are decoded again
        return None


def _checksum(arrays: Arrays) -> int:
    """torch.load does not notice a changed bit of a tensor."""
    checksum = 0
    for images, labels in arrays[0].values():
        checksum = zlib.crc32(labels.numpy(), zlib.crc32(images.numpy(), checksum))
    return checksum


def _save(path: Path, source: str, arrays: Arrays) -> bool:
    """Atomically; False where the folder is not writable or the disk full."""
    # A name of its own for every process, also on several machines that share the disk.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            torch.save({"source": source, "checksum": _checksum(arrays), "arrays": arrays}, file)
        os.replace(temporary, path)
        return True
    except (OSError, RuntimeError):  # torch's writer turns some of the system's errors into a RuntimeError
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
