"""Which channels of a network nobody needs: constants, couplings and readers, operation by operation.

Every channel of every value in the graph belongs to a class. Operations that treat channels one by one (BatchNorm, ReLU, pooling, addition) put the channels of
their operands and of their result into one class; a class stays or goes as a whole. A class is needed when a convolution or linear layer that is
itself needed reads a channel of it that is not zero for every input, through a weight that is not zero; or when something this module
knows nothing of touches it. Needs spread from the outputs back until nothing changes; all other classes can be cut out exactly.
The rules of the single operations are in utils.small.rules.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from utils.small.rules import IN_PLACE, RULES, Pad, Reader, Unknown, Value, known_module
from utils.small.trace import ROOT, layer_name

# Reasons that go without saying.
INPUT, OUTPUT = "input", "output"
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


class Orderless(Exception):
    """The kept channels cannot be ordered so that every option-A shortcut stays a plain zero-pad."""


@dataclass
class Channels:
    """The channels of a traced network in eval mode; made by `analyse`.

    Attributes:
        values: by node.
        layers: (node, module, ids read, ids made) of every call of a module that is narrowed with its channels.
        joins: (ids of a concatenation, ids of its parts).
        pinned: (ids that must stay, in their order; the layer that wants it; why).
        tie_pads: True keeps a stage's channels in their original order: an option-A shortcut then couples its channels to those it is added to.
    """

    graph: fx.GraphModule
    tie_pads: bool = False
    values: dict[fx.Node, Value] = field(default_factory=dict)
    readers: list[Reader] = field(default_factory=list)
    pads: list[Pad] = field(default_factory=list)
    layers: list[tuple[fx.Node, nn.Module, list[int], list[int]]] = field(default_factory=list)
    joins: list[tuple[list[int], list[list[int]]]] = field(default_factory=list)
    pinned: list[tuple[list[int], str, str]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

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
            if a != b:
                self.parents[max(a, b)] = min(a, b)

    def pin(self, ids: list[int], node: fx.Node, reason: str) -> None:
        """These channels stay, all of them, in their order."""
        self.pinned.append((ids, layer_name(node), reason))

    # -- answers --

    def roots(self) -> Tensor:
        """int64: the class of every id."""
        return torch.tensor([self.root(i) for i in range(len(self.parents))])

    def needed(self) -> Tensor:
        """bool per id: whether its class is needed. A class is looked up at its root."""
        keep = torch.zeros(len(self.parents), dtype=torch.bool)
        roots = self.roots()
        for ids, _, _ in self.pinned:
            keep[roots[ids]] = True
        return self.close(keep)

    def close(self, keep: Tensor) -> Tensor:
        """Adds to the kept classes those that they need, until nothing changes. Every layer keeps at least one channel."""
        roots = self.roots()
        while True:
            before = int(keep.sum())
            for reader in reversed(self.readers):
                alive = (reader.source.constant != 0).nonzero().flatten()
                rows = reader.nonzero[keep[roots[reader.ids]]]
                keep[roots[reader.source.ids][alive[rows[:, alive].any(dim=0)]]] = True
            for pad in reversed(self.pads):
                source, made = roots[pad.source.ids], roots[pad.ids[: len(pad.source.ids)]]
                keep[source[keep[made] & (pad.source.constant != 0)]] = True
                # What the shortcut's input keeps has to arrive somewhere.
                keep[made[keep[source]]] = True
            if int(keep.sum()) == before:
                empty = [r for r in self.readers if not keep[roots[r.ids]].any()]
                if not empty:
                    return keep
                keep[roots[strongest(empty[0])[0]]] = True

    def order(self, ids: list[int], keep: Tensor, rank: dict[int, int]) -> list[int]:
        """Positions in `ids` of the kept channels, in the order that they have in the small network."""
        kept = [p for p, i in enumerate(ids) if keep[self.root(i)]]
        return sorted(kept, key=lambda p: (0, rank[r]) if (r := self.root(ids[p])) in rank else (1, p))

    def ranks(self, keep: Tensor) -> dict[int, int]:
        """{class: its place} such that in every option-A shortcut the kept channels of its input are the first of its result.

        Raises:
            Orderless: no such order, or one that an operation does not keep to.
        """
        rank: dict[int, int] = {}
        for pad in self.pads:
            arriving = self.order(pad.source.ids, keep, rank)
            others = [p for p, i in enumerate(pad.ids) if keep[self.root(i)] and p not in set(arriving)]
            for place, p in enumerate(arriving + others):
                if rank.setdefault(self.root(pad.ids[p]), place) != place:
                    raise Orderless(layer_name(pad.node))
        for pad in self.pads:
            arriving = self.order(pad.source.ids, keep, rank)
            if self.order(pad.ids, keep, rank)[: len(arriving)] != arriving:
                raise Orderless(layer_name(pad.node))
        for ids, layer, _ in self.pinned:
            if self.order(ids, keep, rank) != list(range(len(ids))):
                raise Orderless(layer)
        for ids, parts in self.joins:
            begin, expected = 0, []
            for part in parts:
                expected += [begin + p for p in self.order(part, keep, rank)]
                begin += len(part)
            if self.order(ids, keep, rank) != expected:
                raise Orderless("concatenation")
        return rank


@torch.no_grad()
def strongest(reader: Reader) -> list[int]:
    """A layer's ids, strongest filter first: by the filter's l2 norm; ties keep the lower index."""
    norms = torch.linalg.vector_norm(reader.module.weight.flatten(1).double(), dim=1)
    return [reader.ids[i] for i in torch.sort(norms, descending=True, stable=True).indices]


@torch.no_grad()
def analyse(graph: fx.GraphModule, tie_pads: bool = False) -> Channels:
    """Follows every channel through a graph of utils.small.trace. What it does not know is kept as it is, with a reason."""
    channels = Channels(graph, tie_pads)
    frozen = _frozen_modules(graph)
    calls: dict[nn.Module, tuple[list[int], list[int]]] = {}
    whole: dict[nn.Module, tuple[fx.Node, str]] = {}
    for node in graph.graph.nodes:
        shape, module = node.meta["shape"], None
        if node.op == "output":
            for source in node.all_input_nodes:
                if source in channels.values:
                    channels.pin(channels.values[source].ids, node, OUTPUT)
            continue
        try:
            if node.op == "placeholder":
                raise Unknown(INPUT)
            if node.op == "call_module":
                module = graph.get_submodule(node.target)
            if module in frozen:
                raise Unknown(f"{layer_name(node)}: {frozen[module]}")
            key = type(module) if module is not None else node.target
            rule = RULES.get(key) if isinstance(key, (type, str)) or callable(key) else None
            if rule is None or node.op == "get_attr":
                raise Unknown(f"{layer_name(node)} is an operation that is not known")
            value = rule(channels, node, module)
            if value is not None and (shape is None or len(shape) < 2 or len(value.ids) != shape[1]):
                raise Unknown(f"{layer_name(node)} gives a shape that is not expected of it")
        except Unknown as unknown:
            value = _keep_whole(channels, node, shape, str(unknown))
            if module is not None:
                whole[module] = node, str(unknown)
                module = None
        if value is None:
            continue
        # A running mean that decays once its filter is gone ends among float32's subnormal numbers: nothing comes of it.
        value.constant = value.constant.where(value.constant.abs() >= SMALLEST_NORMAL, value.constant * 0)
        channels.values[node] = value
        _after_in_place(channels, node, graph)
        if module is not None and known_module(module):
            read, made = channels.values[node.args[0]].ids, value.ids
            first_read, first_made = calls.setdefault(module, (read, made))
            channels.unite(read, first_read)
            channels.unite(made, first_made)
            channels.layers.append((node, module, read, made))
    for _, module, read, made in channels.layers:
        # A layer that is called once more in a way that is not known keeps its shape.
        if module in whole:
            channels.pin(read, *whole[module])
            channels.pin(made, *whole[module])
    return channels


def _keep_whole(channels: Channels, node: fx.Node, shape: tuple | None, reason: str) -> Value | None:
    for source in node.all_input_nodes:
        if source in channels.values:
            channels.pin(channels.values[source].ids, node, reason)
    if shape is None or len(shape) < 2:
        return None
    ids = channels.new(shape[1])
    channels.pin(ids, node, reason)
    return Value(ids, torch.full((shape[1],), torch.nan, dtype=torch.float64))


def _after_in_place(channels: Channels, node: fx.Node, graph: fx.GraphModule) -> None:
    """An in-place operation changes its operand too: later readers find a constant there only where the operation leaves it alone."""
    module = graph.get_submodule(node.target) if node.op == "call_module" else None
    in_place = (
        node.kwargs.get("inplace", False)
        or getattr(module, "inplace", False)
        or node.target in IN_PLACE
        or (node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"))
    )
    operand = node.args[0] if node.args else None
    if in_place and operand in channels.values and len(channels.values[operand].ids) == len(channels.values[node].ids):
        before, after = channels.values[operand], channels.values[node]
        unchanged = before.constant == after.constant
        channels.values[operand] = Value(before.ids, before.constant.where(unchanged, torch.nan))


def _frozen_modules(graph: fx.GraphModule) -> dict[nn.Module, str]:
    """Modules whose weights are used otherwise than by their own call, so that they must keep their shapes; and why."""
    frozen: dict[nn.Module, str] = {}
    owners: dict[int, nn.Module] = {}
    for module in graph.modules():
        for parameter in module.parameters(recurse=False):
            other = owners.setdefault(id(parameter), module)
            if other is not module:
                frozen[module] = frozen[other] = "its weights are shared with another layer"
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            owner = graph.get_submodule(node.target.rpartition(".")[0])
            frozen[owner] = f"its {node.target.rpartition('.')[2]} is used directly"
        elif node.op == "call_module":
            module = graph.get_submodule(node.target)
            if type(module) not in RULES:
                name = node.target.removeprefix(ROOT).removeprefix(".") or "the network"
                for inner in module.modules():
                    frozen.setdefault(inner, f"{name} ({type(module).__name__}) is not known")
    return frozen
