"""Small images held in memory as one uint8 array, made into mini-batches as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.augment import crop_and_flip, draw_crops_and_flips, normalise


class ImageArrays(Dataset):
    """Images and labels in memory (the GPU's, after `to`); a mini-batch is one slice, augmented as a whole.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        mean, std: per channel, as shares of 1.
        augment: zero-pad 4, random crop, random flip; False: only normalise.
        seed: of the augmentation; sample i in epoch e gets numbers that depend on nothing but (seed, e, i).
    """

    returns_batches = True

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        augment: bool,
        seed: int = 0,
    ):
        if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != len(labels):
            raise ValueError(
                f"images must be uint8 (N, C, H, W), one per label; got {images.dtype} {tuple(images.shape)} and {len(labels)} labels"
            )
        self.images = images
        self.labels = labels
        self.mean = torch.tensor(mean, dtype=torch.float32)
        self.std = torch.tensor(std, dtype=torch.float32)
        self.augment = augment
        self.seed = seed
        # In shared memory, so that persistent workers see the epoch change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._numbers, self._numbers_epoch = None, None

    def to(self, device: torch.device) -> ImageArrays:
        """Moves images, labels and constants; on a GPU use the loader with num_workers=0."""
        for name in ("images", "labels", "mean", "std"):
            setattr(self, name, getattr(self, name).to(device))
        self._numbers_epoch = None
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose random numbers the next mini-batches get."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """float32 (B, C, H, W) in channels_last layout and int64 (B,)."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if self.images.is_cuda:
            # From pinned memory, or the copy would wait for all that the GPU has still to do.
            chosen = chosen.pin_memory().to(self.images.device, non_blocking=True)
        batch = self.images[chosen]
        if self.augment:
            batch = crop_and_flip(batch, self._numbers_now()[chosen])
        return normalise(batch, self.mean, self.std), self.labels[chosen]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def _numbers_now(self) -> Tensor:
        epoch = int(self._epoch)
        if epoch != self._numbers_epoch:
            self._numbers = draw_crops_and_flips(len(self), self.seed, epoch).to(self.images.device)
            self._numbers_epoch = epoch
        return self._numbers
