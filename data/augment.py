"""The CIFAR augmentation by whole mini-batches: zero-pad 4, random 32-crop, random horizontal flip, normalise.

Bit-equal to torchvision's Pad, crop, hflip, ToTensor and Normalize for the same offsets and flips, and with the same
distributions: offsets uniform on 0..2*pad in each direction, flips with probability 1/2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from data.sampler import seeded_generator


def draw_crops_and_flips(n: int, seed: int, epoch: int, pad: int = 4) -> Tensor:
    """The random numbers of one epoch: int64 (n, 3) with columns top, left (0..2*pad) and flip (0 or 1), row i for sample i.

    They depend on nothing but (n, seed, epoch): neither on the number of workers or ranks nor on the order of samples.
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
    # Pixels as they will lie in memory, so that each is fetched whole.
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
    """uint8 (B, C, H, W) to float32 (x/255 - mean)/std in channels_last layout, in torchvision's order of operations.

    Args:
        mean, std: float32 (C,), as shares of 1.
    """
    images = images.contiguous(memory_format=torch.channels_last).to(torch.float32)
    # By lines of pixels, red, green, blue, red, ...: three channels alone are too short a row for vector instructions.
    count, channels, height, width = images.shape
    lines = images.permute(0, 2, 3, 1).view(count, height, width * channels)
    lines.div_(255).sub_(mean.repeat(width)).div_(std.repeat(width))
    return images
