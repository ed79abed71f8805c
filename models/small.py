"""Small networks rebuilt from a file: a network of the original's class whose layers take the widths of the weights."""

import torch
from torch import Tensor, nn

from models.resnet_cifar import BasicBlock, OptionA
from utils.base.errors import UserError

LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)


def set_sizes(module: nn.Module) -> None:
    """Sets the numbers of channels that a layer states, and checks inputs against, to those of its weights."""
    if hasattr(module, "out_features"):
        module.out_features, module.in_features = module.weight.shape
    elif hasattr(module, "num_features"):
        sizes = [len(value) for value in (module.weight, module.running_mean) if value is not None]
        module.num_features = sizes[0] if sizes else module.num_features
    else:
        module.out_channels = len(module.weight)
        if module.groups > 1:  # narrowed only where as many channels are read as made
            module.groups = module.out_channels // module.weight.shape[1]
        module.in_channels = module.weight.shape[1] * module.groups


def _fits_in(small: torch.Size, full: torch.Size, is_grouped: bool) -> bool:
    """Groups may be wider in the small network, where there are fewer of them."""
    fits = [0 < a <= b for a, b in zip(small, full, strict=True)] if len(small) == len(full) else [False]
    return all(fits) or (is_grouped and len(small) > 2 and fits[0] and small[0] % max(1, small[1]) == 0)


@torch.no_grad()
def narrow_like(net: nn.Module, state_dict: dict[str, Tensor], pads: dict[str, int] | None = None) -> nn.Module:
    """Gives the layers of a network the shapes of a small network's weights, so that load_state_dict takes them. In
    place.

    Args:
        net: of the class that the small network was made from; layers that fit already are not touched.
        state_dict: the small network's. Weights that do not narrow the network's are left to load_state_dict's errors.
        pads: {name of an OptionA shortcut: its new channels}, as make_small reports them; those of the project's own
            blocks follow from their layers.

    Returns:
        `net`; its narrowed layers hold no meaningful weights yet.
    """
    for name, module in net.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        pairs = [(key, value, state_dict.get(f"{name}.{key}".removeprefix("."), value)) for key, value in own]
        narrower = all(
            _fits_in(wanted.shape, value.shape, getattr(module, "groups", 1) > 1) for _, value, wanted in pairs
        )
        if narrower and isinstance(module, LAYERS) and any(value.shape != wanted.shape for _, value, wanted in pairs):
            for key, value, wanted in pairs:
                fresh = value.new_zeros(wanted.shape)
                setattr(module, key, nn.Parameter(fresh) if isinstance(value, nn.Parameter) else fresh)
            set_sizes(module)
    for block in net.modules():
        if isinstance(block, BasicBlock) and isinstance(block.shortcut, OptionA):
            block.shortcut.new_channels = block.conv_b.out_channels - block.conv_a.in_channels
    modules = dict(net.named_modules())
    for name, new_channels in (pads or {}).items():
        if name not in modules:
            raise UserError(f"the file pads a shortcut '{name}' that this network does not have; use an intact file")
        modules[name].new_channels = new_channels
    return net
