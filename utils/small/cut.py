"""The small network: a network with zeroed filters in, an equal one without them out.

    small, report = make_small(net, example_input)

An exact rewrite: same Python, same state-dict names, narrower layers; dense, nothing is gathered or scattered at run
time. Channels are removed wherever utils.small.channels proves that they are not needed, in the residual stream too.
With option-A shortcuts the kept channels of a stage are ordered so that those that arrive from the stage before come
first, and the shortcut stays a plain zero-pad.
"""

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from models.small import set_sizes
from utils.base.errors import UserError
from utils.small.channels import INPUT, OUTPUT, Channels, Group, OrderError, analyse
from utils.small.groups import regroup
from utils.small.rules import Reader, pads
from utils.small.trace import layer_name, module_name, tensors, trace

# Largest difference of a logit, in float32, that is allowed.
TOLERANCE = 1e-4
# Above it a network's own rounding, some 1e-7 of its logits, comes near the tolerance.
LARGEST_LOGIT = 1000
RANDOM_IMAGES = 16
BATCH = 128

# Kept indices along the first and the second dimension of a tensor; None: all. Of grouped convolutions the second are
# (C_out, C_in / groups), filter by filter, -1 for a zero.
Slices = tuple[Tensor, Tensor | None]


@dataclass
class Report:
    """What make_small did.

    Attributes:
        kept: {name of a convolution's or linear layer's weight: original indices of its kept filters, in their order}.
        filters: {the same names: filters before}.
        pads: {name of an option-A shortcut: channels of zeros that it appends}.
        kept_whole: {layer: why channels of it were kept that could not be proved dead}.
        merged: constant channels whose effect moved into a bias or into another constant channel.
        difference: largest difference of a logit between the network and the small one.
        images: images compared, random ones included.
    """

    kept: dict[str, list[int]] = field(default_factory=dict)
    filters: dict[str, int] = field(default_factory=dict)
    pads: dict[str, int] = field(default_factory=dict)
    kept_whole: dict[str, str] = field(default_factory=dict)
    merged: int = 0
    difference: float = 0.0
    images: int = 0


def make_small(
    net: nn.Module, example_input: Tensor, images: Tensor | None = None, *, round_to: int = 1
) -> tuple[nn.Module, Report]:
    """Cuts out of a network every channel that can be proved not to be needed.

    Args:
        net: any network that takes one tensor; it is not changed. What torch.fx cannot trace, or has no rule, keeps its
            channels; the report names it.
        example_input: images (B, ...) of the size that the network is for; their values do not matter.
        images: real images (N, ...), normalised, on which the two networks are compared besides random ones.
        round_to: channels of a layer are filled up to a multiple of this with the strongest of the removed ones.

    Returns:
        (the small network in float32, on the CPU, in eval mode; the report).

    Raises:
        UserError: a logit differs by more than 1e-4, or the network does not take the example.
    """
    masked = copy.deepcopy(net).cpu().float().eval()
    example = example_input.detach().cpu().float()
    example = torch.cat([example, example])[:2]
    batches = [torch.randn(RANDOM_IMAGES, *example.shape[1:], generator=torch.Generator().manual_seed(0))]
    batches += images.detach().cpu().float().split(BATCH) if images is not None else []
    # Moving constants is the one step that changes weights; where it costs precision, they stay.
    for merge in (True, False):
        small, report = copy.deepcopy(masked), Report()
        graph = trace(small, example)
        if merge:
            report.merged = merge_constants(analyse(graph, regroup=True))
        channels = _select_needed(graph, round_to)
        describe(channels, report)
        narrow(channels)
        different = check_equal(masked, small, batches, report)
        if different is None:
            return small, report
    raise UserError(different)


def _select_needed(graph: fx.GraphModule, round_to: int) -> Channels:
    try:
        channels = analyse(graph, regroup=round_to == 1)
        channels.select(regroup(channels, round_up(channels, channels.close(), round_to)))
    except OrderError:
        channels = analyse(graph, tie_pads=True)
        channels.select(round_up(channels, channels.close(), round_to))
    return channels


@torch.no_grad()
def merge_constants(channels: Channels) -> int:
    """Frees channels that are constant but not zero: BatchNorm's running mean or bias of a removed filter is.

    In a layer without zero padding, and with a bias, W_j * c_j moves into the bias. Elsewhere all constant channels
    that a layer reads become one, r: W_r += W_j * c_j / c_r, W_j = 0; this is exact at borders too, as zero padding
    meets all of them alike. Changes the network's weights, not its function. Returns how many constants moved.
    """
    moved = 0
    by_module: dict[nn.Module, list[Reader]] = {}
    for reader in channels.readers:
        by_module.setdefault(reader.module, []).append(reader)
    representatives: set[int] = set()
    for module, (reader, *others) in by_module.items():
        # A layer that is called twice may read other constants in its other call.
        if others:
            continue
        wide, nonzero = module.weight.shape[1], reader.nonzero.any(dim=0)
        groups = len(reader.source.ids) // wide
        for begin, weight in zip(range(0, groups * wide, wide), module.weight.chunk(groups), strict=True):
            c, read = reader.source.constant[begin : begin + wide], nonzero[begin : begin + wide]
            gone = ((c != 0) & ~torch.isnan(c) & read).nonzero().flatten().tolist()
            if not gone:
                continue
            if module.bias is not None and not pads(module):
                bias = module.bias.chunk(groups)[begin // wide]
                bias += weight[:, gone].reshape(len(weight), len(gone), -1).double().sum(dim=2) @ c[gone]
            else:
                roots = {j: channels.root(reader.source.ids[begin + j]) for j in gone}
                # Not a representative that is tiny here: ratios far above 1 would cost precision.
                enough = 0.1 * float(c[gone].abs().max())
                known = [j for j in gone if roots[j] in representatives and abs(float(c[j])) >= enough]
                r = max(known or gone, key=lambda j: abs(float(c[j])))
                representatives.add(roots[r])
                gone.remove(r)
                ratio = (c[gone] / c[r]).view(1, -1, *[1] * (weight.dim() - 2))
                weight[:, r] += (weight[:, gone].double() * ratio).sum(dim=1)
            weight[:, gone] = 0
            moved += len(gone)
    return moved


def round_up(channels: Channels, keep: Tensor, multiple: int) -> Tensor:
    """Keeps more classes, so that the width of every layer is a multiple of `multiple` or what it was.

    The strongest of the removed come back: by the norm of their filters, and of the next layers' weights for them, as
    removed filters are often all zero; ties keep the lower index.
    """
    if multiple <= 1:
        return keep
    strength = strengths(channels)
    while True:
        before = int(keep.sum())
        for reader in channels.readers:
            classes = list(dict.fromkeys(channels.root(i) for i in reader.ids))
            removed = sorted((c for c in classes if not keep[c]), key=lambda c: strength[c], reverse=True)
            keep[removed[: (len(removed) - len(classes)) % multiple]] = True
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


def describe(channels: Channels, report: Report) -> None:
    """Fills in what is kept per layer, and why more than could be removed."""
    pinned = [p for p in channels.pinned if p.reason not in (INPUT, OUTPUT)]
    why = {channels.root(i): p.reason for p in pinned for i in p.ids}
    for node, module, _, made in channels.layers:
        if module.weight is None or module.weight.dim() < 2:
            continue
        name = f"{module_name(node)}.weight".removeprefix(".")
        report.kept[name], report.filters[name] = channels.order(made), len(made)
        reasons = [why[root] for root in map(channels.root, made) if root in why]
        if reasons:
            report.kept_whole[module_name(node)] = reasons[0]
    # Operations besides, as far as no layer names them already.
    said = set(report.kept_whole.values())
    modules = {layer_name(node) for node in channels.graph.graph.nodes if node.op == "call_module"}
    for p in pinned:
        if p.layer in modules or p.reason not in said:
            report.kept_whole.setdefault(p.layer, p.reason)
    for pad in channels.pads:
        report.pads[module_name(pad.node)] = len(channels.order(pad.ids)) - len(channels.order(pad.source.ids))


@torch.no_grad()
def narrow(channels: Channels) -> None:
    """Cuts every layer down to the selected channels, in place: new, smaller parameters and buffers."""
    # A layer that is called twice is cut once.
    for module, (read, made) in {module: (read, made) for _, module, read, made in channels.layers}.items():
        inputs, outputs = torch.tensor(channels.order(read)), torch.tensor(channels.order(made))
        grouped = _inside_groups(channels.groups[module], module) if module in channels.groups else None
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.dim() == 0:
                continue
            second = None if value.dim() < 2 else inputs if getattr(module, "groups", 1) == 1 else grouped
            cut = sliced(value.detach(), (outputs, second))
            is_parameter = isinstance(value, nn.Parameter)
            setattr(module, name, nn.Parameter(cut, requires_grad=value.requires_grad) if is_parameter else cut)
        set_sizes(module)
    for pad in channels.pads:
        pad.module.new_channels = len(channels.order(pad.ids)) - len(channels.order(pad.source.ids))


def sliced(value: Tensor, at: Slices) -> Tensor:
    """The kept part of a tensor of the shape that a parameter had before `narrow`."""
    first, second = (None if index is None else index.to(value.device) for index in at)
    value = value[first]
    if second is None or second.dim() == 1:
        return (value if second is None else value[:, second]).contiguous()
    second = second.view(*second.shape, *[1] * (value.dim() - 2)).expand(-1, -1, *value.shape[2:])
    return value.gather(1, second.clamp(min=0)) * (second >= 0)


def _inside_groups(groups: list[Group], module: nn.Module) -> Tensor:
    """int64 (C_out, width): for every weight of the new groups its place among the old filter's; -1: a zero."""
    wide = module.weight.shape[1]
    rows = [[p % wide if p // wide == out // wide else -1 for p in ins] for ins, outs in groups for out in outs]
    return torch.tensor(rows)


@torch.no_grad()
def check_equal(masked: nn.Module, small: nn.Module, batches: list[Tensor], report: Report) -> str | None:
    """None, or why the small network is refused: an output of the two differs by more than is allowed."""
    for batch in batches:
        expected, found = (torch.cat([t.double().flatten() for t in tensors(net(batch))]) for net in (masked, small))
        difference = float((expected - found).abs().max())
        if not difference <= report.difference:  # larger, or not a number
            report.difference = difference
        report.images += len(batch)
        if difference <= TOLERANCE:
            continue
        advice, largest = "report this network", float(expected.abs().max())
        if not math.isfinite(difference):
            advice = "the network's own weights or logits are not finite numbers"
        elif largest > LARGEST_LOGIT:
            advice = f"logits reach {largest:.3g}, too large for float32; train longer, or with a smaller learning rate"
        return (
            f"the small network differs by {difference:.3g} in a logit (allowed: {TOLERANCE:g}), it is not written: "
            f"{advice}"
        )
    return None
