"""Grouped convolutions: their needed channels in fewer or narrower groups, which stay equally wide.

A group that needs fewer channels than another cannot be cut alone. So groups are put together in new ones, each as wide
as the widest of them; weights between channels of different old groups become zeros. The number of new groups is the
one that costs least, by the layer's own weights and those of its neighbours.
"""

from __future__ import annotations

from torch import Tensor

from utils.small.channels import Channels, Group, OrderError
from utils.small.rules import Reader


def regroup(channels: Channels, keep: Tensor) -> Tensor:
    """Plans the groups of every grouped convolution, `channels.groups`, which `Channels.select` follows.

    Args:
        channels: of analyse(..., regroup=True).
        keep: of `channels.close`.

    Returns:
        `keep` with the removed channels that fill up the groups.

    Raises:
        OrderError: a layer is called twice.
    """
    full, roots = keep.clone(), channels.roots()
    for reader in channels.readers:
        if getattr(reader.module, "groups", 1) > 1:
            if reader.module in channels.groups:
                raise OrderError
            groups = channels.groups[reader.module] = _plan(channels, reader, keep, full, roots)
            for side, ids in enumerate((reader.source.ids, reader.ids)):
                channels.orders.append((ids, [p for group in groups for p in group[side]]))
    return channels.close(full) if channels.groups else keep


def _plan(channels: Channels, reader: Reader, keep: Tensor, full: Tensor, roots: Tensor) -> list[Group]:
    """The new groups; the channels that fill them up are set in `full`."""
    sides, wide = (reader.source.ids, reader.ids), reader.module.weight.shape[1]
    needed = [keep[roots[ids]].tolist() for ids in sides]
    old = [
        tuple([p for p in range(begin, begin + wide) if side[p]] for side in needed)
        for begin in range(0, len(reader.ids), wide)
    ]
    kernel = reader.module.weight[0, 0].numel()
    makers = [r.module.weight[0] for r in channels.readers if roots[r.ids[0]] == roots[sides[0][0]]]
    users = [r.module.weight[:, 0] for r in channels.readers if roots[r.source.ids[0]] == roots[sides[1][0]]]
    beside = sum(weight.numel() for weight in makers + users)

    def cost(groups: list[Group]) -> int:
        width = _width(groups)
        return len(groups) * width * (beside + width * kernel)

    # Far fewer groups cost more in this layer than narrower ones save beside it.
    tried = [_pack(old, number) for number in range(max(1, len(old) // 4), len(old) + 1)]
    groups = min((g for g in tried if len(g) * _width(g) <= len(reader.ids)), key=cost)
    # Channels that read nothing come first: they need no others.
    free = [[p for p, is_needed in enumerate(side) if not is_needed] for side in needed]
    free[0].sort(key=lambda p: bool(reader.source.constant[p].isnan()))
    free[1].sort(key=lambda p: bool(reader.nonzero[p].any()))
    for group in groups:
        for side, ids, spare in zip(group, sides, free, strict=True):
            while len(side) < _width(groups):
                side.append(spare.pop(0))
                full[roots[ids[side[-1]]]] = True
    return groups


def _width(groups: list[Group]) -> int:
    return max(len(side) for group in groups for side in group)


def _pack(old: list[Group], number: int) -> list[Group]:
    """Puts the old groups into at most `number` new ones: the largest first, each where it makes the narrowest."""
    groups: list[Group] = [([], []) for _ in range(number)]
    for ins, outs in sorted(old, key=lambda g: max(map(len, g)), reverse=True):
        best = min(groups, key=lambda g: max(len(g[0]) + len(ins), len(g[1]) + len(outs)))
        best[0].extend(ins)
        best[1].extend(outs)
    return [group for group in groups if any(group)] or [groups[0]]
