"""A learnable set of 10 classes of 32x32 images made by code, for machines with neither data nor network.

Every class is a smooth random pattern; an image is its class's pattern, shifted, with random brightness and contrast
and strong noise. It shows whether the software works, nothing about the method: no figure of it is comparable.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.cache import Arrays

CLASSES = 10
SIZE = 32
# Number of images.
COUNTS = {"train": 10_000, "test": 2_000}


def make_synthetic(path: Path) -> Arrays:
    """The data set "synthetic"; the data path is not used."""
    arrays = {split: make_images(count, seed) for seed, (split, count) in enumerate(COUNTS.items(), start=1)}
    return arrays, [f"pattern{i}" for i in range(CLASSES)]


def make_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n images, uint8 (n, 3, 32, 32), and their labels, int64 (n,), in class order 0, 1, ..., 9, 0, 1, ... .

    The patterns are the same for every seed; the images of two seeds (training, test) differ.
    """
    pattern_generator = torch.Generator().manual_seed(20181201)
    coarse = torch.randn(CLASSES, 3, 6, 6, generator=pattern_generator)
    patterns = F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    shift = torch.randint(-5, 6, (n, 2), generator=generator)
    grid = torch.arange(SIZE)
    rows = (grid + shift[:, :1]) % SIZE
    columns = (grid + shift[:, 1:]) % SIZE
    images = patterns[
        labels[:, None, None, None], torch.arange(3)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ]
    contrast = 0.5 + torch.rand(n, 1, 1, 1, generator=generator)
    brightness = torch.randn(n, 1, 1, 1, generator=generator) * 0.5
    noise = torch.randn(images.shape, generator=generator) * 1.2
    images = (images * contrast + brightness + noise) * 40 + 128
    return images.round_().clamp_(0, 255).to(torch.uint8), labels
