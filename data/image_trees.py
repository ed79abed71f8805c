"""Trees of images train/<class>/<image>, test/<class>/<image> (or val/); labels number the sorted class names."""

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
# {split: [(path, label)]} in the order of classes and names, and the class names.
Tree = tuple[dict[str, list[tuple[str, int]]], list[str]]


def find_tree(path: Path, tests: tuple[str, ...] = ("test", "val")) -> tuple[Path, Path] | None:
    """The training folder of a tree and the first of its `tests` folders, or None."""
    for test in tests:
        if (path / "train").is_dir() and (path / test).is_dir():
            return path / "train", path / test
    return None


def list_tree(train: Path, test: Path) -> Tree:
    """Lists the files of a tree; names that begin with a dot are left out.

    Raises:
        UserError: no class folders, an empty one, or other ones in `test` than in `train`.
    """
    folder = import_torchvision().datasets.folder
    files, names = {}, {}
    for split, root in (("train", train), ("test", test)):
        try:
            names[split] = [name for name in folder.find_classes(root)[0] if not name.startswith(".")]
            numbers = {name: label for label, name in enumerate(names[split])}
            files[split] = folder.make_dataset(root, numbers, is_valid_file=_is_image)
        except (FileNotFoundError, ValueError) as error:
            reason = f"{str(error).strip(' .')}: no images ({', '.join(IMAGE_SUFFIXES)})"
            raise UserError(f"{reason}, expected {root}/<class>/<image>") from None
    if unmatched := sorted(set(names["train"]) ^ set(names["test"])):
        both = f"'{train}' and '{test}' must have the same class folders"
        raise UserError(f"{both}; only one has: {', '.join(unmatched[:5])}")
    return files, names["train"]


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES) and not os.path.basename(path).startswith(".")


def read_tree(root: Path, tree: Tree, size: int) -> Arrays:
    """Decodes the tree at `root` into memory, or reads what was cached of it; see data.cache.

    Raises:
        UserError: an image that cannot be read; more than MEMORY_LIMIT.
    """
    paths = [path for files in tree[0].values() for path, _ in files]
    needed = len(paths) * 3 * size * size
    if needed > MEMORY_LIMIT:
        raise UserError(
            f"the {len(paths)} images of '{root}' take {needed / 1e9:.1f} GB at {size}x{size}, at most "
            f"{MEMORY_LIMIT / 1e9:g} are kept in memory; use a smaller --image_size, or imagenet_resnet_test.py, which "
            "decodes images when they are needed"
        )
    try:
        stats = [(path.removeprefix(str(root)), os.stat(path)) for path in paths]
    except OSError as error:
        raise UserError(f"cannot read the image '{error.filename}' ({error.strerror}); repair or remove it") from None
    return read_cached(root, fingerprint(stats), size, lambda: _decode_tree(tree, size))


def _decode_tree(tree: Tree, size: int) -> Arrays:
    splits, classes = tree
    arrays = {}
    for split, files in splits.items():
        images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
        # One after another: decoding small images hardly leaves the interpreter's lock, threads made it twice as slow.
        for i, (path, _) in enumerate(files):
            images[i] = read_square(path, size)
        arrays[split] = images, torch.tensor([label for _, label in files])
    return arrays, classes


def read_square(file: str, size: int) -> Tensor:
    """uint8 (3, size, size): the shorter side scaled to `size`, the centre cut out."""
    image = read_rgb(file)
    if image.size != (size, size):
        functional = import_torchvision().transforms.functional
        image = functional.center_crop(functional.resize(image, size), size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
