"""The rules of utils.small.channels, one per operation: which of its channels are constants, and which belong together.

A rule takes (channels, node, module or None) and returns the result's Value, None for what is no tensor of channels; it
raises Unknown, with the reason, where it cannot be sure. Values are in eval mode and finite, so that 0 * x = 0.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from models.resnet_cifar import OptionA
from utils.small.trace import layer_name

if TYPE_CHECKING:
    from utils.small.channels import Channels

# Layers whose weights are narrowed with their channels.
NARROWED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NARROWED += (nn.SyncBatchNorm,)


@dataclass
class Value:
    """A tensor (B, C, ...) of the graph.

    Attributes:
        ids: of its C channels, for Channels.root.
        constant: float64 (C,): the channel's one value for every input and at every position; NaN where it varies.
    """

    ids: list[int]
    constant: Tensor


@dataclass
class Reader:
    """A linear layer, or a convolution that is not depthwise: what it reads, what it makes."""

    module: nn.Module
    source: Value
    ids: list[int]
    nonzero: Tensor  # bool (C_out, C_in)


@dataclass
class Pad:
    """An option-A shortcut: its input's channels, then new channels of zeros."""

    node: fx.Node
    module: nn.Module
    source: Value
    ids: list[int]


class Unknown(Exception):
    """The operation, or this use of it, has no rule; the message is the reason."""


def _source(channels: Channels, node: fx.Node) -> Value:
    value = channels.values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if value is None:
        raise Unknown(f"the input of {layer_name(node)} is not one known tensor")
    return value


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Of the first operand."""
    return node.args[0].meta["shape"]


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def _vector(values: Tensor | None, n: int, default: float) -> Tensor:
    """A layer's weights or statistics per channel in float64; `default` where it has none."""
    return torch.full((n,), default, dtype=torch.float64) if values is None else values.detach().double().cpu()


# -- layers with weights --


def pads(module: nn.Module) -> bool:
    """Whether a convolution pads its input with zeros, so that a constant other than 0 varies along the border."""
    if isinstance(module, nn.Linear) or module.padding_mode != "zeros":
        return False
    return module.padding == "same" or (not isinstance(module.padding, str) and any(module.padding))


def _reader(channels: Channels, node: fx.Node, module: nn.Module) -> Value:
    source = _source(channels, node)
    if len(_shape(node)) != module.weight.dim():
        raise Unknown(f"{layer_name(node)} acts on a tensor of {len(_shape(node))} dimensions")
    n, groups, bias = len(module.weight), getattr(module, "groups", 1), _vector(module.bias, len(module.weight), 0)
    c = source.constant if not pads(module) else source.constant.where(source.constant == 0, math.nan)
    weight = module.weight.detach().cpu().flatten(1).view(groups, n // groups, module.weight.shape[1], -1)
    nonzero, unknown = (weight != 0).any(dim=3), torch.isnan(c)
    if groups > 1 and groups == len(source.ids) == n:  # depthwise
        zero = ~nonzero.flatten() | (c == 0)
        return Value(source.ids, (weight.double().sum(dim=(1, 2, 3)) * c).where(~zero, 0) + bias)
    if groups > 1 and (not channels.regroup or n != len(source.ids)):
        raise Unknown(f"{layer_name(node)} is a grouped convolution")
    steady = c.where(~unknown, 0).view(groups, -1, 1)
    constant = bias + (weight.sum(dim=3, dtype=torch.float64) @ steady).flatten() if steady.any() else bias
    varies = (nonzero & unknown.view(groups, 1, -1)).any(dim=2).flatten()
    ids = channels.new(n)
    channels.readers.append(Reader(module, source, ids, torch.block_diag(*nonzero)))
    return Value(ids, constant.where(~varies, math.nan))


def _batch_norm(channels: Channels, node: fx.Node, module: nn.Module) -> Value:
    source = _source(channels, node)
    n = len(source.ids)
    # Without running statistics it uses those of the mini-batch, and nothing is constant.
    mean, var = _vector(module.running_mean, n, math.nan), _vector(module.running_var, n, math.nan)
    weight = _vector(module.weight, n, 1)
    normalised = (source.constant - mean) / (var + module.eps).sqrt()
    return Value(source.ids, (normalised * weight).where(weight != 0, 0) + _vector(module.bias, n, 0))


def _option_a(channels: Channels, node: fx.Node, module: OptionA) -> Value:
    source = _source(channels, node)
    ids = channels.new(len(source.ids) + module.new_channels)
    if channels.tie_pads:
        channels.unite(source.ids, ids[: len(source.ids)])
    channels.pads.append(Pad(node, module, source, ids))
    return Value(ids, torch.cat([source.constant, source.constant.new_zeros(module.new_channels)]))


# -- one operand, channel by channel --


def _same(channels: Channels, node: fx.Node, module: nn.Module | None) -> Value:
    """Constants stay as they are: dropout in eval mode, clone, pooling without zero padding."""
    return Value(_source(channels, node).ids, _source(channels, node).constant)


def _keeps_zero(channels: Channels, node: fx.Node, module: nn.Module | None) -> Value:
    """Keeps the constant 0 only: averages that count padding, interpolation, spatial zero padding."""
    source = _source(channels, node)
    return Value(source.ids, source.constant.where(source.constant == 0, math.nan))


def _average_pool(channels: Channels, node: fx.Node, module: nn.Module) -> Value:
    plain = not module.ceil_mode and getattr(module, "divisor_override", None) is None
    padding = module.padding if isinstance(module.padding, tuple) else (module.padding,)
    return (_same if plain and not any(padding) else _keeps_zero)(channels, node, module)


def _positions_only(channels: Channels, node: fx.Node, module: None) -> Value:
    """x.mean((2, 3)), x.squeeze(3): constants stay as they are."""
    value, dims = _same(channels, node, module), _argument(node, 1, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or not all(isinstance(d, int) and d % len(_shape(node)) >= 2 for d in dims):
        raise Unknown(f"{layer_name(node)} is not over positions alone")
    return value


def _pointwise(channels: Channels, node: fx.Node, module: nn.Module | None) -> Value:
    """ReLU and its relatives: the constant of the result is the operation on the constant."""
    source = _source(channels, node)
    if module is not None and any(p.numel() != 1 for p in module.parameters()):
        raise Unknown(f"{layer_name(node)} has weights per channel")
    if any(isinstance(a, fx.Node) for a in [*node.args[1:], *node.kwargs.values()]):
        raise Unknown(f"{layer_name(node)} takes more than one tensor")
    function = _function(node) if module is None else copy.deepcopy(module).cpu().double()
    constant = function(source.constant.clone(), *node.args[1:], **node.kwargs)
    return Value(source.ids, constant.where(~torch.isnan(source.constant), math.nan))


def _function(node: fx.Node) -> Callable:
    return getattr(Tensor, node.target) if node.op == "call_method" else node.target


def _dropout(channels: Channels, node: fx.Node, module: None, position: int = 2) -> Value:
    """F.dropout(x, p, training), or another function with `training` at this position."""
    if _argument(node, position, "training", True) is not False:
        raise Unknown(f"{layer_name(node)} is random in eval mode too")
    return _same(channels, node, module)


def _zero_pad(channels: Channels, node: fx.Node, module: None) -> Value:
    """F.pad with literal numbers. New channels stay, all of them, as their number is written in the user's code."""
    source, positions = _source(channels, node), 2 * (len(_shape(node)) - 2)
    pad, mode, fill = _argument(node, 1, "pad"), _argument(node, 2, "mode", "constant"), _argument(node, 3, "value")
    if not all(isinstance(n, int) for n in pad) or mode != "constant" or fill not in (None, 0):
        raise Unknown(f"{layer_name(node)} pads with something else than zeros")
    front, back, *images = [*pad, 0, 0, 0, 0][positions:]
    if front < 0 or back < 0 or any(images):
        raise Unknown(f"{layer_name(node)} cuts channels off")
    constant = source.constant.where((source.constant == 0) | (not any(pad[:positions])), math.nan)
    if not front and not back:
        return Value(source.ids, constant)
    before, after = channels.new(front), channels.new(back)
    channels.pin(before + after, node, f"{layer_name(node)} adds a fixed number of channels")
    ids = before + source.ids + after
    channels.joins.append((ids, [before, source.ids, after]))
    return Value(ids, torch.cat([constant.new_zeros(front), constant, constant.new_zeros(back)]))


# -- several operands --


def _binary(channels: Channels, node: fx.Node, module: None) -> Value:
    """x + y, x - y, x * y, x / y of two tensors with the same channels, or of a tensor and a number."""
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    values = [channels.values.get(a) for a in tensors]
    numbers = [a for a in node.args if isinstance(a, (int, float))]
    of_two = len(tensors + numbers) == len(node.args) == 2
    if not tensors or None in values or not of_two or any(isinstance(a, fx.Node) for a in node.kwargs.values()):
        raise Unknown(f"{layer_name(node)} has operands that are not known")
    if len({(len(a.meta["shape"]), a.meta["shape"][1]) for a in tensors}) != 1:
        raise Unknown(f"{layer_name(node)} has operands of different channels")
    a, b = (
        torch.tensor(float(a), dtype=torch.float64) if a in numbers else channels.values[a].constant.clone()
        for a in node.args
    )
    zero = (a == 0) | (b == 0)
    constant = _function(node)(a, b, **node.kwargs)
    if node.target in (operator.mul, operator.imul, torch.mul, "mul", "mul_"):
        constant = constant.where(~zero, 0)
    channels.unite(values[0].ids, values[-1].ids)
    return Value(values[0].ids, constant)


def _concatenation(channels: Channels, node: fx.Node, module: None) -> Value:
    parts, dim = _argument(node, 0, "tensors"), _argument(node, 1, "dim", 0)
    if not parts or not isinstance(parts, (list, tuple)) or any(p not in channels.values for p in parts):
        raise Unknown(f"{layer_name(node)} has parts that are not known")
    if not isinstance(dim, int) or dim % len(parts[0].meta["shape"]) != 1:
        raise Unknown(f"{layer_name(node)} is not along the channels")
    values = [channels.values[p] for p in parts]
    ids = [i for v in values for i in v.ids]
    channels.joins.append((ids, [v.ids for v in values]))
    return Value(ids, torch.cat([v.constant for v in values]))


# -- shapes --


def _flatten(channels: Channels, node: fx.Node, module: nn.Module | None) -> Value:
    """(B, C, ...) to (B, C * positions): a channel becomes as many features as it has positions."""
    source, shape, made = _source(channels, node), _shape(node), node.meta["shape"]
    if len(made) != 2 or made[0] != shape[0]:
        raise Unknown(f"{layer_name(node)} does not flatten channels and positions")
    if node.target in ("view", "reshape", torch.reshape):
        sizes = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
        if len(sizes) != 2 or sizes[1] != -1:
            # A width written as a number would not fit the small network.
            raise Unknown(f"{layer_name(node)} has a fixed width")
    positions = made[1] // shape[1]
    return Value([i for i in source.ids for _ in range(positions)], source.constant.repeat_interleave(positions))


def _getitem(channels: Channels, node: fx.Node, module: None) -> Value | None:
    """x[:, :, ::2, ::2], x[:, :, 0, 0]; or an entry of a shape."""
    if node.args[0] not in channels.values and _is_harmless_size(node.args[0], channels):
        return None
    source, index = _source(channels, node), node.args[1]
    if not isinstance(index, tuple) or len(index) < 2 or any(i != slice(None) for i in index[:2]):
        raise Unknown(f"{layer_name(node)} picks channels or images")
    if not all(isinstance(i, (int, slice)) for i in index[2:]):
        raise Unknown(f"{layer_name(node)} picks positions by something else than numbers")
    return Value(source.ids, source.constant)


def _size(channels: Channels, node: fx.Node, module: None) -> None:
    """x.size(0), x.shape[2]: harmless as long as the number of channels is not read."""
    if not _is_harmless_size(node, channels):
        raise Unknown(f"{layer_name(node)} reads the number of channels")


def _is_harmless_size(node: fx.Node, channels: Channels) -> bool:
    if node.target not in (getattr, "size") or node.args[0] not in channels.values:
        return False
    if node.target is getattr and node.args[1] != "shape":
        return node.args[1] in ("device", "dtype", "ndim")
    if node.target == "size" and len(node.args) > 1:
        entries = [node.args[1]]
    else:
        entries = [user.args[1] if user.target is operator.getitem else None for user in node.users]
    return all(isinstance(entry, int) and entry % len(_shape(node)) != 1 for entry in entries)


ACTIVATIONS = (
    "relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus threshold "
    "abs neg square clamp"
)
# (rule, where its operations are defined, their names). Those of Tensor are methods; an underscore more works in place.
OPERATIONS = (
    (_reader, nn, "Conv1d Conv2d Conv3d Linear"),
    (_batch_norm, nn, "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm"),
    (_same, nn, "Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout MaxPool1d MaxPool2d MaxPool3d"),
    (_same, nn, "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d"),
    (_same, nn, "AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d"),
    (_same, F, "max_pool1d max_pool2d max_pool3d adaptive_max_pool2d"),
    (_same, F, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    (_same, Tensor, "contiguous clone detach"),
    (_dropout, F, "dropout dropout2d dropout3d alpha_dropout"),
    (_average_pool, nn, "AvgPool1d AvgPool2d AvgPool3d"),
    (_keeps_zero, nn, "ZeroPad2d Upsample UpsamplingNearest2d UpsamplingBilinear2d"),
    (_keeps_zero, F, "avg_pool1d avg_pool2d avg_pool3d interpolate"),
    (_pointwise, nn, "ReLU ReLU6 LeakyReLU PReLU ELU SELU CELU GELU SiLU Mish Hardswish Hardsigmoid Hardtanh Sigmoid"),
    (_pointwise, nn, "Tanh Softplus Softsign LogSigmoid Tanhshrink Hardshrink Softshrink Threshold"),
    *((_pointwise, where, ACTIVATIONS) for where in (F, torch, Tensor, operator)),
    *((_binary, where, "add sub mul div truediv iadd isub imul itruediv") for where in (operator, torch, Tensor)),
    *((_positions_only, where, "mean squeeze") for where in (torch, Tensor)),
    *((_flatten, where, "Flatten flatten view reshape") for where in (nn, torch, Tensor)),
    (_concatenation, torch, "cat concat"),
    (_zero_pad, F, "pad"),
    (_getitem, operator, "getitem"),
    (_size, Tensor, "size"),
)
# By type of a module, function, name of a method, or path of a function whose package is not imported here.
RULES: dict[object, Callable] = {
    OptionA: _option_a,
    getattr: _size,
    "torchvision.ops.stochastic_depth.stochastic_depth": partial(_dropout, position=3),
}
for _rule, _where, _names in OPERATIONS:
    for _name in [n for name in _names.split() for n in (name, f"{name}_") if hasattr(_where, n)]:
        RULES[_name if _where is Tensor else getattr(_where, _name)] = _rule
