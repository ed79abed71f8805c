"""Small networks rebuilt from a file: a network of the original's class whose layers take the widths of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.resnet_cifar import BasicBlock
from utils.base.errors import UserError


def set_sizes(module: nn.Module) -> None:
    """Makes the numbers of channels that a layer states those of its weights: what it checks inputs against, and prints."""
    if hasattr(module, "out_features"):
        module.out_features, module.in_features = module.weight.shape
    elif hasattr(module, "num_features"):
        sizes = [value for value in (module.weight, module.running_mean) if value is not None]
        module.num_features = len(sizes[0]) if sizes else module.num_features
    else:
        depthwise = module.groups > 1 and module.weight.shape[1] == 1
        module.out_channels = len(module.weight)
        module.groups = module.out_channels if depthwise else module.groups
        module.in_channels = module.weight.shape[1] * module.groups


@torch.no_grad()
def narrow_like(net: nn.Module, state_dict: dict[str, Tensor], pads: dict[str, int] | None = None) -> nn.Module:
    """Gives the layers of a network the shapes of a small network's weights, so that load_state_dict takes them. In place.

    Args:
        net: of the class that the small network was made from; layers that fit already are not touched.
        state_dict: the small network's. Weights that are no narrowing of the network's are left for load_state_dict to complain of.
        pads: {name of an OptionA shortcut: its new channels}, as make_small reports them; those of the project's own blocks are
            found by themselves.

    Returns:
        `net`; its narrowed layers hold no meaningful weights yet.
    """
    for name, module in net.named_modules():
        prefix = f"{name}." if name else ""
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        wanted = {key: state_dict[prefix + key] for key in own if prefix + key in state_dict}
        changed = {key: value for key, value in wanted.items() if value.shape != own[key].shape}
        narrower = all(
            value.dim() == own[key].dim() and all(0 < a <= b for a, b in zip(value.shape, own[key].shape, strict=True))
            for key, value in changed.items()
        )
        if (
            not changed
            or not narrower
            or not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm))
        ):
            continue
        for key, value in changed.items():
            fresh = torch.zeros_like(value, dtype=own[key].dtype, device=own[key].device)
            setattr(module, key, nn.Parameter(fresh) if isinstance(own[key], nn.Parameter) else fresh)
        set_sizes(module)
    for block in net.modules():
        if isinstance(block, BasicBlock) and hasattr(block.shortcut, "new_channels"):
            block.shortcut.new_channels = block.conv_b.out_channels - block.conv_a.in_channels
    for name, new_channels in (pads or {}).items():
        try:
            net.get_submodule(name).new_channels = new_channels
        except AttributeError:
            raise UserError(
                f"the file pads a shortcut '{name}' that this network has not; use an intact file"
            ) from None
    return net


def pack(
    net: nn.Module, arch: str, num_classes: int, input_shape: tuple[int, ...], kept: dict[str, list[int]], **facts
) -> dict:
    """The content of a small network's file, for utils.base.checkpoint.write; models.load makes the network of it again.

    Args:
        net: the small network.
        arch: name of the network that it was made from, of this project's registry or of torchvision.models.
        num_classes: width of its output.
        input_shape: (C, H, W) of the images it is for.
        kept: {layer's weight: original indices of its filters}, as make_small reports them.
        facts: further plain entries.
    """
    # BatchNorm's counters are read only where momentum is None; without them, and with equal lists written once, even a narrow
    # ResNet-110 of 1.7 MB stays within 5 % of its weights.
    norms = [
        (name, module) for name, module in net.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    unused = {f"{name}.num_batches_tracked" for name, module in norms if module.momentum is not None}
    state = {name: value for name, value in net.state_dict().items() if name not in unused}
    same: dict[tuple[int, ...], list[int]] = {}
    flat = {dtype: [] for dtype in {value.dtype for value in state.values()}}
    for value in state.values():
        flat[value.dtype].append(value.detach().cpu().flatten())
    # One storage per dtype: a hundred small ones would cost more than 5 % in a file of half a megabyte.
    storages = {dtype: torch.cat(values) for dtype, values in flat.items()}
    begins, weights = dict.fromkeys(flat, 0), {}
    for name, value in state.items():
        begin = begins[value.dtype]
        begins[value.dtype] += value.numel()
        weights[name] = storages[value.dtype][begin : begins[value.dtype]].view(value.shape)
    return {
        "small": True,
        "arch": arch,
        "num_classes": num_classes,
        "input_shape": list(input_shape),
        "widths": {name: list(value.shape[:2]) for name, value in state.items() if value.dim() > 1},
        "kept": {name: same.setdefault(tuple(at), at) for name, at in kept.items()},
        **facts,
        "state_dict": weights,
    }


@torch.no_grad()
def check_narrowed(net: nn.Module, input_shape: tuple[int, ...], path: object) -> None:
    """Raises UserError when the widths of a file's layers do not fit each other."""
    was_training = net.training
    try:
        net.eval()(torch.zeros(1, *input_shape, device=next(net.parameters()).device))
    except RuntimeError as error:
        raise UserError(
            f"the layers in '{path}' do not fit each other ({str(error).splitlines()[0]}); use an intact file"
        ) from None
    finally:
        net.train(was_training)
