"""Filters of a network: what belongs to each, and the plan: how many a convolution keeps, and whether it does."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from AHSG_HT import kept_count
from utils.base.errors import UserError
from utils.small.trace import trace

BATCHNORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# Operations channel by channel that keep zeros.
PASSED = (nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d)
PASSED_FUNCTIONS = (F.relu, torch.relu, F.relu6, F.leaky_relu, F.dropout, F.max_pool2d, F.avg_pool2d)


def filter_additives(net: nn.Module, example: Tensor) -> dict[nn.Parameter, list[nn.Parameter]]:
    """{weight of a convolution: additive parameters that belong to its filters}, for AHSG_HT(..., additives=).

    These are its own bias, and the bias of the BatchNorm that alone reads its output, directly or through operations
    such as ReLU and pooling that keep a zero channel zero. What follows an addition or a concatenation belongs to no
    single filter, nor does the BatchNorm of a layer that is called twice. Where torch.fx cannot trace a module, the
    convolutions in it have their own bias only.

    Args:
        net: not changed; its training or eval mode is that of before.
        example: a mini-batch (2, C, H, W) that it takes, on its device.

    Raises:
        UserError: the network does not run on the example.
    """
    graph = trace(net, example)
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    called = Counter(graph.get_submodule(node.target) for node in calls)
    # What is traced of a module that became one opaque operation may be a part of what it does.
    opaque = {inner for module in called for inner in module.modules() if inner is not module}
    own = {m: [m.bias] for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is not None}
    for node in calls:
        conv = graph.get_submodule(node.target)
        norm = _only_norm(graph, node) if isinstance(conv, nn.Conv2d) else None
        if norm is not None and called[conv] == called[norm] == 1 and not {conv, norm} & opaque:
            own.setdefault(conv, []).append(norm.bias)
    return {conv.weight: biases for conv, biases in own.items()}


@torch.no_grad()
def logits_layer(net: nn.Module, example: Tensor) -> nn.Module | None:
    """The linear or convolutional layer that runs last on images (B, C, H, W), where it makes the logits."""
    called = []
    layers = [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(lambda layer, *_: called.append(layer)) for layer in layers]
    was_training = net.training
    try:
        logits = net.eval()(example)
    finally:
        net.train(was_training)
        for handle in handles:
            handle.remove()
    return called[-1] if called and len(called[-1].weight) == logits.shape[1] else None


def _only_norm(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The BatchNorm with a bias that alone reads a convolution's output."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = graph.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, BATCHNORMS):
            return module if module.bias is not None else None
        if not isinstance(module, PASSED) and not (node.op == "call_function" and node.target in PASSED_FUNCTIONS):
            return None
    return None


@dataclass(frozen=True)
class Convolution:
    """One convolution: the name of its weight, its filters in all and those kept."""

    name: str
    shape: tuple[int, ...]
    kept: int

    @property
    def filters(self) -> int:
        return self.shape[0]

    @property
    def removed(self) -> int:
        return self.filters - self.kept


def plan_convolutions(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Convolution]:
    """Every convolution of a network, in the order of its parameters, and what its parameter group keeps of it.

    A layer without a group, without gradient, in a group that thresholds single entries, or of an optimizer that does
    not threshold (no HTrate) keeps everything.
    """
    rates = {}
    for group in optimizer.param_groups:
        by_filter = group.get("unit", "filter") == "filter"
        rates |= {p: group.get("HTrate", 1) if by_filter and p.requires_grad else 1 for p in group["params"]}
    weights = [(name, p) for name, p in net.named_parameters() if p.dim() == 4]
    return [Convolution(name, tuple(p.shape), kept_count(p.shape[0], rates.get(p, 1))) for name, p in weights]


def format_plan(plan: list[Convolution]) -> str:
    """A table of the plan, a line per convolution."""
    width = max((len(layer.name) for layer in plan), default=0)
    lines = [f"{'convolution':{width}}  {'shape':>16}  kept  removed"]
    for layer in plan:
        lines.append(
            f"{layer.name:{width}}  {'x'.join(map(str, layer.shape)):>16}  {layer.kept:4d}  {layer.removed:7d}"
        )
    total, removed = sum(layer.filters for layer in plan), sum(layer.removed for layer in plan)
    lines.append(f"{len(plan)} convolutions, {total} filters: {total - removed} kept, {removed} removed")
    return "\n".join(lines)


@torch.no_grad()
def kept_filters(net: nn.Module, additives: Mapping[Tensor, Sequence[Tensor]] | None = None) -> dict[str, list[int]]:
    """{name of a convolution's weight: indices of its filters that are not zero}.

    Args:
        additives: of filter_additives: a filter counts as zero when these of it are zero, too.
    """
    kept = {}
    for name, p in net.named_parameters():
        if p.dim() == 4:
            alive = p.flatten(1).ne(0).any(dim=1)
            for additive in (additives or {}).get(p, ()):
                alive |= additive.ne(0)
            kept[name] = alive.nonzero().flatten().tolist()
    return kept


def check_plan(plan: list[Convolution], kept: dict[str, list[int]], start: dict[str, list[int]] | None = None) -> None:
    """Compares a network after thresholding with its plan.

    Args:
        plan: of the network.
        kept: its filters that are not zero.
        start: those of the checkpoint that the run started from. A filter that was zero there need not come back.

    Raises:
        UserError: a convolution has fewer filters than planned and than at the start, or more than planned.
    """
    for layer in plan:
        at_least = min(layer.kept, len(start[layer.name])) if start else layer.kept
        if not at_least <= len(kept[layer.name]) <= layer.kept:
            raise UserError(
                f"{layer.name} has {len(kept[layer.name])} filters that are not zero, the plan keeps {layer.kept}; the "
                "weights have collapsed or thresholding did not reach this layer: lower the learning rate, or report "
                "this network"
            )


def count_zero_filters(plan: list[Convolution], kept: dict[str, list[int]]) -> str:
    """Zero filters in words, "5 of 16 (7 convolutions), 10 of 32 (6 convolutions)"."""
    counts = Counter((layer.filters - len(kept[layer.name]), layer.filters) for layer in plan)
    return ", ".join(
        f"{zero} of {filters} ({n} convolution{'s' if n > 1 else ''})" for (zero, filters), n in counts.items()
    )
