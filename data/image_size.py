"""The size that an image file declares is looked at before its pixels are decoded: a kilobyte can declare gigabytes."""

from __future__ import annotations

import warnings

from PIL import Image

# Pillow only warns where check_declared_size refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Pillow warns above this many and refuses twice as many; here the first is refused already.
MAX_PIXELS = 89_478_485


def check_declared_size(image: Image.Image, shorter_side: int) -> None:
    """Refuses an image that is too large, or would be once its shorter side is scaled.

    Args:
        image: opened, not decoded.
        shorter_side: what it will be scaled to; of a very long image the other side becomes huge.

    Raises:
        ValueError: naming the size.
    """
    width, height = image.size
    scaled = shorter_side * shorter_side * max(width, height) / max(1, min(width, height))
    if width * height > MAX_PIXELS or scaled > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, scaled or not, are more than {MAX_PIXELS:,}")
