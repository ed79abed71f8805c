"""Image data sets: mini-batches are uint8, `dataset.normalise(images)` on the device makes the network's input.

Zero-pad, random crop and random flip of images in memory by whole mini-batches: bit-equal to torchvision's Pad, crop,
hflip, ToTensor and Normalize for the same offsets and flips, and with the same distributions: offsets uniform on
0..2*pad in each direction, flips with probability 1/2.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from data.loader import seeded_generator


class ImageSet(Dataset):
    """What image data sets share. `__getitems__(indices)` gives uint8 (B, C, H, W), channels_last, and int64 (B,);
    `labels` are all of the latter.

    Args:
        image_shape: (C, H, W).
        mean, std: per channel, as shares of 1.
        augment: the training augmentation of the subclass; False: what is done for tests.
        seed: of the augmentation; sample i in epoch e gets random numbers that depend on (seed, e, i) alone.
    """

    returns_batches = True

    def __init__(self, image_shape, mean: Sequence[float], std: Sequence[float], *, augment: bool, seed: int):
        self.image_shape = tuple(image_shape)
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32) for values in (mean, std))
        self.augment = augment
        self.seed = seed
        # In shared memory, so that persistent workers see the epoch change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose random numbers the next mini-batches get."""
        self._epoch.fill_(epoch)

    def fingerprint(self) -> str:
        """Which images these are, and in which order: a digest of all labels and the first image."""
        return hashlib.sha256(self.labels.cpu().numpy().tobytes() + self[0][0].cpu().numpy().tobytes()).hexdigest()[:12]

    def normalise(self, images: Tensor) -> Tensor:
        """The network's input of a uint8 mini-batch on any device: float32, channels_last."""
        return normalise(images, self.mean, self.std)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        if not len(labels):
            raise ValueError(f"image {index} cannot be read")
        return images[0], labels[0]


class ImageArrays(ImageSet):
    """Images and labels in memory (the GPU's, after `to`); a mini-batch is one slice, augmented as a whole.

    Training augmentation: zero-pad height/8 (4 for 32x32), random crop, random flip. Tests: the images as they are.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        mean, std, augment, seed: see ImageSet.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean, std, *, augment: bool, seed: int = 0):
        if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != len(labels):
            found = f"{images.dtype} {tuple(images.shape)} and {len(labels)} labels"
            raise ValueError(f"images must be uint8 (N, C, H, W), one per label; got {found}")
        super().__init__(images.shape[1:], mean, std, augment=augment, seed=seed)
        self.images = images
        self.labels = labels
        self.pad = images.shape[2] // 8
        self._numbers, self._numbers_epoch = None, None

    def to(self, device: torch.device) -> "ImageArrays":
        """Moves images and labels; on a GPU use the loader with num_workers=0."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self._numbers_epoch = None
        return self

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if self.images.is_cuda:
            # From pinned memory: an ordinary copy would wait until the GPU is idle.
            chosen = chosen.pin_memory().to(self.images.device, non_blocking=True)
        batch = self.images[chosen]
        if self.augment:
            batch = crop_and_flip(batch, self._numbers_now()[chosen], self.pad)
        return batch, self.labels[chosen]

    def _numbers_now(self) -> Tensor:
        epoch = int(self._epoch)
        if epoch != self._numbers_epoch:
            self._numbers = draw_crops_and_flips(len(self), self.seed, epoch, self.pad).to(self.images.device)
            self._numbers_epoch = epoch
        return self._numbers


def draw_crops_and_flips(n: int, seed: int, epoch: int, pad: int = 4) -> Tensor:
    """The random numbers of one epoch: int64 (n, 3), columns top, left (0..2*pad), flip (0 or 1), row i for sample i.

    They depend on (n, seed, epoch, pad) alone: not on the number of workers or ranks, nor on the order of samples.
    """
    generator = seeded_generator(seed, epoch, purpose=1)
    offsets = torch.randint(0, 2 * pad + 1, (n, 2), generator=generator)
    flips = torch.randint(0, 2, (n, 1), generator=generator)
    return torch.cat([offsets, flips], dim=1)


def crop_and_flip(images: Tensor, numbers: Tensor, pad: int = 4) -> Tensor:
    """Zero-pads, crops and flips every image by its own numbers, in one gather.

    Args:
        images: uint8 (B, C, H, W).
        numbers: int64 (B, 3): top, left, flip; see draw_crops_and_flips.
        pad: zeros on every side.

    Returns:
        uint8 (B, C, H, W) in channels_last layout.
    """
    count, channels, height, width = images.shape
    # Channels last, so that the bytes of a pixel are fetched together.
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))
    device = images.device
    top, left, flip = (column[:, None] for column in numbers.unbind(1))
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = left + torch.where(flip == 1, width - 1 - columns, columns)
    lines = torch.arange(count, device=device)[:, None] * padded.shape[1] + rows
    pixels = lines[:, :, None] * padded.shape[2] + columns[:, None, :]
    cropped = padded.reshape(-1, channels).index_select(0, pixels.flatten())
    return cropped.view(count, height, width, channels).permute(0, 3, 1, 2)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x/255 - mean)/std on the images' device, in torchvision's order of operations.

    Args:
        images: uint8 (B, C, H, W) in any layout; not changed. Another type is a ValueError.
        mean, std: float32 (C,) on the CPU, as shares of 1.

    Returns:
        float32 (B, C, H, W) in channels_last layout.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"normalise takes uint8 images, got {images.dtype}")
    images = images.contiguous(memory_format=torch.channels_last).to(torch.float32)
    # By lines of pixels, red, green, blue, red, ...: three channels alone are too short a row for vector instructions.
    count, channels, height, width = images.shape
    lines = images.permute(0, 2, 3, 1).view(count, height, width * channels)
    mean_line, std_line = (_repeated(tuple(values.tolist()), width, images.device) for values in (mean, std))
    lines.div_(255).sub_(mean_line).div_(std_line)
    return images


@lru_cache(maxsize=64)
def _repeated(values: tuple[float, ...], times: int, device: torch.device) -> Tensor:
    """Kept on the device, as a copy from the host in every step would wait for a GPU."""
    return torch.tensor(values, dtype=torch.float32).repeat(times).to(device)
