"""Keeps the pixels of a decoded image tree in one file beside it, so that later runs start within seconds.

`.ahsg_cache_<size>.pt` is written and read as checkpoints are: atomically, with a checksum, without running code. It is
used only while the names, sizes and modification times of all images have the fingerprint that is stored in it.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError

# Part of every fingerprint: change it when the same source files are to give other pixels.
CACHE_FORMAT = "ahsg-ht cache 3"
# {split: (uint8 images (N, 3, size, size), int64 labels (N,))} and class names in label order.
Arrays = tuple[dict[str, tuple[Tensor, Tensor]], list[str]]


def fingerprint(files: Iterable[tuple[str, os.stat_result]]) -> str:
    """SHA-256 over (name, size, modification time in ns) of files, in the order given."""
    digest = hashlib.sha256(CACHE_FORMAT.encode())
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
    try:
        stored = checkpoints.read(path)
        if stored.get("source") == source:
            tensors = stored["state_dict"]
            return {s: (tensors[f"{s}.images"], tensors[f"{s}.labels"]) for s in stored["splits"]}, stored["classes"]
    except UserError:
        pass  # absent or damaged: the images are decoded again
    splits, classes = read()
    tensors = {f"{s}.{n}": t for s, both in splits.items() for n, t in zip(("images", "labels"), both, strict=True)}
    content = {"state_dict": tensors, "source": source, "splits": list(splits), "classes": classes}
    try:
        checkpoints.write(content, path)
        print(f"the images are kept in {path}")
    except UserError as error:
        print(f"note: {error}; each run decodes the images")
    return splits, classes
