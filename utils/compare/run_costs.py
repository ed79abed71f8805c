"""What the network of a finished run costs, from its results.json: parameters and multiply-adds, by count and by the papers' formula."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
from torch import nn

import models
from AHSG_HT import following_additives
from utils.base.errors import UserError
from utils.small.counts import multiply_adds, papers_cut
from utils.small.cut import make_small


@dataclass(frozen=True)
class Costs:
    """Of one image; None where it cannot be known.

    Attributes:
        multiply_adds, parameters: of the network that is left, its removed filters and dead channels cut out.
        full_multiply_adds: of the registry's network of this name.
        trained_multiply_adds: of the network while it trains: the full one, except for a small network trained from scratch.
        formula_cut: share saved by soft filter pruning's formula; CIFAR ResNets only.
    """

    multiply_adds: int | None = None
    parameters: int | None = None
    full_multiply_adds: int | None = None
    trained_multiply_adds: int | None = None
    formula_cut: float | None = None

    @property
    def cut(self) -> float | None:
        """Share of multiply-adds saved, by count."""
        return 1 - self.multiply_adds / self.full_multiply_adds if self.multiply_adds else None


def mean_costs(costs: list[Costs]) -> Costs:
    """The mean of every entry that all have."""
    means = {}
    for entry in fields(Costs):
        values = [getattr(one, entry.name) for one in costs]
        if None not in values:
            mean = sum(values) / len(values)
            means[entry.name] = mean if entry.name == "formula_cut" else round(mean)
    return Costs(**means)


def run_costs(results: dict) -> Costs:
    """Costs of a run.

    Counts that the run wrote are taken; what an older results.json lacks is counted again, a pruned network from the indices of
    its kept filters.

    Args:
        results: a checked results.json, see utils.compare.own_runs.
    """
    settings, arch, rate = results["settings"], results["arch"], results["HTrate"]
    classes, head = results.get("num_classes", 10), settings.get("head_width")
    try:
        full = full_costs(arch, classes, head)
    except UserError:
        return Costs()
    if settings.get("widths_of"):
        trained = results.get("network") or _costs_of_file(settings["widths_of"])
        if not trained:
            return Costs(full_multiply_adds=full[0])
        macs, parameters = int(trained["multiply_adds"]), int(trained["parameters"])
        return Costs(macs, parameters, full[0], macs)
    if rate == 1:
        return Costs(full[0], full[1], full[0], full[0], 0.0)
    after = results.get("small", {}).get("after")
    if after:
        counts = int(after["multiply_adds"]), int(after["parameters"])
    else:
        kept = tuple((layer["name"], tuple(layer["kept_indices"])) for layer in results.get("filters", []))
        counts = narrowed_costs(arch, classes, head, kept) if kept else (None, None)
    cifar_resnet = re.fullmatch(r"resnet(\d+)", arch) if arch in models.REGISTRY else None
    return Costs(*counts, full[0], full[0], papers_cut(int(cifar_resnet[1]), rate) if cifar_resnet else None)


@cache
def full_costs(arch: str, classes: int, head_width: int | None) -> tuple[int, int]:
    """(multiply-adds, parameters) of the network of this name."""
    return _count(_build(arch, classes, head_width), arch)


@cache
@torch.no_grad()
def narrowed_costs(
    arch: str, classes: int, head_width: int | None, kept: tuple[tuple[str, tuple[int, ...]], ...]
) -> tuple[int, int]:
    """(multiply-adds, parameters) of the small network when only these filters of each convolution are kept.

    Args:
        kept: (name of a convolution's weight, indices of its filters), for every convolution.
    """
    net = _build(arch, classes, head_width).eval()
    names, params = zip(*net.named_parameters(), strict=True)
    for name, indices in kept:
        index = names.index(name)
        removed = torch.ones(len(params[index]), dtype=torch.bool)
        removed[list(indices)] = False
        for tensor in (params[index], *following_additives(list(params), index)):
            tensor[removed] = 0
    small, _ = make_small(net, torch.zeros(1, *models.input_shape(arch)))
    return _count(small, arch)


def _build(arch: str, classes: int, head_width: int | None) -> nn.Module:
    if arch not in models.REGISTRY:
        return models.build_torchvision(arch, classes)
    return models.build(arch, classes, **({"head_width": head_width} if head_width else {}))


def _count(net: nn.Module, arch: str) -> tuple[int, int]:
    macs = sum(multiply_adds(net, torch.zeros(1, *models.input_shape(arch))).values())
    return macs, sum(p.numel() for p in net.parameters())


def _costs_of_file(file: str) -> dict[str, int] | None:
    """Costs of the network in a small network's file, None where it is no longer there."""
    root = Path(__file__).resolve().parents[2]
    for path in (Path(file), root / file):
        if path.is_file():
            arch, net = models.load_with_name(path)
            macs, parameters = _count(net, arch)
            return {"multiply_adds": macs, "parameters": parameters}
    return None
