"""What a network can lose: its layers, the units that are removed one at a time, and the cost of any widths.

A unit is a class of channels that belong together (utils.small.channels): the filters that make it, in every layer, go
together. Units that appear in the same layers cost the same and form a group. All numbers are those of the unpruned
network, through all cuts, so a plan is made once and saved with the run.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from utils.base.errors import UserError
from utils.small.channels import INPUT, OUTPUT, Channels, analyse
from utils.small.counts import count
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
        sizes: parameters for one output and one input channel, and for one output channel.
        norm: name of the BatchNorm with weights that reads a convolution's output; None where there is none.
    """

    name: str
    kind: str
    made: Tensor
    read: Tensor
    unit: Tensor
    cost: int
    sizes: tuple[int, int]
    norm: str | None = None


@dataclass
class Plan:
    """The layers of a network and what of them can be removed.

    Attributes:
        removable: bool per unit.
        reasons: {convolution: why filters of it, or channels that it reads, are kept}.
        fixed: (multiply-adds, parameters) of everything that is in no layer of the plan.
    """

    layers: list[Layer]
    removable: Tensor
    reasons: dict[str, str]
    fixed: tuple[int, int] = (0, 0)

    @cached_property
    def convolutions(self) -> list[Layer]:
        """Those with a filter that can be removed."""
        return [c for c in self.layers if c.kind in CONVOLUTIONS and self.removable[c.unit].any()]

    @cached_property
    def groups(self) -> list[Tensor]:
        """The units of every group, ascending: they appear equally often in the same places."""
        places, found = defaultdict(list), defaultdict(list)
        for number, layer in enumerate(self.layers):
            for role in ("made", "read", "unit"):
                for unit in getattr(layer, role).tolist():
                    places[unit].append((number, role))
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

    def count(self, alive: Tensor) -> Tensor:
        """float64 (groups,): units that are alive, of a bool per unit."""
        return torch.stack([alive[units].sum() for units in self.groups]).double()

    @cached_property
    def full(self) -> Tensor:
        """`count` of the unpruned network."""
        return self.count(torch.ones_like(self.removable))

    @cached_property
    def incidence(self) -> tuple[Tensor, Tensor, Tensor]:
        """float64 (layers, groups) twice: output and input channels for one unit of the group; (layers,): cost."""
        outs, ins = torch.zeros(2, len(self.layers), len(self.groups), dtype=torch.float64)
        for number, layer in enumerate(self.layers):
            for counts, classes in ((outs, layer.made), (ins, layer.read)):
                counts[number] += torch.bincount(self.group_of[classes], minlength=len(self.groups))
        cost = torch.tensor([layer.cost for layer in self.layers], dtype=torch.float64)
        return outs / self.full, ins / self.full, cost

    def widths(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and inputs (layers,) for `kept` units of every group; layers that work channel by channel read 1."""
        outs, ins, _ = self.incidence
        return outs @ kept, ins @ kept + torch.tensor([float(not len(layer.read)) for layer in self.layers])

    def multiply_adds(self, kept: Tensor) -> int:
        """Of the network of these widths for one image, by the conventions of utils.small.counts."""
        outs, ins = self.widths(kept)
        return self.fixed[0] + round(float((self.incidence[2] * outs * ins).sum()))

    def parameters(self, kept: Tensor) -> int:
        """Of the network of these widths."""
        outs, ins = self.widths(kept)
        pairs, rows = torch.tensor([layer.sizes for layer in self.layers], dtype=torch.float64).T
        return self.fixed[1] + round(float((pairs * outs * ins + rows * outs).sum()))

    def state(self) -> dict:
        """Plain values and tensors, for `of_state`."""
        return {**{f: getattr(self, f) for f in self.__dataclass_fields__}, "layers": [vars(c) for c in self.layers]}

    @staticmethod
    def of_state(state: dict) -> "Plan":
        """On the CPU, wherever the state was loaded to."""
        layers = [{k: v.cpu() if isinstance(v, Tensor) else v for k, v in layer.items()} for layer in state["layers"]]
        return Plan([Layer(**layer) for layer in layers], state["removable"].cpu(), state["reasons"], state["fixed"])


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
    example = example[:1].to(next(net.parameters())).repeat(2, *[1] * (example.dim() - 1))
    channels = analyse(trace(net, example), tie_pads=True)
    layers = _layers(channels)
    removable, ends, reasons = _pins(channels, layers)
    exact = _stays_zero(net, example, layers, removable)
    for layer in layers:
        if layer.kind in CONVOLUTIONS and (removable & ~exact)[layer.made].any():
            reasons.setdefault(layer.name, "an operation makes something else of its zeros")
    removable &= exact
    plan = Plan(layers, removable if tied else _untie(layers, removable, ends), reasons)
    if not plan.convolutions:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        why = why or "it has no convolution, or torch.fx cannot trace its forward, which must not branch on values"
        raise UserError(f"no filter of this network can be removed ({why}); train it without pruning")
    parameters, macs = count(net, example)
    plan.fixed = (macs - plan.multiply_adds(plan.full), parameters - plan.parameters(plan.full))
    return plan


def _layers(channels: Channels) -> list[Layer]:
    roots = channels.roots()
    found: dict[nn.Module, Layer] = {}
    convolutions: dict[fx.Node, Layer] = {}
    for node, module, read, made in channels.layers:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            kind = "norm"
            if module.affine and node.args[0] in convolutions:
                convolutions[node.args[0]].norm = module_name(node)
        elif isinstance(module, nn.Linear):
            kind = "linear"
        else:
            kind = "depthwise" if module.groups > 1 else "conv"
        parameters = list(module.parameters(recurse=False))
        pair, rows = sum(p[0, 0].numel() for p in parameters if p.dim() > 1), sum(p.dim() == 1 for p in parameters)
        outputs, inputs = roots[made], roots[read if kind in ("conv", "linear") else []]
        layer = found.setdefault(module, Layer(module_name(node), kind, outputs, inputs, outputs, 0, (pair, rows)))
        if kind != "norm":
            layer.cost += pair * torch.Size(node.meta["shape"][2:]).numel()
        if kind in CONVOLUTIONS:
            convolutions[node] = layer
    for pad in channels.pads:
        made = roots[pad.ids]
        found[pad.module] = Layer(module_name(pad.node), "pad", made, roots[pad.source.ids], made, 0, (0, 0))
    return list(found.values())


def _pins(channels: Channels, layers: list[Layer]) -> tuple[Tensor, Tensor, dict[str, str]]:
    """bool per class: made by a convolution and nothing keeps it; input or output of the network; {layer: why kept}."""
    roots, reasons = channels.roots(), {}
    removable, ends = torch.zeros(2, len(roots), dtype=torch.bool)
    for layer in layers:
        removable[layer.made] |= layer.kind == "conv"
    calls = [node for node in channels.graph.graph.nodes if node.op == "call_module"]
    modules = {layer_name(node): channels.graph.get_submodule(node.target) for node in calls}
    for pinned in channels.pinned:
        kept = roots[pinned.ids]
        removable[kept] = False
        ends[kept] |= pinned.reason in (INPUT, OUTPUT)
        if pinned.reason == INPUT:
            continue
        reason = "its channels are the network's output" if pinned.reason == OUTPUT else pinned.reason
        for layer in layers:
            if layer.kind in CONVOLUTIONS and torch.isin(layer.made, kept).any():
                reasons.setdefault(layer.name, reason)
        if isinstance(modules.get(pinned.layer), nn.modules.conv._ConvNd):
            reasons.setdefault(pinned.layer, reason)
    return removable, ends, reasons


@torch.no_grad()
def _stays_zero(net: nn.Module, example: Tensor, layers: list[Layer], removable: Tensor) -> Tensor:
    """bool per class: when its filters are zero it is zero wherever a layer reads it (not so behind a sigmoid)."""
    zeroed = copy.deepcopy(net)
    for layer in layers:
        for tensor in row_tensors(zeroed, layer):
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
    classes = removable & (makers == 1)
    units, norms = classes, {layer.name: layer for layer in layers if layer.kind == "norm"}
    for layer in layers:
        if layer.kind in CONVOLUTIONS:
            alone = ~classes[layer.made] & ~never[layer.made]
            layer.unit = layer.made.clone()
            layer.unit[alone] = torch.arange(len(units), len(units) + int(alone.sum()))
            units = torch.cat([units, alone[alone]])
            if layer.norm:
                norms[layer.norm].unit = layer.unit
    return units


def row_tensors(net: nn.Module, layer: Layer) -> list[Tensor]:
    """What belongs to single outputs of a layer and is zero with them: filters and additive parameters and statistics.

    A BatchNorm's weight is not among them: it multiplies zeros.
    """
    module = net.get_submodule(layer.name)
    names = {"pad": (), "norm": ("bias", "running_mean")}.get(layer.kind, ("weight", "bias"))
    return [getattr(module, name) for name in names if getattr(module, name) is not None]
