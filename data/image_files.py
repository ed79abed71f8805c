"""Images decoded from their files whenever they are needed: sets too large for memory, ImageNet above all.

Training: a random part of the image (8 to 100 % of its area, aspect ratio 3/4 to 4/3), scaled to size x size, flipped by
chance; test: the shorter side scaled to 256 for a size of 224, and the centre cut out. As torchvision's RandomResizedCrop,
RandomHorizontalFlip, Resize, CenterCrop, ToTensor and Normalize, but the random numbers of an image are a function of (seed, epoch,
index) alone: neither the number of workers and ranks nor an interruption changes them.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.augment import normalise
from data.image_size import check_declared_size
from utils.base.errors import UserError
from utils.base.torchvision_import import import_torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
ON_BAD_IMAGE = ("skip", "stop")
# Of test images before their centre is cut out, for the largest --image_size.
LARGEST_SHORTER_SIDE = 1170

# ImageNet has hundreds of files whose camera data is odd and whose pixels are fine.
warnings.filterwarnings("ignore", message="(Possibly c|C)orrupt EXIF data", category=UserWarning)


class ImageError(UserError):
    """An image that is not to be had. Raised in worker processes too: torch then passes on the whole traceback as the message."""

    of_one_rank = True

    def __init__(self, message: str):
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


class BadImage(ImageError):
    """A file whose content is no image, or is cut short."""


class UnreadableFile(ImageError):
    """The file system does not give a file's content."""


class ImageFiles(Dataset):
    """Images in files; a list of indices gives a mini-batch.

    Args:
        files: their paths, relative to `root` or absolute.
        labels: as many class numbers.
        size: height and width of what is handed out.
        augment: random part and flip; False: the centre.
        seed: of the augmentation.
        on_bad_image: "stop" raises BadImage; "skip" leaves the image out of its mini-batch and notes it, see `newly_bad`. Errors of the
            file system (too many open files, a disk that fails) always stop: they say nothing about the image.
    """

    returns_batches = True

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
        self.root = os.fspath(root)
        # One array, not a million objects: counting references to these would copy their memory into every worker.
        self.files = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.size = size
        self.augment = augment
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.mean, self.std = torch.tensor(MEAN), torch.tensor(STD)
        # In shared memory: workers that live on see the epoch change, and this process sees what they have found.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._bad = torch.zeros(len(files), dtype=torch.bool).share_memory_()
        self._told = torch.zeros(len(files), dtype=torch.bool)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose random numbers the next mini-batches get."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.files[index]))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """float32 (B, 3, size, size) and int64 (B,); B is smaller than asked for where images were skipped, and may be 0."""
        pixels, good = [], []
        for index in indices:
            try:
                pixels.append(self._decode(index))
                good.append(index)
            except BadImage:
                if self.on_bad_image == "stop":
                    raise
                self._bad[index] = True
        batch = torch.stack(pixels) if pixels else torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)
        return normalise(batch, self.mean, self.std), self.labels[torch.tensor(good, dtype=torch.int64)]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        if not len(labels):
            raise BadImage(f"cannot read the image '{self.path(index)}'; mend or remove it")
        return images[0], labels[0]

    def newly_bad(self) -> list[str]:
        """Paths of the images that were skipped, by this process's workers, since the last call."""
        fresh = self._bad & ~self._told
        self._told |= fresh
        return [self.path(index) for index in fresh.nonzero().flatten().tolist()]

    def _decode(self, index: int) -> Tensor:
        """uint8 (3, size, size)."""
        image = read_rgb(self.path(index))
        functional = import_torchvision().transforms.functional
        if self.augment:
            numbers = image_generator(self.seed, int(self._epoch), index)
            top, left, height, width = draw_part(image.height, image.width, numbers)
            image = functional.resized_crop(image, top, left, height, width, [self.size, self.size])
            if torch.rand(1, generator=numbers) < 0.5:
                image = functional.hflip(image)
        else:
            image = functional.center_crop(functional.resize(image, resize_to(self.size)), [self.size, self.size])
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_to(size: int) -> int:
    """What a test image's shorter side is scaled to before its centre is cut out: 256 for 224."""
    return math.floor(size * 256 / 224)


def read_rgb(path: str) -> Image.Image:
    """Decodes a file.

    Raises:
        BadImage: its content is no image, or is cut short.
        UnreadableFile: it cannot be opened.
    """
    try:
        with Image.open(path) as image:
            check_declared_size(image, LARGEST_SHORTER_SIDE)
            if image.mode.startswith("I;16"):
                # Pillow's own conversion clips 16-bit grey at 255.
                return Image.fromarray((np.array(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes the decoder raise whatever its bytes lead to
        if isinstance(error, OSError) and error.errno is not None:
            raise UnreadableFile(f"cannot open the image '{path}' ({error.strerror}); mend or remove it") from None
        raise BadImage(
            f"cannot read the image '{path}' ({error}); mend or remove it, or use --on_bad_image skip"
        ) from None


def image_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The random numbers of one image in one epoch."""
    # splitmix64, as torch's generator takes its low 32 bits only: neighbouring images and epochs must not meet in these.
    mixed = (seed * 1_000_003 + epoch) * 0x9E3779B97F4A7C15 + index
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed &= 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ (mixed >> shift)) * factor
    mixed &= 0xFFFFFFFFFFFFFFFF
    return torch.Generator().manual_seed((mixed ^ (mixed >> 31)) >> 1)


def draw_part(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """top, left, height, width of a random part of an image: torchvision's RandomResizedCrop.get_params, number for number."""
    area = height * width
    low, high = torch.log(torch.tensor(ASPECT))
    for _ in range(10):
        target = area * torch.empty(1).uniform_(*AREA, generator=generator).item()
        aspect = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,), generator=generator).item()
            left = torch.randint(0, width - w + 1, (1,), generator=generator).item()
            return top, left, h, w
    # A very long or very high image: its centre, as nearly as the aspect ratios allow.
    w = min(width, round(height * ASPECT[1]))
    h = min(height, round(width / ASPECT[0]))
    return (height - h) // 2, (width - w) // 2, h, w
