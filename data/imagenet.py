"""ImageNet, or any tree of images train/<class>/*, val/<class>/* of ordinary size."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from data.cifar import NoData
from data.image_files import ImageFiles
from data.image_trees import IMAGE_SUFFIXES, find_tree, list_tree
from data.sources import Data
from utils.base.errors import UserError


def load_imagenet(
    path: str | os.PathLike, *, size: int = 224, seed: int = 0, on_bad_image: str = "skip", name: str = "imagenet"
) -> Data:
    """Lists the files of a tree; nothing is decoded yet.

    Args:
        path: holds train/<class>/ and val/<class>/ (or test/<class>/).
        size, seed, on_bad_image: see ImageFiles.

    Raises:
        UserError: no such tree; archives that are not unpacked; the line gives the command that does it.
    """
    path = Path(path)
    refuse_archives(path)
    # The images in ImageNet's test/ have no published labels.
    found = find_tree(path, ("val", "test"))
    if not found:
        raise NoData(f"no image tree at '{path}': expected {path}/train/<class>/<image> and {path}/val/<class>/<image>")
    files, classes = list_tree(*found)
    train, test = (
        ImageFiles(
            folder,
            [os.path.join(classes[label], entry.name) for entry, label in files[split]],
            [label for _, label in files[split]],
            size=size,
            augment=split == "train",
            seed=seed,
            on_bad_image=on_bad_image,
        )
        for split, folder in zip(("train", "test"), found, strict=True)
    )
    return Data(name, train, test, classes, f"image tree {path}")


def refuse_archives(path: Path) -> None:
    """Raises UserError where ImageNet is as it is distributed: two tar files, one per class, images without classes."""
    place = shlex.quote(str(path))
    outer = sorted(path.glob("ILSVRC2012_img_*.tar"))
    if outer and not (path / "train").is_dir():
        unpack = " && ".join(f"tar -xf {place}/ILSVRC2012_img_{s}.tar -C {place}/{s}" for s in ("train", "val"))
        raise UserError(f"'{outer[0]}' is not unpacked; this does it: mkdir -p {place}/train {place}/val && {unpack}")
    for folder in filter(Path.is_dir, (path / "train", path / "val")):
        with os.scandir(folder) as entries:
            files = sorted(e.name for e in entries if e.is_file() and not e.name.startswith("."))
        archives = [name for name in files if name.endswith((".tar", ".tar.gz", ".tgz"))]
        if archives:
            unpack = 'for f in *.tar*; do mkdir -p "${f%%.*}" && tar -xf "$f" -C "${f%%.*}" && rm "$f"; done'
            raise UserError(
                f"'{folder}' holds {len(archives)} archives ({archives[0]}, ...), one per class; this unpacks them "
                f"into class folders: cd {shlex.quote(str(folder))} && {unpack}"
            )
        if any(name.lower().endswith(IMAGE_SUFFIXES) for name in files):
            raise UserError(
                f"'{folder}' holds images without class folders ({files[0]}, ...), expected {folder}/<class>/<image>; "
                "move each image into the folder of its class (ImageNet's development kit lists the labels)"
            )
