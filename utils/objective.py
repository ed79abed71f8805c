"""What a training step minimises. An objective is called with (net, images, labels) and returns (loss, logits)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the mini-batch, and the logits (B, classes)."""
    logits = net(images)
    return F.cross_entropy(logits, labels), logits
