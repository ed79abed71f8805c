"""What a network costs: parameters and multiply-adds.

Multiply-adds are those of convolutions, linear layers and other products of matrices (attention), integers of the real
network, for one image. BatchNorm, activations, pooling and additions are not counted, as in the papers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Counts(NamedTuple):
    """Of one network and one image: all its parameters; its multiply-adds."""

    parameters: int
    multiply_adds: int


def count(net: nn.Module, example: Tensor) -> Counts:
    """Counts a network on the first image of `example` (B, ...). The network is not changed; it runs in eval mode."""
    return Counts(sum(p.numel() for p in net.parameters()), multiply_adds(net, example[:1]))


@torch.no_grad()
def multiply_adds(net: nn.Module, example: Tensor) -> int:
    """Of all operations for the images in `example`, by torch's FlopCounterMode, which counts each as two."""
    was_training = net.training
    try:
        with FlopCounterMode(display=False) as counter:
            net.eval()(example)
    finally:
        net.train(was_training)
    return counter.get_total_flops() // 2
