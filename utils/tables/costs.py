"""Multiply-adds of a run's network from its results.json: by count, and by the papers' formula."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of one image, None where a run has not recorded them."""

    full: int | None  # of the unpruned network
    left: int | None  # of the network that is left
    formula_cut: float | None  # share saved by soft filter pruning's formula; CIFAR ResNets only

    @property
    def cut(self) -> float | None:
        """Share saved, by count."""
        return None if None in (self.full, self.left) else 1 - self.left / self.full


def run_costs(results: dict, *, pruned: float | None, small: bool) -> Costs:
    """Costs of a run.

    Args:
        results: content of its results.json; `network` is what was trained, `small` what is left of a pruned one.
        pruned: % of the filters that every layer lost, 0 for none; None where layers differ.
        small: the run trained a small network from scratch.
    """
    network, written = results.get("network"), results.get("small", {})
    before = None if small else written.get("before", network)
    after = written.get("after", network if small or pruned == 0 else None)
    full, left = (int(counts["multiply_adds"]) if counts else None for counts in (before, after))
    is_resnet = results["arch"].startswith("resnet") and not small
    kept = None if pruned is None else 1 - pruned / 100
    return Costs(full, left, papers_cut(results.get("filters", []), kept) if is_resnet else None)


def papers_cut(filters: list[dict], kept: float | None = None) -> float | None:
    """Share of a CIFAR ResNet's multiply-adds saved, by Soft Filter Pruning's formula (He et al., IJCAI 2018).

    Every layer keeps a share of its filters, as a real number. A block's second convolution reads the kept filters of
    its first, the very first block those of the stem; all others read the full residual stream. 42.2, 41.5, 41.1 and
    40.8 % for ResNet-20, 32, 56 and 110 at 0.7. None for other networks.

    Args:
        filters: of results.json, in order: name, shape (out, in, height, width) of the unpruned weight, number kept.
        kept: the share that all layers keep; None: each its own.
    """
    if not filters or filters[0]["shape"][:2] != [16, 3]:
        return None
    full = left = 64 * 10  # the linear layer
    previous = 1.0
    for layer in filters:
        (out, read, height, width), name = layer["shape"], layer["name"]
        # Layers of 16, 32, 64 filters have maps of 32, 16, 8 pixels a side.
        cost, share = out * read * height * width * (512 // out) ** 2, layer["kept"] / out if kept is None else kept
        full += cost
        left += cost * share * (previous if ".conv_b." in name or name.startswith("stage_1.0.") else 1.0)
        previous = share
    return 1 - left / full
