"""How many units every group keeps: the same rate in every convolution, or removed wherever they cost least.

Counts are float64 (groups,), see utils.prune.plan. Scores are one number per unit; the larger, the more it is needed.
"""

import math
from itertools import accumulate

import torch
from torch import Tensor

from utils.base.errors import UserError
from utils.prune.plan import Plan

# Where a share of the multiply-adds is given, the smallest rate (uniform), and what no layer falls below (global).
FLOOR = 0.1
LARGEST = torch.finfo(torch.float64).max


def _rounded(count: float, multiple: int, most: int) -> int:
    """The nearest multiple, at least one of it, or `most`. The product with a decimal rate is lifted as in
    AHSG_HT.kept_count.
    """
    return min(most, max(1, math.floor(math.floor(count * (1 + 1e-12)) / multiple + 0.5)) * multiple)


def uniform(plan: Plan, rate: float, round_to: int = 1) -> Tensor:
    """Counts where every convolution keeps floor(filters * rate), at least 1, rounded to a multiple of `round_to`.

    To the nearest: rounded up, all widths would jump at the same rates, and a cut be overshot by far.

    A convolution whose filters are in several groups (stages of a CIFAR ResNet, which begin with the channels of the
    stage before) takes from the last of them what the narrower layers have left open.
    """
    kept, fixed = plan.full.clone(), {g for g, units in enumerate(plan.groups) if not plan.removable[units[0]]}
    members = [(layer.unit.unique(), layer) for layer in plan.convolutions]
    for units, _ in sorted(members, key=lambda member: len(member[0])):
        groups = plan.group_of[units].unique().tolist()
        room = _rounded(len(units) * rate, round_to, len(units)) - sum(int(kept[g]) for g in groups if g in fixed)
        left = sum(int(plan.full[g]) for g in groups if g not in fixed)
        for g in groups:
            if g not in fixed:
                # In proportion to their sizes, so that the whole is met.
                size = int(plan.full[g])
                kept[g] = min(size, max(0, round(room * size / left)))
                room, left = room - int(kept[g]), left - size
                fixed.add(g)
    return kept


def floors(plan: Plan, round_to: int = 1) -> Tensor:
    """Counts below which no group falls where multiply-adds decide: FLOOR of it, so that no layer has less."""
    least = [math.ceil(math.ceil(len(units) * FLOOR * (1 - 1e-12)) / round_to) * round_to for units in plan.groups]
    removable = torch.tensor([bool(plan.removable[units[0]]) for units in plan.groups])
    return torch.tensor(least, dtype=torch.float64).minimum(plan.full).where(removable, plan.full)


def rate_for(plan: Plan, cut: float, round_to: int = 1) -> float:
    """The largest rate of `uniform` that removes at least this share of the multiply-adds.

    Raises:
        UserError: none from FLOOR on does.
    """
    goal = (1 - cut) * plan.multiply_adds(plan.full)
    widths = {len(layer.unit.unique()) for layer in plan.convolutions}
    rates = sorted({kept / width for width in widths for kept in range(1, width) if kept / width > FLOOR} | {FLOOR})
    low, high = 0, len(rates)
    while low < high:
        middle = (low + high) // 2
        if plan.multiply_adds(uniform(plan, rates[middle], round_to)) <= goal:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        raise out_of_reach(plan, cut, uniform(plan, FLOOR, round_to))
    return rates[low - 1]


def out_of_reach(plan: Plan, cut: float, least: Tensor, remedy: str = "use a smaller --macs_cut") -> UserError:
    reachable = math.floor(1000 * (1 - plan.multiply_adds(least) / plan.multiply_adds(plan.full))) / 1000
    return UserError(
        f"{100 * cut:.1f} % fewer multiply-adds are out of reach: with {100 * FLOOR:.0f} % of the filters left in "
        f"every layer, the fewest, this network has {100 * reachable:.1f} % fewer; {remedy}"
    )


def weakest_first(plan: Plan, alive: Tensor, scores: Tensor) -> list[list[int]]:
    """The living units of every group in the order of their removal; of equal scores the lower index stays longer."""
    ordered = []
    for units in plan.groups:
        units = units[alive[units]].flip(0)
        ordered.append(units[torch.sort(scores[units], stable=True).indices].tolist())
    return ordered


def remove_to(plan: Plan, alive: Tensor, scores: Tensor, kept: Tensor) -> Tensor:
    """`alive` less the weakest units of every group that has more than `kept`."""
    alive = alive.clone()
    for units, count in zip(weakest_first(plan, alive, scores), kept.tolist(), strict=True):
        alive[units[: max(0, len(units) - int(count))]] = False
    return alive


def remove_where_cheap(plan: Plan, alive: Tensor, scores: Tensor, goal: float, round_to: int = 1) -> Tensor:
    """`alive` less, one after another, the unit with the lowest score per multiply-add that it saves at that moment.

    It ends with at most `goal` multiply-adds, or with every group at its floor. With `round_to` a group loses as many
    units at once as lead to the next multiple.
    """
    alive, kept, least = alive.clone(), plan.count(alive), floors(plan, round_to)
    ordered = weakest_first(plan, alive, scores)
    sums = [[0.0, *accumulate(scores[units].tolist())] for units in ordered]
    gone = [0] * len(ordered)
    per_out, per_in, cost = plan.incidence
    both = cost @ (per_out * per_in)
    while plan.multiply_adds(kept) > goal:
        steps = torch.where(kept % round_to > 0, kept % round_to, float(round_to))
        outs, ins = plan.widths(kept)
        saved = steps * ((cost * ins) @ per_out + (cost * outs) @ per_in) - steps**2 * both
        allowed = (kept - steps >= least) & (saved > 0)
        if not allowed.any():
            break
        ends = [n + int(step) for n, step in zip(gone, steps.tolist(), strict=True)]
        price = [s[end] - s[n] if ok else 0.0 for s, n, end, ok in zip(sums, gone, ends, allowed.tolist(), strict=True)]
        price = torch.tensor(price, dtype=torch.float64) / saved
        # Scores of a diverged run are nan: they go last, but what may not go stays.
        chosen = int(price.nan_to_num(nan=LARGEST, posinf=LARGEST).where(allowed, math.inf).argmin())
        alive[ordered[chosen][gone[chosen] : ends[chosen]]] = False
        kept[chosen] -= steps[chosen]
        gone[chosen] = ends[chosen]
    return alive
