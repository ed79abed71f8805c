"""Cutting a network in training: layers narrowed in place, and the optimizer's parameters and state with them."""

import torch
from torch import Tensor, nn

from models.small import set_sizes
from utils.prune.plan import Plan
from utils.small.cut import Slices, sliced

# The optimizer's state that has a parameter's shape.
FOLLOWS = ("momentum_buffer", "prev_data")


@torch.no_grad()
def shrink(net: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, before: Tensor, after: Tensor) -> None:
    """Cuts out of the network, in place, the channels that are in `before` and not in `after`, bool per class.

    What is narrowed becomes a new, smaller parameter or buffer. Parameters take their predecessors' places in the
    optimizer's groups, with the kept part of their state; gradients are dropped.
    """
    replaced: dict[nn.Parameter, tuple[nn.Parameter, Slices]] = {}
    for layer in plan.layers:
        module = net.get_submodule(layer.name)
        if layer.kind == "pad":
            module.new_channels = int(after[layer.made].sum() - after[layer.read].sum())
            continue
        outputs, inputs = (after[classes[before[classes]]].nonzero().flatten() for classes in (layer.made, layer.read))
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.dim() == 0:
                continue
            at = (outputs, inputs if value.dim() > 1 and layer.kind != "depthwise" else None)
            cut = _sliced_in_layout(value.detach(), at)
            if cut.shape == value.shape:
                continue
            if isinstance(value, nn.Parameter):
                cut = nn.Parameter(cut, requires_grad=value.requires_grad)
                replaced[value] = (cut, at)
            setattr(module, name, cut)
        set_sizes(module)
    for group in optimizer.param_groups:
        group["params"] = [replaced[p][0] if p in replaced else p for p in group["params"]]
    for old, (new, at) in replaced.items():
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            follows = {name: _sliced_in_layout(state[name], at) for name in FOLLOWS if name in state}
            optimizer.state[new] = {**state, **follows}


def _sliced_in_layout(value: Tensor, at: Slices) -> Tensor:
    """`sliced`, in the memory format of the value: channels_last stays channels_last."""
    is_last = value.dim() == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)
    return sliced(value, at).contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
