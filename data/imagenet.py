"""ImageNet, or any tree of images train/<class>/*, val/<class>/* of ordinary size."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from data.image_files import ImageFiles
from data.sources import Data, NoData, class_folders
from utils.base.errors import UserError


def load_imagenet(
    path: str | os.PathLike, *, size: int = 224, seed: int = 0, on_bad_image: str = "skip", name: str = "imagenet"
) -> Data:
    """Lists the files of a tree; nothing is decoded yet.

    Args:
        path: holds train/<class>/ and val/<class>/ (or test/<class>/). Labels are the numbers of the sorted class names, which is the usual order
            of ImageNet's classes.
        size: height and width of the images handed out.
        seed: of the augmentation.
        on_bad_image: "skip" or "stop"; see ImageFiles.

    Raises:
        UserError: no such tree; archives that are not unpacked; the line gives the command that does it.
    """
    path = Path(path)
    refuse_archives(path)
    train = path / "train"
    test = next((path / split for split in ("val", "test") if (path / split).is_dir()), path / "val")
    if not (train.is_dir() and test.is_dir()):
        raise NoData(f"no image tree at '{path}': expected {path}/train/<class>/<image> and {path}/val/<class>/<image>")
    folders = {split: class_folders(folder) for split, folder in (("train", train), ("test", test))}
    classes = sorted(folders["train"])
    if sorted(folders["test"]) != classes:
        odd = sorted(set(classes) ^ set(folders["test"]))
        raise UserError(f"'{train}' and '{test}' must have the same class folders; only one has: {', '.join(odd[:5])}")
    datasets = {}
    for split, folder in (("train", train), ("test", test)):
        by_class = folders[split]
        files = [os.path.join(c, entry.name) for c in classes for entry in by_class[c]]
        labels = [label for label, c in enumerate(classes) for _ in by_class[c]]
        datasets[split] = ImageFiles(
            folder, files, labels, size=size, augment=split == "train", seed=seed, on_bad_image=on_bad_image
        )
    return Data(name, datasets["train"], datasets["test"], classes, f"image tree {path}")


def refuse_archives(path: Path) -> None:
    """Raises UserError where ImageNet is there as it is handed out: one tar file per class, one of these, or a flat folder."""
    place = shlex.quote(str(path))
    outer = sorted(path.glob("ILSVRC2012_img_*.tar"))
    if outer and not (path / "train").is_dir():
        raise UserError(
            f"'{outer[0]}' is not unpacked; this does it: mkdir -p {place}/train {place}/val && "
            f"tar -xf {place}/ILSVRC2012_img_train.tar -C {place}/train && tar -xf {place}/ILSVRC2012_img_val.tar -C {place}/val"
        )
    for split in ("train", "val"):
        folder = path / split
        if not folder.is_dir():
            continue
        with os.scandir(folder) as entries:
            files = sorted(e.name for e in entries if e.is_file() and not e.name.startswith("."))
        archives = [name for name in files if name.endswith((".tar", ".tar.gz", ".tgz"))]
        if archives:
            raise UserError(
                f"'{folder}' holds {len(archives)} archive{'s' if len(archives) > 1 else ''} ({archives[0]}, ...), one per class; this unpacks them into class "
                f'folders: cd {place}/{split} && for f in *.tar*; do mkdir -p "${{f%%.*}}" && tar -xf "$f" -C "${{f%%.*}}" && rm "$f"; done'
            )
        if any(name.lower().endswith((".jpeg", ".jpg", ".png")) for name in files):
            raise UserError(
                f"'{folder}' holds images themselves ({files[0]}, ...), expected class folders {folder}/<class>/<image>; for ImageNet's validation "
                "images, move each into the folder of its class (the development kit's list of labels says which)"
            )
