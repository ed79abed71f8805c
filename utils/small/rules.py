"""The rules of utils.small.channels, one per operation: which channels of the result are constants, and which belong together.

A rule takes (channels, node, module or None) and returns the result's Value, None for what is no tensor of channels; it raises Unknown, with the
reason, where it cannot be sure. Values are in eval mode and inputs are finite, so that 0 * x = 0.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from models.resnet_cifar import OptionA
from utils.small.trace import layer_name

if TYPE_CHECKING:
    from utils.small.channels import Channels

NAN = float("nan")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


@dataclass
class Value:
    """A tensor (B, C, ...) of the graph.

    Attributes:
        ids: of its C channels, for Channels.root.
        constant: float64 (C,): the channel's value for every input and at every position, NaN where there is no such value.
    """

    ids: list[int]
    constant: Tensor


@dataclass
class Reader:
    """A convolution (groups 1) or linear layer: what it reads, what it makes."""

    node: fx.Node
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
    """The operation, or this use of it, is not known; the message is the reason."""


def known_module(module: nn.Module) -> bool:
    """Whether its weights can be narrowed."""
    return type(module) in (*CONVOLUTIONS, *BATCH_NORMS, nn.Linear)


def _source(channels: Channels, node: fx.Node, n: int = 0) -> Value:
    value = channels.values.get(node.args[n]) if len(node.args) > n and isinstance(node.args[n], fx.Node) else None
    if value is None:
        raise Unknown(f"{layer_name(node)} gets something else than one tensor")
    return value


def _shape(node: fx.Node, n: int = 0) -> tuple[int, ...]:
    return node.args[n].meta["shape"]


# -- layers with weights --


def _reader(channels: Channels, node: fx.Node, module: nn.Module) -> Value:
    source = _source(channels, node)
    if len(_shape(node)) != module.weight.dim() or getattr(module, "groups", 1) != 1:
        return _depthwise(channels, node, module, source)
    weight = module.weight.detach().cpu().flatten(2) if module.weight.dim() > 2 else module.weight.detach().cpu()
    nonzero = (weight != 0).any(dim=2) if weight.dim() > 2 else weight != 0
    constant = torch.zeros(len(weight), dtype=torch.float64)
    if module.bias is not None:
        constant += module.bias.detach().double().cpu()
    # Zero padding lets a constant other than 0 vary along the border.
    even = isinstance(module, nn.Linear) or module.padding_mode != "zeros" or not pads(module)
    unknown = torch.isnan(source.constant) | ((source.constant != 0) & (not even))
    steady = (~unknown & (source.constant != 0)).nonzero().flatten()
    sums = weight[:, steady].double()
    constant += (sums.sum(dim=2) if sums.dim() > 2 else sums) @ source.constant[steady]
    constant = constant.where(~(nonzero & unknown).any(dim=1), NAN)
    ids = channels.new(len(weight))
    channels.readers.append(Reader(node, module, source, ids, nonzero))
    return Value(ids, constant)


def pads(module: nn.Module) -> bool:
    """Whether a convolution pads its input."""
    return module.padding == "same" or (not isinstance(module.padding, str) and any(module.padding))


def _depthwise(channels: Channels, node: fx.Node, module: nn.Module, source: Value) -> Value:
    if len(_shape(node)) != module.weight.dim():
        raise Unknown(f"{layer_name(node)} acts on a tensor of {len(_shape(node))} dimensions")
    if not module.groups == module.in_channels == module.out_channels:
        raise Unknown(f"{layer_name(node)} is a grouped convolution")
    weight = module.weight.detach().double().cpu()
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().double().cpu()
    even = module.padding_mode != "zeros" or not pads(module)
    product = weight.flatten(1).sum(dim=1) * source.constant
    product = product if even else product.where(source.constant == 0, NAN)
    zero = (weight.flatten(1) == 0).all(dim=1) | (source.constant == 0)
    return Value(source.ids, product.where(~zero, 0) + bias)


def _batch_norm(channels: Channels, node: fx.Node, module: nn.Module) -> Value:
    source = _source(channels, node)
    c = source.constant
    weight = torch.ones_like(c) if module.weight is None else module.weight.detach().double().cpu()
    bias = torch.zeros_like(c) if module.bias is None else module.bias.detach().double().cpu()
    if module.running_mean is None:
        normalised = torch.full_like(c, NAN)
    else:
        mean, var = module.running_mean.double().cpu(), module.running_var.double().cpu()
        normalised = (c - mean) / (var + module.eps).sqrt()
    return Value(source.ids, (normalised * weight).where(weight != 0, 0) + bias)


def _option_a(channels: Channels, node: fx.Node, module: OptionA) -> Value:
    source = _source(channels, node)
    ids = channels.new(len(source.ids) + module.new_channels)
    if channels.tie_pads:
        channels.unite(source.ids, ids[: len(source.ids)])
    channels.pads.append(Pad(node, module, source, ids))
    return Value(ids, torch.cat([source.constant, torch.zeros(module.new_channels, dtype=torch.float64)]))


# -- one operand, channel by channel --


def _same(channels: Channels, node: fx.Node, module: nn.Module | None) -> Value:
    """Leaves constants alone: dropout in eval mode, clone, pooling without zero padding."""
    source = _source(channels, node)
    return Value(source.ids, source.constant)


def _keeps_zero(channels: Channels, node: fx.Node, module: nn.Module | None) -> Value:
    """Keeps the constant 0 only: averages that count padding, interpolation, spatial zero padding."""
    source = _source(channels, node)
    return Value(source.ids, source.constant.where(source.constant == 0, NAN))


def _pointwise(channels: Channels, node: fx.Node, module: nn.Module | None) -> Value:
    """ReLU and its relatives: the constant of the result is the operation on the constant."""
    source = _source(channels, node)
    if module is not None and any(p.numel() != 1 for p in module.parameters()):
        raise Unknown(f"{layer_name(node)} has weights per channel")
    rest = [*node.args[1:], *node.kwargs.values()]
    if any(isinstance(a, fx.Node) for a in rest):
        raise Unknown(f"{layer_name(node)} takes more than one tensor")
    argument = source.constant.clone()
    if module is not None:
        dtype = next((p.dtype for p in module.parameters()), argument.dtype)
        constant = module(argument.to(dtype)).double()
    elif node.op == "call_method":
        constant = getattr(argument, node.target)(*node.args[1:], **node.kwargs)
    else:
        constant = node.target(argument, *node.args[1:], **node.kwargs)
    return Value(source.ids, constant.where(~torch.isnan(source.constant), NAN))


def _dropout(channels: Channels, node: fx.Node, module: None) -> Value:
    if node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True) is not False:
        raise Unknown(f"{layer_name(node)} is random in eval mode too")
    return _same(channels, node, module)


def _spatial_mean(channels: Channels, node: fx.Node, module: None) -> Value:
    source, ndim = _source(channels, node), len(_shape(node))
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (list, tuple)) or any(d % ndim < 2 for d in dims):
        raise Unknown(f"{layer_name(node)} is not over positions alone")
    return Value(source.ids, source.constant)


def _pad(channels: Channels, node: fx.Node, module: None) -> Value:
    """F.pad with literal numbers. New channels stay, all of them, as their number is written in the user's code."""
    source, shape = _source(channels, node), _shape(node)
    pad = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
    mode, fill = (
        node.kwargs.get(name, node.args[n] if len(node.args) > n else default)
        for n, name, default in ((2, "mode", "constant"), (3, "value", None))
    )
    if not all(isinstance(n, int) for n in pad) or mode != "constant" or fill not in (None, 0):
        raise Unknown(f"{layer_name(node)} pads with something else than zeros")
    front, back = (pad[i] if len(pad) > i else 0 for i in (2 * (len(shape) - 2), 2 * (len(shape) - 2) + 1))
    if front < 0 or back < 0 or len(pad) > 2 * (len(shape) - 1):
        raise Unknown(f"{layer_name(node)} cuts channels off")
    constant = source.constant
    if any(pad[: 2 * (len(shape) - 2)]):
        constant = constant.where(constant == 0, NAN)
    before, after = channels.new(front), channels.new(back)
    for ids in (before, after):
        if ids:
            channels.pin(ids, node, f"{layer_name(node)} adds a fixed number of channels")
    ids = before + source.ids + after
    if front or back:
        channels.joins.append((ids, [before, source.ids, after]))
    return Value(ids, torch.cat([constant.new_zeros(front), constant, constant.new_zeros(back)]))


# -- several operands --


def _binary(channels: Channels, node: fx.Node, module: None) -> Value:
    """x + y, x - y, x * y, x / y of two tensors with the same channels, or of a tensor and a number."""
    function = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    if len(node.args) != 2 or any(isinstance(a, fx.Node) for a in node.kwargs.values()):
        raise Unknown(f"{layer_name(node)} has operands that are not known")
    values = [channels.values.get(a) for a in tensors]
    if (
        not all(isinstance(a, (fx.Node, int, float)) for a in node.args)
        or not values
        or any(v is None for v in values)
        or len({_rank_and_channels(a) for a in tensors}) != 1
    ):
        raise Unknown(f"{layer_name(node)} has operands of different channels")
    operands = [
        channels.values[a].constant.clone() if isinstance(a, fx.Node) else torch.tensor(float(a), dtype=torch.float64)
        for a in node.args
    ]
    multiplies = node.target in (operator.mul, operator.imul, torch.mul, "mul", "mul_")
    zero = (operands[0] == 0) | (operands[1] == 0) if multiplies else None
    constant = function(*operands, **node.kwargs)
    if zero is not None:
        constant = constant.where(~zero, 0)
    if len(values) == 2:
        channels.unite(values[0].ids, values[1].ids)
    return Value(values[0].ids, constant.expand(len(values[0].ids)))


def _rank_and_channels(node: fx.Node) -> tuple[int, int]:
    shape = node.meta["shape"]
    return len(shape), shape[1]


def _concatenation(channels: Channels, node: fx.Node, module: None) -> Value:
    parts = node.args[0] if node.args else ()
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(parts, (list, tuple)) or any(p not in channels.values for p in parts):
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
        sizes = node.args[1:] if not isinstance(node.args[1], (list, tuple)) else node.args[1]
        if len(sizes) != 2 or sizes[1] != -1:
            # A width written as a number would not fit the small network.
            raise Unknown(f"{layer_name(node)} has a fixed width")
    positions = made[1] // shape[1]
    ids = [i for i in source.ids for _ in range(positions)]
    return Value(ids, source.constant.repeat_interleave(positions))


def _squeeze(channels: Channels, node: fx.Node, module: None) -> Value:
    dims = node.args[1:] or tuple(node.kwargs.values())
    if len(dims) != 1 or not isinstance(dims[0], int) or dims[0] % len(_shape(node)) < 2:
        raise Unknown(f"{layer_name(node)} is not of a position alone")
    return _same(channels, node, module)


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
    """x.size(0), x.shape[2]: fine as long as nobody asks for the number of channels."""
    if not _is_harmless_size(node, channels):
        raise Unknown(f"{layer_name(node)} asks for the number of channels")


def _is_harmless_size(node: fx.Node, channels: Channels) -> bool:
    if node.target in (getattr, "size") and node.args[0] in channels.values:
        ndim = len(_shape(node))
        if node.target is getattr and node.args[1] in ("device", "dtype", "ndim"):
            return True
        if node.target is getattr and node.args[1] != "shape":
            return False
        if node.target == "size" and len(node.args) > 1:
            return isinstance(node.args[1], int) and node.args[1] % ndim != 1
        return all(
            u.target is operator.getitem and isinstance(u.args[1], int) and u.args[1] % ndim != 1 for u in node.users
        )
    return False


def _average_pool(channels: Channels, node: fx.Node, module: nn.Module) -> Value:
    plain = not module.ceil_mode and getattr(module, "divisor_override", None) is None
    padding = module.padding if isinstance(module.padding, tuple) else (module.padding,)
    return (_same if plain and not any(padding) else _keeps_zero)(channels, node, module)


def _modules(names: str) -> list[type]:
    return [getattr(nn, name) for name in names.split()]


def _functions(module, names: str) -> list[Callable]:
    return [getattr(module, name) for name in names.split()]


RULES: dict[object, Callable] = {
    **dict.fromkeys((*CONVOLUTIONS, nn.Linear), _reader),
    **dict.fromkeys(BATCH_NORMS, _batch_norm),
    OptionA: _option_a,
    **dict.fromkeys(
        _modules(
            "Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout MaxPool1d MaxPool2d MaxPool3d "
            "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d"
        ),
        _same,
    ),
    **dict.fromkeys(_modules("AvgPool1d AvgPool2d AvgPool3d"), _average_pool),
    **dict.fromkeys(_modules("ZeroPad2d Upsample UpsamplingNearest2d UpsamplingBilinear2d"), _keeps_zero),
    **dict.fromkeys(
        _modules(
            "ReLU ReLU6 LeakyReLU PReLU ELU SELU CELU GELU SiLU Mish Hardswish Hardsigmoid Hardtanh Sigmoid Tanh Softplus Softsign "
            "LogSigmoid Tanhshrink Hardshrink Softshrink Threshold"
        ),
        _pointwise,
    ),
    nn.Flatten: _flatten,
    # functions
    **dict.fromkeys(
        _functions(
            F,
            "relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus threshold",
        ),
        _pointwise,
    ),
    **dict.fromkeys(_functions(torch, "relu relu_ sigmoid tanh clamp abs neg square"), _pointwise),
    operator.neg: _pointwise,
    **dict.fromkeys(_functions(F, "dropout dropout2d dropout3d alpha_dropout"), _dropout),
    **dict.fromkeys(
        _functions(
            F,
            "max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d",
        ),
        _same,
    ),
    **dict.fromkeys(_functions(F, "avg_pool1d avg_pool2d avg_pool3d interpolate"), _keeps_zero),
    **dict.fromkeys(
        (operator.add, operator.sub, operator.mul, operator.truediv, *IN_PLACE, torch.add, torch.sub, torch.mul),
        _binary,
    ),
    torch.mean: _spatial_mean,
    F.pad: _pad,
    **dict.fromkeys((torch.cat, torch.concat), _concatenation),
    **dict.fromkeys((torch.flatten, torch.reshape), _flatten),
    torch.squeeze: _squeeze,
    operator.getitem: _getitem,
    getattr: _size,
    # methods
    **dict.fromkeys(
        ["relu", "relu_", "sigmoid", "sigmoid_", "tanh", "clamp", "clamp_", "abs", "neg", "square"], _pointwise
    ),
    **dict.fromkeys(["contiguous", "clone", "detach"], _same),
    **dict.fromkeys(["add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"], _binary),
    "mean": _spatial_mean,
    **dict.fromkeys(["flatten", "view", "reshape"], _flatten),
    "squeeze": _squeeze,
    "size": _size,
}
