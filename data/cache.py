"""Keeps the pixels of a decoded image tree in one file beside it, so that later runs start within seconds.

The file `.ahsg_cache_<size>.bin` is a line of JSON, then the arrays' bytes. The line holds a checksum of these bytes and
a fingerprint of the names, sizes and modification times of all images: where one differs, they are decoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Part of every fingerprint: change it when the same source files are to give other pixels.
FORMAT = "ahsg-ht cache 2"
SPLITS = ("train", "test")
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
    path = folder / f".ahsg_cache_{size}.bin"
    arrays = load(path, source, size)
    if arrays is None:
        arrays = read()
        kept = save(path, source, arrays)
        print(
            f"the images are kept in {path}"
            if kept
            else f"note: '{folder}' is not writable, each run decodes the images"
        )
    return arrays


def load(path: Path, source: str, size: int) -> Arrays | None:
    """The arrays in a cache file; None where it is absent, damaged, or of another fingerprint."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline(1 << 24))
            if header["fingerprint"] != source:
                return None
            content = np.fromfile(file, dtype=np.uint8)
        if header["crc32"] != zlib.crc32(content):
            return None
        arrays, begin = {}, 0
        for split in SPLITS:
            count = header[split]
            middle, end = begin + 8 * count, begin + (8 + 3 * size * size) * count
            labels, images = content[begin:middle].view(np.int64), content[middle:end].reshape(count, 3, size, size)
            arrays[split] = torch.from_numpy(images), torch.from_numpy(labels)
            begin = end
        return (arrays, header["classes"]) if begin == len(content) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(path: Path, source: str, arrays: Arrays) -> bool:
    """Writes a cache file atomically; False where the folder is not writable or the disk full."""
    splits, classes = arrays
    parts = [tensor.numpy() for split in SPLITS for tensor in reversed(splits[split])]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    header = {"fingerprint": source, "crc32": checksum, "classes": classes}
    header |= {split: len(splits[split][1]) for split in SPLITS}
    # A name of its own for every process, also on several machines that share the disk.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            file.writelines(parts)
        os.replace(temporary, path)
        return True
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
