"""The data sets: those that are read into memory, one record each, and ImageNet, which stays in its files.

To add one whose images are a tree train/<class>/*, test/<class>/*, add its record to RECORDS:

    Spec("tiny64", size=64, classes=20),

Images made by code, or in files of another format, need a second file with a function that returns them: see
`Spec.make` and data/synthetic.py. Nothing else has to change: the scripts' --dataset lists these records.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import cifar
from data.cache import Arrays
from data.image_files import ImageFiles
from data.image_trees import find_tree, list_tree, read_tree
from data.images import ImageArrays
from data.synthetic import make_synthetic
from utils.base.errors import UserError

# Height and width of images whose size the user chooses: the default and the range.
DEFAULT_SIZE, SIZES = 32, range(32, 1025)


@dataclass(frozen=True)
class Spec:
    """What is known of a data set before it is read.

    Attributes:
        size: height and width of its images; None: chosen by the user.
        classes: their number; None: as many as there are.
        mean, std: per channel, over 255; None: measured on the training images.
        make: returns the images (see data.cache.Arrays), given the data path; None: they are read from a tree.
    """

    name: str
    size: int | None
    classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    make: Callable[[Path], Arrays] | None = None


RECORDS = (
    Spec("cifar10", 32, 10, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    Spec("cifar100", 32, 100, (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    Spec("folder", None),
    Spec("synthetic", 32, 10, make=make_synthetic),
)
DATASETS = {spec.name: spec for spec in RECORDS}


@dataclass
class Data:
    """A data set ready to train on: training images (augmented) and test images, class names in label order.

    `source` names where the images came from.
    """

    name: str
    train: ImageArrays | ImageFiles
    test: ImageArrays | ImageFiles
    classes: list[str]
    source: str

    @property
    def normalisation(self) -> dict[str, list[float]]:
        """{"mean", "std"} per channel, as shares of 1."""
        return {"mean": self.train.mean.tolist(), "std": self.train.std.tolist()}

    def normalise_as(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Replaces mean and std of both parts, for a network that was trained with others."""
        for part in (self.train, self.test):
            part.mean, part.std = (torch.tensor(values, dtype=torch.float32) for values in (mean, std))


def load(name: str, path: str | os.PathLike, *, seed: int = 0, size: int | None = None, download: bool = True) -> Data:
    """Reads a data set into memory.

    Args:
        name: a key of DATASETS. "folder": any image tree.
        path: holds an image tree train/<class>/*, test/<class>/* (or val/), itself or in a folder named as the data
            set, or torchvision's files of CIFAR.
        seed: of the augmentation.
        size: height and width for "folder", 32 and more (32); other data sets have their own. Images of another size
            are scaled on their shorter side and the centre is cut out. The training augmentation pads size/8 zeros.
        download: fetch CIFAR into `path` where it is absent.

    Raises:
        UserError: nothing readable at the path, a corrupt image, no network, a size out of range.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set '{name}'; choose from {', '.join(DATASETS)}")
    spec, path = DATASETS[name], Path(path)
    if spec.size is not None and size not in (None, spec.size):
        raise UserError(f"--image_size {size}: the images of {name} are {spec.size}x{spec.size}; leave it out")
    size = spec.size or size or DEFAULT_SIZE
    if spec.size is None and size not in SIZES:
        raise UserError(f"--image_size must be in {SIZES[0]}..{SIZES[-1]}, got {size}")
    if spec.make:
        (arrays, classes), source = spec.make(path), f"{name} images made by code"
        _check_made(spec, arrays, classes)
    else:
        found = find_or_download(name, path, download=download)
        if isinstance(found, tuple):
            (arrays, classes), source = _read_tree(spec, found, size), f"image tree {found[0].parent}"
        else:
            arrays, classes = cifar.read_files(name, found)
            source = f"torchvision's files in {found / cifar.FILES[name][1]}"
    if spec.mean is not None:
        mean, std = ([value / 255 for value in values] for values in (spec.mean, spec.std))
    else:
        mean, std = _channel_statistics(arrays["train"][0])
    train = ImageArrays(*arrays["train"], mean, std, augment=True, seed=seed)
    test = ImageArrays(*arrays["test"], mean, std, augment=False, seed=seed)
    return Data(name, train, test, classes, source)


def _check_made(spec: Spec, arrays: Arrays, classes: list[str]) -> None:
    """Raises UserError where Spec.make has not returned what its record promises."""
    shape = (3, spec.size, spec.size)
    if set(arrays) != {"train", "test"} or spec.classes not in (None, len(classes)):
        found = f"{', '.join(arrays)} with {len(classes)} classes"
        raise UserError(
            f"data set {spec.name}: make must return train and test with {spec.classes} classes, got {found}"
        )
    for split, (images, labels) in arrays.items():
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != shape:
            found = f"{images.dtype} {tuple(images.shape)}"
            raise UserError(f"data set {spec.name}: {split} images must be torch.uint8 (N, *{shape}), got {found}")
        if labels.dtype != torch.int64 or not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            found = f"{labels.dtype} in {int(labels.min())}..{int(labels.max())}"
            raise UserError(
                f"data set {spec.name}: {split} labels must be torch.int64 below {len(classes)}, got {found}"
            )


def load_imagenet(path: str | os.PathLike, *, size: int = 224, seed: int = 0, on_bad_image: str = "skip") -> Data:
    """ImageNet, or any tree of images of ordinary size; files are listed, nothing is decoded yet.

    Args:
        path: holds train/<class>/ and val/<class>/ (or test/<class>/).
        size, seed, on_bad_image: see ImageFiles.

    Raises:
        UserError: no such tree, as where ImageNet's archives are not unpacked.
    """
    # The images in ImageNet's test/ have no published labels.
    found = find_tree(Path(path), ("val", "test"))
    if not found:
        expected = f"{path}/train/<class>/<image> and {path}/val/<class>/<image>"
        raise cifar.NoData(f"no image tree at '{path}': expected {expected}")
    files, classes = list_tree(*found)
    options, parts = dict(size=size, seed=seed, on_bad_image=on_bad_image), []
    for split, folder in zip(("train", "test"), found, strict=True):
        names = [file.removeprefix(f"{folder}{os.sep}") for file, _ in files[split]]
        labels = [label for _, label in files[split]]
        parts.append(ImageFiles(folder, names, labels, augment=split == "train", **options))
    return Data("imagenet", *parts, classes, f"image tree {path}")


def find_or_download(name: str, path: str | os.PathLike, *, download: bool = True) -> tuple[Path, Path] | Path:
    """Where the images are: the two folders of an image tree, or torchvision's root, downloaded where absent.

    Raises:
        NoData: nothing is there and nothing could be downloaded.
    """
    path, torchvisions = Path(path), name in cifar.FILES
    found = find_tree(path) or find_tree(path / name) or (torchvisions and cifar.find_files(name, path))
    if found:
        return found
    if torchvisions and download:
        return cifar.download(name, path)
    expected = f"{path}/{cifar.FILES[name][1]}, or " if torchvisions else ""
    expected += f"{path}/train/<class>/<image> and {path}/test/<class>/<image>"
    raise cifar.NoData(f"no images of {name} at '{path}': expected {expected}")


def _read_tree(spec: Spec, found: tuple[Path, Path], size: int) -> Arrays:
    files, classes = list_tree(*found)
    if spec.classes not in (None, len(classes)):
        counts = f"'{found[0]}' has {len(classes)} class folders, {spec.name} has {spec.classes}"
        raise UserError(f"{counts}; for images of your own use --dataset folder")
    return read_tree(found[0].parent, (files, classes), size)


def _channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel over all pixels, as shares of 1."""
    # By histogram: exact, and without a float copy of the images.
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
    shares = torch.stack(counts).double() / (images.numel() / images.shape[1])
    mean = shares @ levels
    std = (shares @ levels.square() - mean.square()).clamp_min(1e-8).sqrt()
    return mean.tolist(), std.tolist()
