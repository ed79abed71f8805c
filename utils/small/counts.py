"""What a network costs: parameters and multiply-adds; and the papers' formula.

Multiply-adds are those of convolutions, linear layers and other products of matrices (attention), integers of the real
network, for one image. BatchNorm, activations, pooling and additions are not counted, as in the papers.
"""

from __future__ import annotations

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
    return Counts(sum(p.numel() for p in net.parameters()), sum(multiply_adds(net, example[:1]).values()))


@torch.no_grad()
def multiply_adds(net: nn.Module, example: Tensor) -> dict[str, int]:
    """{operation of torch: multiply-adds of all its calls for the inputs in `example`}, by torch's FlopCounterMode."""
    was_training = net.training
    try:
        with FlopCounterMode(display=False) as counter:
            net.eval()(example)
    finally:
        net.train(was_training)
    # torch counts a multiply-add as two operations.
    return {str(operation): n // 2 for operation, n in counter.get_flop_counts().get("Global", {}).items()}


def papers_cut(depth: int, HTrate: float) -> float:
    """Share of a CIFAR ResNet's multiply-adds saved, by Soft Filter Pruning's formula (He et al., IJCAI 2018).

    Every layer keeps the share `HTrate` of its filters, as a real number. The residual stream keeps its full width: a
    block's first convolution reads all channels, its second the kept ones; the very first block reads the stem's kept
    filters. 42.2, 41.5, 41.1 and 40.8 % for ResNet-20, 32, 56 and 110 at 0.7.
    """
    blocks, r = (depth - 2) // 6, HTrate
    unit = 16 * 16 * 9 * 32 * 32  # a 3x3 convolution between two layers of one stage, the same in all three
    stem, head = 3 * 16 * 9 * 32 * 32, 64 * 10
    full = stem + unit * (3 * 2 * blocks - 1) + head  # the first convolutions of stages 2 and 3 cost half
    seconds = 3 * blocks * unit * r * r
    firsts = unit * r * (r + (blocks - 1) + 2 * (blocks - 0.5))
    return 1 - (stem * r + firsts + seconds + head) / full
