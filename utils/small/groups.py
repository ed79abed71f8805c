"""Grouped convolutions: their needed channels in fewer or narrower groups, which stay equally wide.

A group that needs fewer channels than another cannot be cut alone. So groups are put together in new ones, each as wide
as the widest of them; weights between channels of different old groups become zeros. The number of new groups is the
one that costs least, by the layer's own weights and those of its neighbours.
"""

from torch import Tensor

from utils.small.channels import Channels, Group, OrderError
from utils.small.rules import Reader


def regroup(channels: Channels, keep: Tensor) -> Tensor:
    """Plans the groups of every grouped convolution: `groups` and `orders` of `channels`, which `select` follows.

    Args:
        channels: of analyse(..., regroup=True).
        keep: of `channels.close`.

    Returns:
        `keep` with the removed channels that fill up the groups.

    Raises:
        OrderError: a layer is called twice.
    """
    filled, roots = keep.clone(), channels.roots()
    for reader in channels.readers:
        if getattr(reader.module, "groups", 1) > 1:
            if reader.module in channels.groups:
                raise OrderError
            groups = channels.groups[reader.module] = _plan(channels, reader, keep, roots)
            for side, ids in enumerate((reader.source.ids, reader.ids)):
                order = [p for group in groups for p in group[side]]
                channels.orders.append((ids, order))
                filled[roots[ids][order]] = True
    return channels.close(filled) if channels.groups else keep


def _plan(channels: Channels, reader: Reader, keep: Tensor, roots: Tensor) -> list[Group]:
    """The new groups of a layer, filled up."""
    read, made, weight = roots[reader.source.ids], roots[reader.ids], reader.module.weight
    needed = (keep[read].tolist(), keep[made].tolist())
    ranges = [range(begin, begin + weight.shape[1]) for begin in range(0, len(made), weight.shape[1])]
    old = [tuple([p for p in positions if side[p]] for side in needed) for positions in ranges]
    makers = [r.module.weight[0] for r in channels.readers if roots[r.ids[0]] == read[0]]
    users = [r.module.weight[:, 0] for r in channels.readers if roots[r.source.ids[0]] == made[0]]
    beside, kernel = sum(w.numel() for w in makers + users), weight[0, 0].numel()
    # Far fewer groups cost more in this layer than they save beside it.
    plans = [_pack(old, number) for number in range(max(1, len(old) // 4), len(old) + 1)]
    possible = [groups for groups in plans if len(groups) * _width(groups) <= len(made)]
    groups = min(possible, key=lambda g: len(g) * _width(g) * (beside + _width(g) * kernel))
    # Removed channels that read nothing come first: they need no others.
    read_nothing, width = (~reader.source.constant.isnan(), ~reader.nonzero.any(dim=1)), _width(groups)
    for side in (0, 1):
        spare = [p for p, is_needed in enumerate(needed[side]) if not is_needed]
        spare.sort(key=read_nothing[side].__getitem__, reverse=True)
        for group in groups:
            missing = width - len(group[side])
            group[side].extend(spare[:missing])
            del spare[:missing]
    return groups


def _width(groups: list[Group]) -> int:
    return max(len(side) for group in groups for side in group)


def _pack(old: list[Group], number: int) -> list[Group]:
    """Puts the old groups into at most `number` new ones: the largest first, each where it makes the narrowest."""
    groups: list[Group] = [([], []) for _ in range(number)]
    for read, made in sorted(old, key=lambda group: max(map(len, group)), reverse=True):
        best = min(groups, key=lambda group: max(len(group[0]) + len(read), len(group[1]) + len(made)))
        best[0].extend(read)
        best[1].extend(made)
    return [group for group in groups if any(group)]
