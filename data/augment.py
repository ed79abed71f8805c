"""Zero-pad, random crop and random flip of images in memory by whole mini-batches, and the normalisation.

Bit-equal to torchvision's Pad, crop, hflip, ToTensor and Normalize for the same offsets and flips, and with the same
distributions: offsets uniform on 0..2*pad in each direction, flips with probability 1/2.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from data.sampler import seeded_generator


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
