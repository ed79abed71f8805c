"""Image data sets: mini-batches are uint8, `dataset.normalise(images)` on the device makes the network's input."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.augment import crop_and_flip, draw_crops_and_flips, normalise


class ImageSet(Dataset):
    """What image data sets share. `__getitems__(indices)` gives uint8 (B, C, H, W), channels_last, and int64 (B,).

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

    def normalise(self, images: Tensor) -> Tensor:
        """The network's input of a uint8 mini-batch on any device: float32, channels_last; see augment.normalise."""
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
