"""CIFAR-10 and CIFAR-100 in torchvision's own files: found, downloaded, read."""

from pathlib import Path

import torch

from data.cache import Arrays
from utils.base.errors import UserError
from utils.base.files import network_timeout
from utils.base.torchvision_import import import_torchvision

# torchvision's class and the folder of its unpacked files.
FILES = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}


class NoData(UserError):
    """No images at the data path, and none could be downloaded."""


def find_files(name: str, path: Path) -> Path | None:
    """The root to give to torchvision when its unpacked files are in `path`, or are `path` itself."""
    folder = FILES[name][1]
    if (path / folder).is_dir():
        return path
    return path.parent if path.name == folder and path.is_dir() else None


def download(name: str, path: Path) -> Path:
    """Downloads and unpacks a data set into `path`, and returns it.

    Raises:
        NoData: the path cannot be written, no network, a server that does not answer.
    """
    class_name, folder = FILES[name]
    dataset_class = getattr(import_torchvision().datasets, class_name)
    remedy = (
        f"put {folder} or an image tree (train/<class>/*, test/<class>/*) into '{path}', name another data path, "
        "or use --dataset synthetic to try the software"
    )
    if not path.is_dir() and (path.exists() or not path.absolute().parent.is_dir()):
        raise NoData(f"data path '{path}' is no folder, and none can be made there; {remedy}")
    print(f"no {name} in '{path}': downloading it there", flush=True)
    try:
        path.mkdir(exist_ok=True)
        with network_timeout():
            dataset_class(str(path), download=True)
    except (OSError, RuntimeError) as error:
        raise NoData(f"the download of {name} into '{path}' failed ({error}); {remedy}") from None
    return path


def read_files(name: str, root: Path) -> Arrays:
    """Images and labels of torchvision's files in `root`.

    Raises:
        UserError: files are missing or damaged.
    """
    class_name, folder = FILES[name]
    dataset_class = getattr(import_torchvision().datasets, class_name)
    arrays = {}
    for split in ("train", "test"):
        try:
            # torchvision compares checksums before it unpickles anything.
            dataset = dataset_class(str(root), train=split == "train", download=False)
        except (RuntimeError, OSError, ValueError) as error:
            fault = f"the files in '{root / folder}' are incomplete or damaged ({error})"
            raise UserError(f"{fault}; remove that folder to download it again") from None
        arrays[split] = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)
    return arrays, list(dataset.classes)
