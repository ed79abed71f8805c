"""Multiply-adds of a run's network from its results.json: by count, and by the papers' formula."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

import models
from utils.small.counts import multiply_adds, papers_cut


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of one image, None where they are not known."""

    full: int | None  # of the unpruned network of this name
    left: int | None  # of the network that is left
    formula_cut: float | None  # share saved by soft filter pruning's formula; CIFAR ResNets only

    @property
    def cut(self) -> float | None:
        """Share saved, by count."""
        return None if None in (self.full, self.left) else 1 - self.left / self.full


def run_costs(folder: Path, results: dict, *, pruned: float | None, small: bool) -> Costs:
    """Costs of a run: counts that it wrote, otherwise those of the small network's file beside its results.json.

    Args:
        pruned: % of the filters that every layer lost, 0 for none; None where layers differ.
        small: the run trained a small network from scratch.
    """
    arch, written, network = results["arch"], results.get("small", {}), results.get("network")
    file, unpruned, cut = folder / f"small.{results['arch']}.pth.tar", pruned == 0 and not small, None
    before = written.get("before") or (network if unpruned else None)
    full = int(before["multiply_adds"]) if before else _count(arch, results.get("num_classes", 10))
    after = written.get("after") or (network if small else None)
    if after or unpruned:
        left = int(after["multiply_adds"]) if after else full
    else:
        left = _count(arch, file=file) if file.is_file() else None
    if not small and re.fullmatch(r"resnet(20|32|44|56|110)", arch):
        by_layer = pruned is None
        cut = papers_cut_by_layer(results.get("filters")) if by_layer else papers_cut(int(arch[6:]), 1 - pruned / 100)
    return Costs(full, left, cut)


def papers_cut_by_layer(filters: list[dict] | None) -> float | None:
    """The papers' way of counting (papers_cut) where layers keep different shares; None without unpruned shapes.

    A block's second convolution reads the kept filters of its first, the very first block those of the stem; all others
    read the full residual stream.

    Args:
        filters: of results.json, in order: name, shape (out, in, height, width) of the unpruned weight, number kept.
    """
    if not filters or filters[0]["shape"][:2] != [16, 3]:
        return None
    full = left = 64 * 10
    previous = 1.0
    for layer in filters:
        (out, read, height, width), name = layer["shape"], layer["name"]
        cost, kept = out * read * height * width * (512 // out) ** 2, layer["kept"] / out
        full += cost
        left += cost * kept * (previous if ".conv_b." in name or name.startswith("stage_1.0.") else 1.0)
        previous = kept
    return 1 - left / full


@cache
def _count(arch: str, classes: int = 10, file: Path | None = None) -> int:
    if file:
        net = models.load(file)
    else:
        net = models.build(arch, classes) if arch in models.REGISTRY else models.build_torchvision(arch, classes)
    return sum(multiply_adds(net, torch.zeros(1, *models.input_shape(arch))).values())
