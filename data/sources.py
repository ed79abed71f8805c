"""Finds, downloads and reads the image sets of the CIFAR script.

A data path may hold torchvision's own files (cifar-10-batches-py, cifar-100-python) or a tree of images
train/<class>/*, test/<class>/* (or val/), in the path itself or in a folder named as the data set. Classes are sorted by name.
What was read once is cached; see data.cache.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.cache import Arrays, fingerprint, read_cached
from data.image_size import check_declared_size
from data.images import ImageArrays
from data.synthetic import CLASSES as SYNTHETIC_CLASSES
from data.synthetic import make_images
from utils.base.errors import UserError
from utils.base.files import PROBE_SECONDS, answers
from utils.base.torchvision_import import import_torchvision

SIZE = 32
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class NoData(UserError):
    """No images at the data path, and none could be downloaded."""


@dataclass(frozen=True)
class Spec:
    """What is known of a data set before it is read. mean, std over 255; None: measured on the training images."""

    classes: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    torchvision_class: str | None = None
    torchvision_folder: str | None = None


DATASETS = {
    "cifar10": Spec(10, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7), "CIFAR10", "cifar-10-batches-py"),
    "cifar100": Spec(100, (129.3, 124.1, 112.4), (68.2, 65.4, 70.4), "CIFAR100", "cifar-100-python"),
    "folder": Spec(None, None, None),
    "synthetic": Spec(SYNTHETIC_CLASSES, None, None),
}
SYNTHETIC_SIZES = {"train": 10_000, "test": 2_000}


@dataclass
class Data:
    """A data set ready to train on.

    Attributes:
        train, test: ImageArrays, training with augmentation.
        classes: class names in label order.
        source: where the images came from, in words.
    """

    name: str
    train: ImageArrays
    test: ImageArrays
    classes: list[str]
    source: str


def load(name: str, path: str | os.PathLike, *, seed: int = 0, download: bool = True) -> Data:
    """Reads a data set into memory.

    Args:
        name: a key of DATASETS. "folder": any image tree; its images are scaled to 32x32 and normalised by their own mean and std.
        path: the data path; see the module's text.
        seed: of the augmentation.
        download: fetch CIFAR into `path` where it is absent.

    Raises:
        UserError: nothing readable at the path, a corrupt image, no network; the line says what to do.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set '{name}'; choose from {', '.join(DATASETS)}")
    spec = DATASETS[name]
    path = Path(path)
    if name == "synthetic":
        arrays = {split: make_images(n, seed=1 + i) for i, (split, n) in enumerate(SYNTHETIC_SIZES.items())}
        classes, source = [f"pattern{i}" for i in range(SYNTHETIC_CLASSES)], "synthetic images made by code"
    else:
        found = find_or_download(name, path, download=download)
        if isinstance(found, tuple):
            arrays, classes = _read_tree(found, name, spec)
            source = f"image tree {found[0].parent}"
        else:
            arrays, classes = _read_torchvision_files(found, name, spec)
            source = f"torchvision's files in {found / spec.torchvision_folder}"
    if spec.mean is not None:
        mean, std = ([value / 255 for value in values] for values in (spec.mean, spec.std))
    else:
        mean, std = _channel_statistics(arrays["train"][0])
    datasets = {
        split: ImageArrays(images, labels, mean, std, augment=split == "train", seed=seed)
        for split, (images, labels) in arrays.items()
    }
    return Data(name, datasets["train"], datasets["test"], classes, source)


def find_or_download(name: str, path: str | os.PathLike, *, download: bool = True) -> tuple[Path, Path] | Path:
    """Where the images are: the two folders of an image tree, or torchvision's root, downloaded where absent.

    Raises:
        NoData: nothing is there and nothing could be downloaded.
    """
    path, spec = Path(path), DATASETS[name]
    found = find_tree(name, path) or find_torchvision_files(name, path)
    if found is not None:
        return found
    expected = f"{path}/train/<class>/<image> and {path}/test/<class>/<image>"
    if spec.torchvision_class is None:
        raise NoData(f"no image tree at '{path}': expected {expected}")
    if not download:
        raise NoData(f"no {name} at '{path}': expected {path}/{spec.torchvision_folder}, or {expected}")
    return _download(name, path, spec)


def find_tree(name: str, path: Path) -> tuple[Path, Path] | None:
    """(training folder, test folder) of an image tree in path or path/name, or None."""
    for base in (path, path / name):
        for test in ("test", "val"):
            if (base / "train").is_dir() and (base / test).is_dir():
                return base / "train", base / test
    return None


def find_torchvision_files(name: str, path: Path) -> Path | None:
    """The root to give to torchvision when its unpacked files are in `path`, or are `path` itself."""
    folder = DATASETS[name].torchvision_folder
    if folder is None:
        return None
    if (path / folder).is_dir():
        return path
    return path.parent if path.name == folder and path.is_dir() else None


def _download(name: str, path: Path, spec: Spec) -> Path:
    dataset_class = getattr(import_torchvision().datasets, spec.torchvision_class)
    remedy = (
        f"put {spec.torchvision_folder} or an image tree (train/<class>/*, test/<class>/*) into '{path}', name another data path, "
        "or use --dataset synthetic to try the software"
    )
    if path.exists() and not path.is_dir():
        raise NoData(f"data path '{path}' is not a folder; {remedy}")
    if path.parts and not path.parent.exists() and not path.exists():
        raise NoData(f"data path '{path}' does not exist, nor does the folder that it would be made in; {remedy}")
    print(f"no {name} in '{path}': downloading it there", flush=True)
    if not answers(dataset_class.url):
        raise NoData(f"no {name} in '{path}', and its download does not answer within {PROBE_SECONDS} s; {remedy}")
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise NoData(f"cannot make the data path '{path}': {error.strerror}; {remedy}") from None
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PROBE_SECONDS)
    try:
        dataset_class(str(path), download=True)
    except (OSError, RuntimeError) as error:
        raise NoData(f"the download of {name} failed ({error}); {remedy}") from None
    finally:
        socket.setdefaulttimeout(previous)
    return path


def _read_torchvision_files(root: Path, name: str, spec: Spec) -> Arrays:
    with os.scandir(root / spec.torchvision_folder) as entries:
        mark = fingerprint(sorted(((e.name, e.stat()) for e in entries if e.is_file()), key=lambda pair: pair[0]))
    return read_cached(root, name, mark, SIZE, lambda: _unpack_torchvision_files(root, spec))


def _unpack_torchvision_files(root: Path, spec: Spec) -> Arrays:
    dataset_class = getattr(import_torchvision().datasets, spec.torchvision_class)
    arrays = {}
    for split in ("train", "test"):
        try:
            # torchvision compares checksums before it unpickles anything.
            dataset = dataset_class(str(root), train=split == "train", download=False)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"the files in '{root / spec.torchvision_folder}' are incomplete or damaged ({error}); remove that folder to download it again"
            ) from None
        arrays[split] = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)
    return arrays, list(dataset.classes)


def _read_tree(tree: tuple[Path, Path], name: str, spec: Spec) -> Arrays:
    folders = {split: class_folders(folder) for split, folder in zip(("train", "test"), tree, strict=True)}
    classes = sorted(folders["train"])
    if sorted(folders["test"]) != classes:
        odd = sorted(set(classes) ^ set(folders["test"]))
        raise UserError(
            f"'{tree[0]}' and '{tree[1]}' must have the same class folders; only one has: {', '.join(odd[:5])}"
        )
    if spec.classes is not None and len(classes) != spec.classes:
        raise UserError(
            f"'{tree[0]}' has {len(classes)} class folders, {name} has {spec.classes}; for images of your own use --dataset folder"
        )
    files = [
        (f"{split}/{c}/{entry.name}", _stat(entry)) for split in folders for c in classes for entry in folders[split][c]
    ]
    return read_cached(tree[0].parent, "tree", fingerprint(files), SIZE, lambda: _decode_tree(folders, classes))


def _stat(entry: os.DirEntry) -> os.stat_result:
    try:
        return entry.stat()
    except OSError as error:
        raise UserError(f"cannot read the image '{entry.path}' ({error.strerror}); mend or remove it") from None


def _decode_tree(folders: dict[str, dict[str, list[os.DirEntry]]], classes: list[str]) -> Arrays:
    arrays = {}
    for split, by_class in folders.items():
        files = [(entry.path, label) for label, c in enumerate(classes) for entry in by_class[c]]
        images = torch.empty(len(files), 3, SIZE, SIZE, dtype=torch.uint8)
        # One after another: decoding such small images hardly leaves the interpreter's lock, threads made it twice as slow.
        for i, (file, _) in enumerate(files):
            images[i] = _read_image(file)
        arrays[split] = images, torch.tensor([label for _, label in files])
    return arrays, classes


def class_folders(folder: Path) -> dict[str, list[os.DirEntry]]:
    """{class name: image files, sorted by name}."""
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir() and not entry.name.startswith("."):
            with os.scandir(entry.path) as contents:
                files = [f for f in contents if f.name.lower().endswith(IMAGE_SUFFIXES) and not f.name.startswith(".")]
            files.sort(key=lambda f: f.name)
            if not files:
                raise UserError(
                    f"class folder '{entry.path}' has no images ({', '.join(IMAGE_SUFFIXES)}); fill it or remove it"
                )
            found[entry.name] = files
    if not found:
        raise UserError(f"'{folder}' has no class folders; expected {folder}/<class>/<image>")
    return found


def _read_image(file: str) -> Tensor:
    """uint8 (3, 32, 32); an image of another size is scaled on its shorter side and cut out of the centre."""
    try:
        with Image.open(file) as image:
            check_declared_size(image, SIZE)
            if image.mode.startswith("I;16"):
                # Pillow's own conversion clips 16-bit grey at 255.
                image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image '{file}' ({error}); mend or remove it") from None
    if image.size != (SIZE, SIZE):
        transforms = import_torchvision().transforms.functional
        image = transforms.center_crop(transforms.resize(image, SIZE), SIZE)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel over all pixels, as shares of 1."""
    # By histogram: exact, and without a float copy of the images.
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack(
        [torch.bincount(images[:, c].flatten(), minlength=256) for c in range(images.shape[1])]
    ).double()
    shares = counts / counts.sum(dim=1, keepdim=True)
    mean = shares @ levels
    std = (shares @ levels.square() - mean.square()).clamp_min(1e-8).sqrt()
    return mean.tolist(), std.tolist()
