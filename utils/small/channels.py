"""The channels of a network, operation by operation: which belong together, which are constant, which are needed.

    channels = analyse(trace(net, example))
    channels.select(channels.close())
    channels.order(layer.made)            # for a layer of channels.layers: its kept filters

Every channel of every value in the graph belongs to a class, named by its root. Operations that treat channels one by
one (BatchNorm, ReLU, pooling, addition) put the channels of their operands and of their result into one class; a class
is kept or removed as one. A class is needed when a convolution or linear layer that is itself needed reads a channel
of it that is not zero for every input, through a weight that is not zero; or when an operation without a rule touches
it. Needs spread from the outputs back until nothing changes; all other classes can be cut out exactly. The rules of the
single operations are in utils.small.rules.
"""

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from utils.small.rules import NARROWED, RULES, Pad, Reader, Unknown, Value
from utils.small.trace import layer_name, module_name

# The channels that a group of a convolution reads, and those that it makes, by their positions.
Group = tuple[list[int], list[int]]
# Reasons that need no mention in a report.
INPUT, OUTPUT = "input", "output"
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


class OrderError(Exception):
    """No order of the kept channels suits every option-A shortcut, grouped convolution, concatenation and pin."""


class LayerCall(NamedTuple):
    """A call of a layer whose weights are narrowed with its channels, and the ids that it reads and makes."""

    node: fx.Node
    module: nn.Module
    read: list[int]
    made: list[int]


class Pinned(NamedTuple):
    """Ids that must stay, all of them in their order; the layer that needs it; why."""

    ids: list[int]
    layer: str
    reason: str


@dataclass
class Channels:
    """The channels of a traced network in eval mode; made by `analyse`.

    Attributes:
        tie_pads: an option-A shortcut couples its channels to those it is added to: stages keep their original order.
        graph: the traced network.
        values: {node: the Value that it produces}.
        regroup: grouped convolutions are readers and need a plan (utils.small.groups); else they keep all channels.
        readers: convolutions that are not depthwise, and linear layers.
        pads: option-A shortcuts.
        layers: every call of a convolution, linear layer or BatchNorm that is narrowed.
        joins: (ids of a concatenation, ids of its parts).
        groups, orders: of grouped convolutions: the new groups; (ids, the order of those that are kept).
        pinned: channels that must stay, and why.
        parents: of every channel id another one of its class, itself at the root (a union-find forest).
        keep, rank: set by `select`: bool per id, read at the roots, what is kept; {root: place} of ordered classes.
    """

    graph: fx.GraphModule
    tie_pads: bool = False
    regroup: bool = False
    values: dict[fx.Node, Value] = field(default_factory=dict)
    readers: list[Reader] = field(default_factory=list)
    pads: list[Pad] = field(default_factory=list)
    layers: list[LayerCall] = field(default_factory=list)
    joins: list[tuple[list[int], list[list[int]]]] = field(default_factory=list)
    groups: dict[nn.Module, list[Group]] = field(default_factory=dict)
    orders: list[tuple[list[int], list[int]]] = field(default_factory=list)
    pinned: list[Pinned] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    keep: Tensor | None = None
    rank: dict[int, int] = field(default_factory=dict)

    # -- building blocks for the rules --

    def new(self, n: int) -> list[int]:
        """Ids of n channels, each a class of its own."""
        first = len(self.parents)
        self.parents.extend(range(first, first + n))
        return list(range(first, first + n))

    def root(self, i: int) -> int:
        while self.parents[i] != i:
            self.parents[i] = self.parents[self.parents[i]]
            i = self.parents[i]
        return i

    def unite(self, first: list[int], second: list[int]) -> None:
        for a, b in zip(first, second, strict=True):
            a, b = self.root(a), self.root(b)
            self.parents[max(a, b)] = min(a, b)

    def pin(self, ids: list[int], node: fx.Node, reason: str) -> None:
        self.pinned.append(Pinned(ids, layer_name(node), reason))

    # -- answers --

    def roots(self) -> Tensor:
        """int64: the class of every id."""
        return torch.tensor([self.root(i) for i in range(len(self.parents))])

    def close(self, keep: Tensor | None = None) -> Tensor:
        """These classes, those that must stay, and all that they need; every layer keeps at least one channel.

        Args:
            keep: bool per id, read at the roots (None: no class). It is changed and returned.
        """
        keep = torch.zeros(len(self.parents), dtype=torch.bool) if keep is None else keep
        roots = self.roots()
        for pinned in self.pinned:
            keep[roots[pinned.ids]] = True
        while True:
            before = int(keep.sum())
            for reader in reversed(self.readers):
                read = reader.nonzero[keep[roots[reader.ids]]].any(dim=0) & (reader.source.constant != 0)
                keep[roots[reader.source.ids][read]] = True
            for pad in reversed(self.pads):
                source, made = roots[pad.source.ids], roots[pad.ids[: len(pad.source.ids)]]
                keep[source[keep[made] & (pad.source.constant != 0)]] = True
                # What the shortcut's input keeps has to arrive somewhere.
                keep[made[keep[source]]] = True
            if int(keep.sum()) == before:
                empty = next((r for r in self.readers if not keep[roots[r.ids]].any()), None)
                if empty is None:
                    return keep
                keep[self.root(empty.ids[strongest_filter(empty.module)])] = True

    def select(self, keep: Tensor) -> None:
        """Takes a result of `close` as what is kept, and finds its order: the kept channels of an option-A shortcut's
        input become the first of its result, those of grouped convolutions follow `orders`.

        Raises:
            OrderError: no such order, or one that an operation does not keep to.
        """
        self.keep, self.rank = keep, {}
        for pad in self.pads:
            self._rank(pad.ids, self._arriving_first(pad))
        for ids, order in self.orders:
            self._rank(ids, order)
        wanted = [*self.orders, *((p.ids, list(range(len(p.ids)))) for p in self.pinned)]
        for ids, parts in self.joins:
            begins = accumulate(map(len, parts[:-1]), initial=0)
            wanted.append((ids, [b + p for b, part in zip(begins, parts, strict=True) for p in self.order(part)]))
        wanted += [(pad.ids, self._arriving_first(pad)) for pad in self.pads]
        if any(self.order(ids) != order for ids, order in wanted):
            raise OrderError

    def _arriving_first(self, pad: Pad) -> list[int]:
        arriving = self.order(pad.source.ids)
        return arriving + [p for p in self.order(pad.ids) if p not in set(arriving)]

    def _rank(self, ids: list[int], order: list[int]) -> None:
        for place, p in enumerate(order):
            self.rank.setdefault(self.root(ids[p]), place)

    def order(self, ids: list[int]) -> list[int]:
        """After `select`: positions in `ids` of the kept channels, in the order that they have in the small network."""
        kept = [p for p, i in enumerate(ids) if self.keep[self.root(i)]]
        return sorted(kept, key=lambda p: self.rank.get(self.root(ids[p]), math.inf))


@torch.no_grad()
def strongest_filter(module: nn.Module) -> int:
    """Index of the filter with the largest l2 norm; of equal ones the first."""
    norms = torch.linalg.vector_norm(module.weight.flatten(1).double(), dim=1).tolist()
    return norms.index(max(norms))


@torch.no_grad()
def analyse(graph: fx.GraphModule, tie_pads: bool = False, regroup: bool = False) -> Channels:
    """Follows every channel through a graph of utils.small.trace. Operations without a rule keep theirs."""
    fixed = _fixed_modules(graph)
    while True:
        channels = Channels(graph, tie_pads, regroup)
        unknown = _follow(channels, fixed)
        # A layer that is also called in a way that has no rule keeps its shape in all its calls.
        again = {call.module: unknown[call.module] for call in channels.layers if call.module in unknown}
        if not again:
            return channels
        fixed.update(again)


def _follow(channels: Channels, fixed: dict[nn.Module, str]) -> dict[nn.Module, str]:
    """Applies the rules node by node. Returns the modules with a call that has no rule, and why."""
    unknown: dict[nn.Module, str] = {}
    calls: dict[nn.Module, LayerCall] = {}
    for node in channels.graph.graph.nodes:
        if node.op == "output":
            for source in node.all_input_nodes:
                if source in channels.values:
                    channels.pin(channels.values[source].ids, node, OUTPUT)
            continue
        module = channels.graph.get_submodule(node.target) if node.op == "call_module" else None
        try:
            value = _apply(channels, node, module, fixed)
        except Unknown as error:
            unknown[module], module = str(error), None
            value = _keep_all(channels, node, str(error))
        if value is not None:
            # The running mean of a removed filter decays to float32's subnormal numbers, which have no effect.
            value.constant = value.constant.where(value.constant.abs() >= SMALLEST_NORMAL, value.constant * 0)
            channels.values[node] = value
        for changed in channels.values.keys() & node.meta["changed"]:
            # Later readers of what the operation changes in place find a constant there only where it was left alone.
            before = channels.values[changed]
            is_known = value is not None and before.ids == value.ids
            same = (before.constant == value.constant) if is_known else torch.tensor(False)
            channels.values[changed] = Value(before.ids, before.constant.where(same, math.nan))
        if type(module) in NARROWED:
            call = LayerCall(node, module, channels.values[node.args[0]].ids, value.ids)
            first = calls.setdefault(module, call)
            channels.unite(call.read, first.read)
            channels.unite(call.made, first.made)
            channels.layers.append(call)
    return unknown


def _apply(channels: Channels, node: fx.Node, module: nn.Module | None, fixed: dict[nn.Module, str]) -> Value | None:
    if node.op == "placeholder":
        raise Unknown(INPUT)
    if module in fixed:
        raise Unknown(f"{layer_name(node)}: {fixed[module]}")
    key = type(module) if module is not None else node.target
    path = f"{getattr(key, '__module__', '')}.{getattr(key, '__name__', '')}"
    rule = None if node.op == "get_attr" else RULES.get(key, RULES.get(path))
    if rule is None:
        raise Unknown(f"{layer_name(node)} is an operation without a rule")
    value, shape = rule(channels, node, module), node.meta["shape"]
    if value is not None and (shape is None or len(shape) < 2 or len(value.ids) != shape[1]):
        raise Unknown(f"{layer_name(node)} gives an unexpected shape")
    return value


def _keep_all(channels: Channels, node: fx.Node, reason: str) -> Value | None:
    """Keeps all channels of what a node reads and gives."""
    for source in node.all_input_nodes:
        if source in channels.values:
            channels.pin(channels.values[source].ids, node, reason)
    shape = node.meta["shape"]
    if shape is None or len(shape) < 2:
        return None
    ids = channels.new(shape[1])
    channels.pin(ids, node, reason)
    return Value(ids, torch.full((shape[1],), math.nan, dtype=torch.float64))


def _fixed_modules(graph: fx.GraphModule) -> dict[nn.Module, str]:
    """Modules whose weights are used otherwise than by their own call, so that they must keep their shapes; and why."""
    fixed: dict[nn.Module, str] = {}
    owners: dict[int, nn.Module] = {}
    for module in graph.modules():
        for parameter in module.parameters(recurse=False):
            other = owners.setdefault(id(parameter), module)
            if other is not module:
                fixed[module] = fixed[other] = "its weights are shared with another layer"
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            fixed[graph.get_submodule(owner)] = f"its {name} is used directly"
        elif node.op == "call_module":
            module = graph.get_submodule(node.target)
            if type(module) not in RULES:
                name = module_name(node) or "the network"
                for inner in module.modules():
                    fixed.setdefault(inner, f"{name} ({type(module).__name__}) has no rule")
    return fixed
