"""Keeps the pixels of a data set that was read once in one file, so that later runs start within seconds.

The file lies next to the data (`.ahsg_cache_<kind>_32x32.npz`: NumPy's own format, plain arrays, no pickle), or in the user's
cache folder where the data folder cannot be written. It holds a fingerprint of the names, sizes and modification times of
all source files, and is used only while that is still theirs; otherwise, or when it is damaged, the images are read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Part of every fingerprint: raise it when the same source files are to give other pixels.
FORMAT = "ahsg-ht cache 1"
# Age, in seconds, of temporary files that a killed process has left behind.
STALE_SECONDS = 3600
SPLITS = ("train", "test")
# {split: (uint8 images (N, 3, H, W), int64 labels (N,))} and class names in label order.
Arrays = tuple[dict[str, tuple[Tensor, Tensor]], list[str]]
# What NumPy and zipfile raise, among them, on whatever bytes a damaged file may hold.
DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def fingerprint(files: Iterable[tuple[str, os.stat_result]]) -> str:
    """SHA-256 over (name, size, modification time in ns) of files, in the order given."""
    digest = hashlib.sha256(FORMAT.encode())
    for name, stat in files:
        digest.update(f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_cached(folder: Path, kind: str, mark: str, size: int, read: Callable[[], Arrays]) -> Arrays:
    """The arrays of a cache that fits the source, or else those of `read()`, which are then cached.

    Failing to write is no error: a line says so, and the next run reads the images again.

    Args:
        folder: where the data lie.
        kind: part of the file's name: which of the sources in this folder.
        mark: the source's fingerprint, taken before anything is read, so that a file changed meanwhile is noticed next time.
        size: height and width of the images.
        read: reads the source.
    """
    paths = [folder / f".ahsg_cache_{kind}_{size}x{size}.npz"]
    fallback = user_cache_folder()
    if fallback is not None:
        owner = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
        paths.append(fallback / f"{kind}_{size}x{size}_{owner}.npz")
    for path in paths:
        arrays = load(path, mark, size)
        if arrays is not None:
            return arrays
    arrays = read()
    count = sum(len(labels) for _, labels in arrays[0].values())
    for path in paths:
        if save(path, mark, arrays):
            print(f"{count} images were read and are kept in {path}", flush=True)
            return arrays
    tried = " nor ".join(str(path.parent) for path in paths)
    print(
        f"note: the images could not be cached (neither {tried} can be written), each run reads them again", flush=True
    )
    return arrays


def user_cache_folder() -> Path | None:
    """$XDG_CACHE_HOME/ahsg-ht or ~/.cache/ahsg-ht; None for a user without a home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "ahsg-ht"
    except RuntimeError:
        return None


def load(path: Path, mark: str, size: int) -> Arrays | None:
    """The arrays in a cache file; None where it is absent, damaged, or of another fingerprint."""
    try:
        # Uncompressed, as `save` writes it: a small file must not unpack to a large one.
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                return None
        # zipfile compares the checksum of every array that is read to its end.
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["fingerprint"]) != mark:
                return None
            classes = [str(name) for name in stored["classes"]]
            arrays = {}
            for split in SPLITS:
                images, labels = stored[f"{split}_images"], stored[f"{split}_labels"]
                sound = images.dtype == np.uint8 and images.shape == (len(labels), 3, size, size)
                if not sound or labels.dtype != np.int64 or (labels >= len(classes)).any() or (labels < 0).any():
                    return None
                arrays[split] = torch.from_numpy(images), torch.from_numpy(labels)
    except DAMAGE:
        return None
    return arrays, classes


def save(path: Path, mark: str, arrays: Arrays) -> bool:
    """Writes a cache file atomically; False where the folder is read-only, the disk full, or the like."""
    splits, classes = arrays
    content = {"fingerprint": np.array(mark), "classes": np.array(classes, dtype=np.str_)}
    for split in SPLITS:
        content[f"{split}_images"], content[f"{split}_labels"] = (tensor.numpy() for tensor in splits[split])
    # A name of its own for every process, also on several machines that share the disk.
    temporary = path.with_name(f"{path.name}.{os.getpid()}_{secrets.token_hex(4)}.tmp")
    try:
        # Of folders only the last ones of the user's cache are made: the data folder is there.
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        with open(temporary, "xb") as file:
            np.savez(file, **content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        _remove(temporary)
        return False
    except BaseException:
        _remove(temporary)
        raise
    return True


def _remove_stale(path: Path) -> None:
    for left_over in path.parent.glob(f"{path.name}.*.tmp"):
        try:
            if time.time() - left_over.stat().st_mtime > STALE_SECONDS:
                left_over.unlink()
        except OSError:
            continue


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
