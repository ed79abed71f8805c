"""What a training step minimises. An objective is called with (net, images, labels) and returns (loss, logits)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """x itself, or in float32 where autocast has made it narrower: losses are not taken in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the mini-batch, and the logits (B, classes)."""
    logits = at_least_float32(net(images))
    return F.cross_entropy(logits, labels), logits
