"""The plan: which convolution keeps how many filters, and whether a network keeps to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from AHSG_HT import following_additives, kept_count
from utils.base.errors import UserError


@dataclass(frozen=True)
class Layer:
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


def make_plan(net: nn.Module, HTrate: float) -> list[Layer]:
    """Every convolution of a network, in the order of its parameters.

    Raises:
        UserError: HTrate keeps no filter of some convolution.
    """
    layers = []
    for name, p in net.named_parameters():
        if p.dim() == 4:
            try:
                layers.append(Layer(name, tuple(p.shape), kept_count(p.shape[0], HTrate)))
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
    return layers


def format_plan(plan: list[Layer]) -> str:
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
def kept_filters(net: nn.Module) -> dict[str, list[int]]:
    """{name of a convolution's weight: indices of its filters that are not zero}.

    A filter counts as zero when its weights and the additive parameters that belong to it (convolution bias, BatchNorm bias) are.
    """
    names = [name for name, _ in net.named_parameters()]
    params = [p for _, p in net.named_parameters()]
    kept = {}
    for index, (name, p) in enumerate(zip(names, params, strict=True)):
        if p.dim() == 4:
            alive = p.flatten(1).ne(0).any(dim=1)
            for additive in following_additives(params, index):
                alive |= additive.ne(0)
            kept[name] = alive.nonzero().flatten().tolist()
    return kept


def check_plan(plan: list[Layer], kept: dict[str, list[int]], start: dict[str, list[int]] | None = None) -> None:
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
                f"{layer.name} has {len(kept[layer.name])} filters that are not zero, the plan keeps {layer.kept}; the weights have collapsed or "
                "thresholding did not reach this layer: lower the learning rate, or report this network"
            )


def count_zero_filters(plan: list[Layer], kept: dict[str, list[int]]) -> str:
    """Zero filters in words, "5 of 16 (7 convolutions), 10 of 32 (6 convolutions)"."""
    counts = Counter((layer.filters - len(kept[layer.name]), layer.filters) for layer in plan)
    return ", ".join(
        f"{zero} of {filters} ({n} convolution{'s' if n > 1 else ''})" for (zero, filters), n in counts.items()
    )
