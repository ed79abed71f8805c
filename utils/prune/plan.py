"""What a network can lose: its layers, the units that are removed one at a time, and the cost of any widths.

A unit is a class of channels that belong together (utils.small.channels): the filters that make it, in every layer, go
together. Units that appear in the same layers cost the same and form a group. All numbers are those of the unpruned
network, through all cuts, so a plan is made once and saved with the run.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from utils.base.errors import UserError
from utils.small.channels import INPUT, OUTPUT, Channels, analyse
from utils.small.counts import multiply_adds
from utils.small.trace import layer_name, module_name, trace

CONVOLUTIONS = ("conv", "depthwise")


@dataclass
class Layer:
    """A layer with weights, or an option-A shortcut.

    Attributes:
        name: of the module in the network.
        kind: "conv", "depthwise", "linear", "norm" (BatchNorm) or "pad" (option-A shortcut).
        made, read: int64 (C_out,) and (C_in,): the class of every output and input channel.
        unit: int64 (C_out,): the unit whose removal zeroes this output. It is the class, but for a convolution that is
            pruned alone: its filters are zeroed, while the channels that they share with other layers stay.
        cost: multiply-adds of one image for one output and one input channel (depthwise: for one channel).
        norm: name of the BatchNorm with weights that reads a convolution's output; None where there is none.
    """

    name: str
    kind: str
    made: Tensor
    read: Tensor
    unit: Tensor
    cost: int = 0
    norm: str | None = None


@dataclass
class Plan:
    """The layers of a network and what of them can be removed.

    Attributes:
        removable: bool per unit.
        reasons: {layer: why its filters, or channels that it makes, are kept}.
        fixed: (multiply-adds, parameters) of everything that is in no layer of the plan.
        sizes: {layer: (parameters per output and input, parameters per output)}.
    """

    layers: list[Layer]
    removable: Tensor
    reasons: dict[str, str]
    fixed: tuple[int, int]
    sizes: dict[str, tuple[int, int]]

    @cached_property
    def convolutions(self) -> list[Layer]:
        """Those with a filter that can be removed."""
        return [c for c in self.layers if c.kind in CONVOLUTIONS and self.removable[c.unit].any()]

    @cached_property
    def groups(self) -> list[Tensor]:
        """The units of every group, ascending. They appear equally often in the same places."""
        places = defaultdict(list)
        for number, layer in enumerate(self.layers):
            for role in ("made", "read", "unit"):
                for unit in getattr(layer, role).tolist():
                    places[unit].append((number, role))
        found = defaultdict(list)
        for unit in sorted(places):
            found[bool(self.removable[unit]), tuple(places[unit])].append(unit)
        return [torch.tensor(units) for units in found.values()]

    @cached_property
    def group_of(self) -> Tensor:
        """int64 per unit."""
        of = torch.full((len(self.removable),), -1)
        for number, units in enumerate(self.groups):
            of[units] = number
        return of

    @cached_property
    def full(self) -> Tensor:
        """float64 (groups,): units of every group in the unpruned network."""
        return torch.tensor([len(units) for units in self.groups], dtype=torch.float64)

    @cached_property
    def incidence(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """float64 (layers, groups): output and input channels per unit; and (layers,): cost, inputs of those without."""
        outs, ins = torch.zeros(2, len(self.layers), len(self.groups), dtype=torch.float64)
        for number, layer in enumerate(self.layers):
            outs[number].index_add_(0, self.group_of[layer.made], torch.ones(len(layer.made), dtype=torch.float64))
            ins[number].index_add_(0, self.group_of[layer.read], torch.ones(len(layer.read), dtype=torch.float64))
        cost = torch.tensor([layer.cost for layer in self.layers], dtype=torch.float64)
        alone = torch.tensor([float(not len(layer.read)) for layer in self.layers], dtype=torch.float64)
        return outs / self.full, ins / self.full, cost, alone

    def widths(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Output and input channels (layers,) for `kept` (groups,) units of every group. Inputs of one kind: 1."""
        outs, ins, _, alone = self.incidence
        return outs @ kept, ins @ kept + alone

    def multiply_adds(self, kept: Tensor) -> int:
        """Of the network of these widths, for one image, by the conventions of utils.small.counts."""
        outs, ins = self.widths(kept)
        return self.fixed[0] + round(float((self.incidence[2] * outs * ins).sum()))

    def parameters(self, kept: Tensor) -> int:
        outs, ins = self.widths(kept)
        pairs, rows = torch.tensor([self.sizes[c.name] for c in self.layers], dtype=torch.float64).T
        return self.fixed[1] + round(float((pairs * outs * ins + rows * outs).sum()))

    def count(self, alive: Tensor) -> Tensor:
        """float64 (groups,): units that are alive."""
        return torch.stack([alive[units].sum() for units in self.groups]).double()

    def filters(self, layer: Layer, kept: Tensor) -> int:
        """Filters of a convolution that are not zero."""
        units = torch.bincount(self.group_of[layer.unit], minlength=len(self.groups))
        return round(float((units / self.full) @ kept))

    def state(self) -> dict:
        """Plain values and tensors, for `Plan.of_state`."""
        facts = {name: getattr(self, name) for name in ("removable", "reasons", "fixed", "sizes")}
        return {**facts, "layers": [dict(vars(layer)) for layer in self.layers]}

    @staticmethod
    def of_state(state: dict) -> Plan:
        return Plan(**{**state, "layers": [Layer(**layer) for layer in state["layers"]]})


def make_plan(net: nn.Module, example: Tensor, tied: bool) -> Plan:
    """The plan of an unpruned network. The network is not changed.

    Args:
        net: a network that takes one tensor. What torch.fx cannot trace, or has no rule, keeps its channels.
        example: images (B, C, H, W) of the size that the network is for; their values do not matter.
        tied: channels that are added together are removed together, all filters that make them. False: every
            convolution by itself, as in the papers; only channels that it makes alone can be cut out.

    Raises:
        UserError: no filter can be removed.
    """
    was_training = net.training
    example = example[:1].to(next(net.parameters())).repeat(2, *[1] * (example.dim() - 1))
    channels = analyse(trace(net.eval(), example), tie_pads=True)
    layers, removable, reasons = _layers(channels)
    exact = _stays_zero(net, example, layers, removable)
    net.train(was_training)
    for layer in layers:
        if layer.kind in CONVOLUTIONS and (removable & ~exact)[layer.made].any():
            reasons.setdefault(layer.name, "an operation makes something else of its zeros")
    removable &= exact
    if not tied:
        removable = _untie(layers, removable, _pinned_roots(channels, {INPUT, OUTPUT}))
    modules = {layer.name: net.get_submodule(layer.name) for layer in layers}
    sizes = {name: _sizes(module) for name, module in modules.items()}
    plan = Plan(layers, removable, reasons, (0, 0), sizes)
    if not plan.convolutions:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it has no convolution"
        raise UserError(f"no filter of this network can be removed ({why}); train it without pruning")
    macs = sum(multiply_adds(net, example[:1]).values()) - plan.multiply_adds(plan.full)
    plan.fixed = (macs, sum(p.numel() for p in net.parameters()) - plan.parameters(plan.full))
    return plan


def _layers(channels: Channels) -> tuple[list[Layer], Tensor, dict[str, str]]:
    """The layers; bool per class, which are made by a convolution and may go; {layer: why its channels are kept}."""
    roots = channels.roots()
    found: dict[nn.Module, Layer] = {}
    by_node, none = {}, torch.tensor([], dtype=torch.int64)
    removable = torch.zeros(len(roots), dtype=torch.bool)
    for call in channels.layers:
        module, made, read = call.module, roots[call.made], roots[call.read]
        positions = torch.Size(call.node.meta["shape"][2:]).numel()
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            layer = found.setdefault(module, Layer(module_name(call.node), "norm", made, none, made))
            if call.node.args[0] in by_node and module.affine:
                by_node[call.node.args[0]].norm = layer.name
            continue
        if isinstance(module, nn.Linear):
            kind = "linear"
        else:
            kind = "depthwise" if module.groups > 1 else "conv"
            removable[made] = True
        read = none if kind == "depthwise" else read
        layer = found.setdefault(module, Layer(module_name(call.node), kind, made, read, made))
        layer.cost += positions * module.weight[0, 0].numel()
        if kind in CONVOLUTIONS:
            by_node[call.node] = layer
    layers = list(found.values())
    for pad in channels.pads:
        made = roots[pad.ids]
        layers.append(Layer(module_name(pad.node), "pad", made, roots[pad.source.ids], made))
    reasons = {}
    modules = {layer_name(node): module for node, module, *_ in channels.layers}
    for pinned in channels.pinned:
        kept = roots[pinned.ids]
        removable[kept] = False
        for layer in layers:
            if layer.kind in CONVOLUTIONS and pinned.reason != INPUT and torch.isin(layer.made, kept).any():
                reason = "its channels are the network's output" if pinned.reason == OUTPUT else pinned.reason
                reasons.setdefault(layer.name, reason)
        if pinned.reason not in (INPUT, OUTPUT) and pinned.layer not in modules:
            reasons.setdefault(pinned.layer, pinned.reason)
    return layers, removable, reasons


def _pinned_roots(channels: Channels, reasons: set[str]) -> Tensor:
    """bool per class: kept for one of these reasons."""
    roots, found = channels.roots(), torch.zeros(len(channels.parents), dtype=torch.bool)
    for pinned in channels.pinned:
        found[roots[pinned.ids]] |= pinned.reason in reasons
    return found


@torch.no_grad()
def _stays_zero(net: nn.Module, example: Tensor, layers: list[Layer], removable: Tensor) -> Tensor:
    """bool per class: when its filters are zero it is zero wherever a layer reads it (not so behind a sigmoid)."""
    zeroed = copy.deepcopy(net).eval()
    for layer in layers:
        for _, tensor in row_tensors(zeroed.get_submodule(layer.name), layer.kind):
            tensor[removable[layer.made].to(tensor.device)] = 0
    channels = analyse(trace(zeroed, example), tie_pads=True)
    roots, exact = channels.roots(), torch.ones(len(removable), dtype=torch.bool)
    for reader in channels.readers:
        exact[roots[reader.source.ids][reader.source.constant != 0]] = False
    return exact


def _untie(layers: list[Layer], removable: Tensor, never: Tensor) -> Tensor:
    """Every convolution's filters become units of their own; a class stays one only where it has a single maker."""
    makers = torch.zeros(len(removable), dtype=torch.int64)
    for layer in layers:
        if layer.kind in (*CONVOLUTIONS, "linear"):
            makers[layer.made.unique()] += 1
    classes = len(removable)
    removable = removable & (makers == 1)
    norms = {layer.name: layer for layer in layers if layer.kind == "norm"}
    for layer in layers:
        if layer.kind in CONVOLUTIONS:
            alone = ~removable[layer.made] & ~never[layer.made]
            layer.unit = layer.made.clone()
            layer.unit[alone] = torch.arange(classes, classes + int(alone.sum()))
            classes += int(alone.sum())
            removable = torch.cat([removable, torch.ones(int(alone.sum()), dtype=torch.bool)])
            if layer.norm:
                norms[layer.norm].unit = layer.unit
    return removable


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Parameters per pair of an output and an input channel, and per output channel."""
    parameters = list(module.parameters(recurse=False))
    pairs = [p[0, 0].numel() for p in parameters if p.dim() > 1]
    return sum(pairs), sum(p.dim() == 1 for p in parameters)


def row_tensors(module: nn.Module, kind: str) -> list[tuple[str, Tensor]]:
    """What belongs to single outputs of a layer and is zero with them: filters and additive parameters and statistics.

    A BatchNorm's weight is not among them: it multiplies zeros.
    """
    names = {"pad": (), "norm": ("bias", "running_mean")}.get(kind, ("weight", "bias"))
    return [(name, getattr(module, name)) for name in names if getattr(module, name) is not None]
