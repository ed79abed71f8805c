"""What a network costs: parameters, multiply-adds, memory of activations; and the papers' formula.

Multiply-adds are those of convolutions and linear layers, integers of the real network, for one image. BatchNorm,
activations, pooling and additions are not counted, as in the papers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.small.trace import run, tensors, trace


class Counts(NamedTuple):
    """Of one network and one image.

    Attributes:
        parameters: all of them.
        multiply_adds: of convolutions and linear layers.
        peak_activation_bytes: the most that values of the graph take at any moment in eval mode, input included,
            weights not; each value is dropped after its last use, what works in place takes nothing.
    """

    parameters: int
    multiply_adds: int
    peak_activation_bytes: int


def count(net: nn.Module, example: Tensor) -> Counts:
    """Counts a network on the first image of `example` (B, ...). The network is not changed; it runs in eval mode."""
    parameters = sum(p.numel() for p in net.parameters())
    image = example[:1]
    return Counts(parameters, sum(multiply_adds(net, image).values()), peak_activation_bytes(net, image))


@torch.no_grad()
def multiply_adds(net: nn.Module, example: Tensor) -> dict[str, int]:
    """{layer: multiply-adds of all its calls for the inputs in `example`}."""
    found: dict[str, int] = {}
    hooks = []
    for name, module in net.named_modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):

            def hook(module, inputs, output, name=name):
                # In a transposed convolution every input entry meets its slice of the weight once.
                transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
                each = (inputs[0] if transposed else output).numel() * module.weight[0].numel()
                found[name] = found.get(name, 0) + each

            hooks.append(module.register_forward_hook(hook))
    was_training = net.training
    try:
        net.eval()(example)
    finally:
        net.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def peak_activation_bytes(net: nn.Module, example: Tensor) -> int:
    """Largest sum over the values that are needed at one moment; see Counts."""
    was_training = net.training
    graph = trace(net.eval(), example)
    weights = {p.untyped_storage().data_ptr() for p in [*net.parameters(), *net.buffers()]}
    peak = 0
    for _, values in run(graph, example.clone()):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors(list(values.values()))}
        peak = max(peak, sum(s.nbytes() for at, s in storages.items() if at not in weights))
    net.train(was_training)
    return peak


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
