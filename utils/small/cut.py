"""The small network: a network with zeroed filters in, an equal one without them out.

    small, report = make_small(net, example_input)

An exact rewrite: same Python, same state-dict names, narrower layers; dense, nothing is gathered or scattered at run time. It has fewer channels wherever
utils.small.channels proves that nobody needs them, in the residual stream too. With option-A shortcuts the kept channels of a stage are ordered so that those that
arrive from the stage before come first, and the shortcut stays a plain zero-pad.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.small import set_sizes
from utils.base.errors import UserError
from utils.small.channels import INPUT, OUTPUT, Channels, Orderless, analyse
from utils.small.rules import Reader, pads
from utils.small.trace import ROOT, layer_name, run, trace

# Largest difference of a logit, in float32, that is let through.
TOLERANCE = 1e-4
# Above it a network's own rounding, some 1e-7 of its logits, comes near the tolerance.
LARGEST_LOGIT = 1000
RANDOM_IMAGES = 16
BATCH = 128


@dataclass
class Report:
    """What make_small did.

    Attributes:
        kept: {name of a convolution's or linear layer's weight: original indices of its filters, in the small network's order}.
        filters: {the same names: filters before}.
        pads: {name of an option-A shortcut: channels of zeros that it appends}.
        whole: {layer: why channels of it were kept that could not be proved dead}.
        merged: constant channels whose effect moved into a bias or into another constant channel.
        difference: largest difference of a logit between the network and the small one.
        images: images compared, random ones included.
    """

    kept: dict[str, list[int]] = field(default_factory=dict)
    filters: dict[str, int] = field(default_factory=dict)
    pads: dict[str, int] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    merged: int = 0
    difference: float = 0.0
    images: int = 0


def make_small(
    net: nn.Module, example_input: Tensor, images: Tensor | None = None, *, round_to: int = 1
) -> tuple[nn.Module, Report]:
    """Cuts out of a network every channel that can be proved not to be needed.

    Args:
        net: any network that takes one tensor; it is not changed. What torch.fx cannot follow, or this module does not know, keeps its
            channels, and the report says so.
        example_input: images (B, ...) of the size that the network is for; their values do not matter.
        images: real images (N, ...), normalised, on which the two networks are compared besides random ones.
        round_to: channels of a layer are filled up to a multiple of this with the strongest of the removed ones, where there are any left.

    Returns:
        (the small network in float32, on the CPU, in eval mode; the report).

    Raises:
        UserError: a logit differs by more than 1e-4, or the network does not take the example.
    """
    masked = copy.deepcopy(net).cpu().float().eval()
    example = example_input.detach().cpu().float()
    example = torch.cat([example, example])[:2]
    small = copy.deepcopy(masked)
    try:
        graph = trace(small, example)
    except Exception as error:
        raise UserError(f"the network does not run on an input of shape {tuple(example.shape)}: {error}") from None
    report = Report(merged=merge_constants(analyse(graph)))
    channels = analyse(graph)
    try:
        keep = round_up(channels, channels.needed(), round_to)
        rank = channels.ranks(keep)
    except Orderless:
        channels = analyse(graph, tie_pads=True)
        keep = round_up(channels, channels.needed(), round_to)
        rank = channels.ranks(keep)
    describe(channels, keep, rank, report)
    narrow(channels, keep, rank)
    compare(masked, small, example, images, channels, keep, rank, report)
    return small, report


@torch.no_grad()
def merge_constants(channels: Channels) -> int:
    """Frees channels that are constant but not zero: BatchNorm's running mean or bias of a removed filter is.

    In a layer without zero padding, and with a bias, W_j * c_j moves into the bias. Elsewhere all constant channels that a layer reads
    become one, r: W_r += W_j * c_j / c_r, W_j = 0; this is exact at borders too, as zero padding meets all of them alike.
    Changes the network's weights, not its function. Returns the number of constants that moved.
    """
    moved = 0
    single: dict[nn.Module, Reader] = {}
    shared = set()
    for reader in channels.readers:
        if single.setdefault(reader.module, reader) is not reader:
            shared.add(reader.module)
    representatives: set[int] = set()
    for module, reader in single.items():
        c = reader.source.constant
        found = ((c != 0) & ~torch.isnan(c) & reader.nonzero.any(dim=0)).nonzero().flatten().tolist()
        if module in shared or not found:
            continue
        weight = module.weight
        padded = not isinstance(module, nn.Linear) and pads(module)
        if module.bias is not None and not padded:
            gone = found
            effect = weight[:, gone].double().flatten(2).sum(dim=2) if weight.dim() > 2 else weight[:, gone].double()
            module.bias.copy_(module.bias + effect @ c[gone])
        else:
            # Not a representative that is tiny here: ratios far above 1 would cost precision.
            enough = 0.1 * max(abs(float(c[j])) for j in found)
            known = [
                j
                for j in found
                if channels.root(reader.source.ids[j]) in representatives and abs(float(c[j])) >= enough
            ]
            r = max(known or found, key=lambda j: abs(float(c[j])))
            representatives.add(channels.root(reader.source.ids[r]))
            gone = [j for j in found if j != r]
            ratio = (c[gone] / c[r]).view(1, -1, *[1] * (weight.dim() - 2))
            weight[:, r] = weight[:, r] + (weight[:, gone].double() * ratio).sum(dim=1)
        weight[:, gone] = 0
        moved += len(gone)
    return moved


def round_up(channels: Channels, keep: Tensor, multiple: int) -> Tensor:
    """Keeps more classes, so that the width of every layer is a multiple of `multiple` or what it was.

    The strongest of the removed come back: by the norm of their filters, and of the next layers' weights for them, as removed filters are often
    all zero; ties keep the lower index.
    """
    if multiple <= 1:
        return keep
    strength = strengths(channels)
    while True:
        before = int(keep.sum())
        for reader in channels.readers:
            classes = list(dict.fromkeys(channels.root(i) for i in reader.ids))
            kept = sum(bool(keep[c]) for c in classes)
            lacking = min(-kept % multiple, len(classes) - kept)
            removed = sorted((c for c in classes if not keep[c]), key=lambda c: strength[c], reverse=True)
            keep[removed[:lacking]] = True
            keep = channels.close(keep)
        if int(keep.sum()) == before:
            return keep


@torch.no_grad()
def strengths(channels: Channels) -> list[tuple[float, float]]:
    """(norm of the filters that make it, norm of the weights that read it) of every class."""
    made, read = torch.zeros(2, len(channels.parents), dtype=torch.float64)
    roots = channels.roots()
    for reader in channels.readers:
        weight = reader.module.weight
        made.index_add_(0, roots[reader.ids], weight.flatten(1).norm(dim=1).double())
        read.index_add_(0, roots[reader.source.ids], weight.transpose(0, 1).flatten(1).norm(dim=1).double())
    return list(zip(made.tolist(), read.tolist(), strict=True))


def _name(node) -> str:
    return node.target.removeprefix(ROOT).removeprefix(".")


def describe(channels: Channels, keep: Tensor, rank: dict[int, int], report: Report) -> None:
    """Fills in what is kept per layer, and why more than could be removed."""
    roots = channels.roots()
    why = {}
    pinned = [(ids, layer, reason) for ids, layer, reason in channels.pinned if reason not in (INPUT, OUTPUT)]
    for ids, _, reason in pinned:
        why.update(dict.fromkeys(roots[ids].tolist(), reason))
    for node, module, _, made in channels.layers:
        if module.weight is None or module.weight.dim() < 2:
            continue
        name = _name(node)
        prefix = f"{name}." if name else ""
        report.kept[f"{prefix}weight"] = channels.order(made, keep, rank)
        report.filters[f"{prefix}weight"] = len(made)
        reasons = [why[r] for r in roots[made].tolist() if r in why]
        if reasons:
            report.whole[name] = reasons[0]
    said = set(report.whole.values())
    modules = {layer_name(node) for node in channels.graph.graph.nodes if node.op == "call_module"}
    for _, layer, reason in pinned:
        if layer in modules or reason not in said:
            report.whole.setdefault(layer, reason)
    for pad in channels.pads:
        kept = channels.order(pad.ids, keep, rank)
        report.pads[_name(pad.node)] = len(kept) - len(channels.order(pad.source.ids, keep, rank))


@torch.no_grad()
def narrow(channels: Channels, keep: Tensor, rank: dict[int, int]) -> None:
    """Slices the weights of every layer, in place."""
    done = set()
    for _, module, read, made in channels.layers:
        if module in done:
            continue
        done.add(module)
        inputs, outputs = (torch.tensor(channels.order(ids, keep, rank)) for ids in (read, made))
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.dim() == 0:
                continue
            cut = value.detach()[outputs]
            if name == "weight" and value.dim() > 1 and getattr(module, "groups", 1) == 1:
                cut = cut[:, inputs]
            cut = cut.contiguous()
            is_parameter = isinstance(value, nn.Parameter)
            setattr(module, name, nn.Parameter(cut, requires_grad=value.requires_grad) if is_parameter else cut)
        set_sizes(module)
    for pad in channels.pads:
        arriving, made = (len(channels.order(ids, keep, rank)) for ids in (pad.source.ids, pad.ids))
        pad.module.new_channels = made - arriving


@torch.no_grad()
def compare(
    masked: nn.Module,
    small: nn.Module,
    example: Tensor,
    images: Tensor | None,
    channels: Channels,
    keep: Tensor,
    rank: dict[int, int],
    report: Report,
) -> None:
    """Raises UserError when the two differ by more than is allowed in any output, and names the layer where they part."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(RANDOM_IMAGES, *example.shape[1:], generator=generator)
    for batch in [random, *(images.detach().cpu().float().split(BATCH) if images is not None else [])]:
        expected = masked(batch)
        difference = largest_difference(expected, small(batch))
        report.difference = max(report.difference, difference)
        report.images += len(batch)
        if not difference <= TOLERANCE:
            layer = first_difference(masked, small, batch[:2], channels, keep, rank)
            largest = largest_difference(expected)
            advice = "report this network"
            if not math.isfinite(difference):
                advice = "the network's own weights or logits are not finite numbers"
            elif largest > LARGEST_LOGIT:
                advice = f"logits reach {largest:.3g}, too large for float32 to tell; train longer, or with a smaller learning rate"
            raise UserError(
                f"the small network differs by {difference:.3g} in a logit (allowed: {TOLERANCE:g}), first at {layer}; it is not written: {advice}"
            )


def largest_difference(first, second=None) -> float:
    """Between two outputs: tensors, or tuples and dicts of them. Without a second one, the largest magnitude of the first."""
    if isinstance(first, Tensor):
        distance = first.double() if second is None else first.double() - second.double()
        return float(distance.abs().max()) if first.numel() else 0.0
    keys = first if isinstance(first, dict) else range(len(first))
    return max((largest_difference(first[k], None if second is None else second[k]) for k in keys), default=0.0)


def first_difference(
    masked: nn.Module, small: nn.Module, batch: Tensor, channels: Channels, keep: Tensor, rank: dict[int, int]
) -> str:
    """The first layer whose kept channels differ in what a reader gets of them."""
    values = {node.name: value for node, value in channels.values.items()}
    for (node, wide), (_, slim) in zip(run(trace(masked, batch), batch), run(trace(small, batch), batch), strict=True):
        if node.name not in values or not isinstance(wide, Tensor):
            continue
        wide = wide[:, channels.order(values[node.name].ids, keep, rank)]
        if wide.shape != slim.shape or largest_difference(wide, slim) > TOLERANCE:
            return layer_name(node)
    return "the output"
