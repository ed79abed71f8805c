"""Images decoded from their files whenever they are needed: sets too large for memory, ImageNet above all.

Training: torchvision's RandomResizedCrop(size) and RandomHorizontalFlip, with random numbers that depend on (seed,
epoch, index of the image) alone: neither the number of workers and ranks nor an interruption changes them.
Test: Resize to 256 for a size of 224, CenterCrop(size).
"""

import hashlib
import os
import warnings
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.images import ImageSet
from utils.base.errors import UserError
from utils.base.torchvision_import import import_torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ON_BAD_IMAGE = ("skip", "stop")


class BadImage(UserError):
    """The content is no image, is cut short, or declares too many pixels."""

    of_one_rank = True

    def __init__(self, message: str):
        # torch repeats an exception of a worker with the whole traceback as its message; the last line is kept.
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


class UnreadableFile(BadImage):
    """The file system does not deliver the content, which is no property of the image."""


class ImageFiles(ImageSet):
    """Images in files; see the module's text.

    Args:
        root: folder that relative paths start from.
        files: their paths, relative to `root` or absolute.
        labels: as many class numbers.
        size: height and width of the images in a mini-batch.
        augment, seed: see ImageSet.
        on_bad_image: "stop" raises BadImage; "skip" leaves the image out of its mini-batch, see `newly_bad`. Errors of
            the file system (too many open files, a disk that fails) always stop, as UnreadableFile.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        files: Sequence[str],
        labels: Sequence[int],
        *,
        size: int = 224,
        augment: bool,
        seed: int = 0,
        on_bad_image: str = "skip",
    ):
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"on_bad_image must be one of {ON_BAD_IMAGE}, got {on_bad_image!r}")
        super().__init__((3, size, size), MEAN, STD, augment=augment, seed=seed)
        self.root = os.fspath(root)
        # One array, not a million objects: reference counts of these would copy their memory into every worker.
        self.files = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.size = size
        self.on_bad_image = on_bad_image
        # In shared memory, so that this process sees what its workers find.
        self._bad = torch.zeros(len(files), dtype=torch.bool).share_memory_()
        self._reported = torch.zeros(len(files), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.files[index]))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See ImageSet; B is smaller than len(indices) where images were skipped, and may be 0."""
        pixels = torch.empty(len(indices), self.size, self.size, 3, dtype=torch.uint8)
        good = []
        for index in indices:
            try:
                pixels[len(good)] = self._read(index)
                good.append(index)
            except BadImage as error:
                if isinstance(error, UnreadableFile):
                    raise
                if self.on_bad_image == "stop":
                    raise BadImage(f"{error}, or use --on_bad_image skip") from None
                self._bad[index] = True
        return pixels[: len(good)].permute(0, 3, 1, 2), self.labels[torch.tensor(good, dtype=torch.int64)]

    def newly_bad(self) -> list[str]:
        """Paths of the images that this process and its workers have skipped since the last call."""
        fresh = self._bad & ~self._reported
        self._reported |= fresh
        return [self.path(index) for index in fresh.nonzero().flatten().tolist()]

    def _read(self, index: int) -> Tensor:
        """uint8 (size, size, 3)."""
        image = read_rgb(self.path(index))
        # torchvision draws from torch's global generator on the CPU.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(image_seed(self.seed, int(self._epoch), index))
            return torch.from_numpy(np.array(transform(self.size, self.augment)(image)))


@lru_cache
def transform(size: int, augment: bool):
    transforms = import_torchvision().transforms
    if augment:
        return transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()])
    return transforms.Compose([transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)])


def image_seed(seed: int, epoch: int, index: int) -> int:
    """Of the random numbers of one image in one epoch."""
    # Hashed: torch's generator takes the low 32 bits only, which must differ for neighbouring images and epochs.
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch} {index}".encode()).digest()[:4], "little")


def read_rgb(path: str) -> Image.Image:
    """Decodes a file.

    Raises:
        BadImage, UnreadableFile: naming the file.
    """
    try:
        with warnings.catch_warnings():
            # ImageNet has hundreds of files with damaged camera data and intact pixels.
            warnings.simplefilter("ignore")
            # A kilobyte can declare gigabytes of pixels. Pillow warns of them before it decodes.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _decode(path)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        if isinstance(error, OSError) and error.errno is not None:
            raise UnreadableFile(f"cannot open the image '{path}' ({error.strerror}); repair or remove it") from None
        raise BadImage(f"cannot read the image '{path}' ({error}); repair or remove it") from None


def _decode(path: str) -> Image.Image:
    with Image.open(path) as image:
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            # Pillow's own conversion clips 16-bit grey at 255. Older versions read such a PNG as "I".
            return Image.fromarray((np.array(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
