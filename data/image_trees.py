"""Trees of images train/<class>/<image>, test/<class>/<image> (or val/); labels number the sorted class names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.cache import Arrays, fingerprint, read_cached
from data.image_files import read_rgb
from utils.base.errors import UserError
from utils.base.torchvision_import import import_torchvision

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
# Bytes of decoded images that a process keeps in memory at most.
MEMORY_LIMIT = 4 * 10**9
# {split: [(file, label)]} in the order of classes and names, and the class names.
Tree = tuple[dict[str, list[tuple[os.DirEntry, int]]], list[str]]


def find_tree(path: Path, tests: tuple[str, ...] = ("test", "val")) -> tuple[Path, Path] | None:
    """The training folder of a tree and the first of its `tests` folders, or None."""
    for test in tests:
        if (path / "train").is_dir() and (path / test).is_dir():
            return path / "train", path / test
    return None


def list_tree(train: Path, test: Path) -> Tree:
    """Lists the files of a tree.

    Raises:
        UserError: no class folders, an empty one, or other ones in `test` than in `train`.
    """
    folders = {"train": class_folders(train), "test": class_folders(test)}
    classes = list(folders["train"])
    unmatched = sorted(set(classes) ^ set(folders["test"]))
    if unmatched:
        names = ", ".join(unmatched[:5])
        raise UserError(f"'{train}' and '{test}' must have the same class folders; only one has: {names}")
    files = {
        split: [(entry, label) for label, name in enumerate(classes) for entry in by_class[name]]
        for split, by_class in folders.items()
    }
    return files, classes


def class_folders(folder: Path) -> dict[str, list[os.DirEntry]]:
    """{class name: image files}, both sorted by name."""
    found = {}
    for entry in _visible(folder):
        if entry.is_dir():
            found[entry.name] = [file for file in _visible(entry.path) if file.name.lower().endswith(IMAGE_SUFFIXES)]
            if not found[entry.name]:
                suffixes = ", ".join(IMAGE_SUFFIXES)
                raise UserError(f"class folder '{entry.path}' has no images ({suffixes}); fill it or remove it")
    if not found:
        raise UserError(f"'{folder}' has no class folders; expected {folder}/<class>/<image>")
    return found


def _visible(folder: str | os.PathLike) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def read_tree(root: Path, tree: Tree, size: int) -> Arrays:
    """Decodes the tree at `root` into memory, or reads what was cached of it; see data.cache.

    Raises:
        UserError: an image that cannot be read; more than MEMORY_LIMIT.
    """
    splits, classes = tree
    entries = [(split, classes[label], entry) for split, files in splits.items() for entry, label in files]
    needed = len(entries) * 3 * size * size
    if needed > MEMORY_LIMIT:
        raise UserError(
            f"the {len(entries)} images of '{root}' take {needed / 1e9:.1f} GB at {size}x{size}, at most "
            f"{MEMORY_LIMIT / 1e9:g} are kept in memory; use a smaller --image_size, or imagenet_resnet_test.py, which "
            "decodes images when they are needed"
        )
    try:
        stats = [(f"{split}/{name}/{entry.name}", entry.stat()) for split, name, entry in entries]
    except OSError as error:
        raise UserError(f"cannot read the image '{error.filename}' ({error.strerror}); repair or remove it") from None
    return read_cached(root, fingerprint(stats), size, lambda: _decode_tree(tree, size))


def _decode_tree(tree: Tree, size: int) -> Arrays:
    splits, classes = tree
    arrays = {}
    for split, files in splits.items():
        images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
        # One after another: decoding small images hardly leaves the interpreter's lock, threads made it twice as slow.
        for i, (entry, _) in enumerate(files):
            images[i] = read_square(entry.path, size)
        arrays[split] = images, torch.tensor([label for _, label in files])
    return arrays, classes


def read_square(file: str, size: int) -> Tensor:
    """uint8 (3, size, size): the shorter side scaled to `size`, the centre cut out."""
    image = read_rgb(file, size)
    if image.size != (size, size):
        functional = import_torchvision().transforms.functional
        image = functional.center_crop(functional.resize(image, size), size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
