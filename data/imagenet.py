"""ImageNet, or any tree of images train/<class>/*, val/<class>/* of ordinary size."""

import os
from pathlib import Path

from data.cifar import NoData
from data.image_files import ImageFiles
from data.image_trees import find_tree, list_tree
from data.sources import Data


def load_imagenet(path: str | os.PathLike, *, size: int = 224, seed: int = 0, on_bad_image: str = "skip") -> Data:
    """Lists the files of a tree; nothing is decoded yet.

    Args:
        path: holds train/<class>/ and val/<class>/ (or test/<class>/).
        size, seed, on_bad_image: see ImageFiles.

    Raises:
        UserError: no such tree, as where ImageNet's archives are not unpacked.
    """
    path = Path(path)
    # The images in ImageNet's test/ have no published labels.
    found = find_tree(path, ("val", "test"))
    if not found:
        raise NoData(f"no image tree at '{path}': expected {path}/train/<class>/<image> and {path}/val/<class>/<image>")
    files, classes = list_tree(*found)
    train, test = (
        ImageFiles(
            folder,
            [file.removeprefix(f"{folder}{os.sep}") for file, _ in files[split]],
            [label for _, label in files[split]],
            size=size,
            augment=split == "train",
            seed=seed,
            on_bad_image=on_bad_image,
        )
        for split, folder in zip(("train", "test"), found, strict=True)
    )
    return Data("imagenet", train, test, classes, f"image tree {path}")
