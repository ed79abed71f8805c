"""Which own method is ahead of which, and how sure that is."""

from __future__ import annotations

import statistics
from itertools import combinations

from utils.compare.own_runs import Group, odd_data
from utils.compare.published import Published
from utils.compare.statistics import half_width_from_test_images, half_width_of_difference

# Relative difference of training multiply-adds that still counts as equal: epochs are whole.
EQUAL_COST = 0.06


def order(groups: list[Group], published: list[Published]) -> list[str]:
    """The order of own methods by last-epoch accuracy where they may be compared with each other, and what is uncertain about it.

    Compared are runs of one network on the same images with equal epochs and learning rates; a small network trained from scratch also
    where its training costs as many multiply-adds. Full recipes are compared with full recipes. Epochs that differ from most are named. The
    intervals are of single pairs, not widened for the number of pairs.
    """
    lines = []
    for members, title in _comparable(groups):
        ranked = sorted(members, key=lambda group: -group.summary.mean)
        usual = statistics.mode(group.epochs for group in members)
        names = {id(group): _label(group, with_epochs=group.epochs != usual) for group in ranked}
        lines.append(f"{title}: " + " > ".join(f"{names[id(group)]} {with_spread(group)}" for group in ranked))
        open_pairs, settled = [], 0
        for a, b in combinations(ranked, 2):
            half, of = half_width_of_difference(a.last(), b.last()), "seeds"
            if min(a.summary.n, b.summary.n) == 1:
                images = a.first.get("test_images") or 10_000
                from_images = half_width_from_test_images(a.summary.mean, b.summary.mean, images)
                half, of = max((half or 0.0, "seeds of one of them"), (from_images, "test images"))
            difference = a.summary.mean - b.summary.mean
            if difference > half:
                settled += 1
            else:
                open_pairs.append(
                    f"{names[id(a)]} and {names[id(b)]} ({difference:.2f}, 95 % of the {of} +- {half:.2f})"
                )
        lines.append(
            f"{settled} of {settled + len(open_pairs)} differences exceed their 95 % interval"
            + (f"; the order is open between {'; '.join(open_pairs)}" if open_pairs else "")
        )
        single = [group for group in ranked if group.summary.n == 1]
        if single:
            stds = [row.acc_std for row in published if row.dataset == ranked[0].first["dataset"] and row.acc_std]
            known = f"; published standard deviations are {min(stds):.2f} to {max(stds):.2f} points" if stds else ""
            lines.append(
                f"{len(single)} of {len(ranked)} methods ran with one seed: between two of them an interval tells what the finite test set "
                f"leaves open, not what another seed would change{known}"
            )
    return lines


def _label(group: Group, with_epochs: bool) -> str:
    """Method, rate and what is special about the recipe."""
    rate = group.first["prune_rate"]
    inside = group.recipe if with_epochs else ", ".join(group.recipe.split(", ", 1)[1:])
    return f"{group.method}{f' {100 * rate:g} %' if rate else ''}{f' ({inside})' if inside else ''}"


def _comparable(groups: list[Group]) -> list[tuple[list[Group], str]]:
    """(groups that may be ranked among themselves, what they share), at least two each."""
    sets: dict[tuple, list[Group]] = {}
    for group in groups:
        sets.setdefault((group.kind, group.length if group.marks else "full"), []).append(group)
    for (kind, _), members in sets.items():
        lengths = {member.epochs for member in members if not member.is_small}
        for group in groups:
            trained, full = group.costs.trained_multiply_adds, group.costs.full_multiply_adds
            if group in members or not group.is_small or group.kind != kind or not trained:
                continue
            if any(abs(group.epochs * trained / (epochs * full) - 1) < EQUAL_COST for epochs in lengths):
                members.append(group)
    found = []
    for (kind, length), members in sets.items():
        if len(members) > 1:
            recipe = "full recipes" if length == "full" else f"{length[0]} epochs"
            odd = odd_data(members[0].first)
            title = f"{kind[1]} on {kind[0]}, {recipe}{f', {odd}' if odd else ''}"
            found.append((members, title))
    return found


def with_spread(group: Group) -> str:
    summary = group.summary
    if summary.half_width is None:
        return f"{summary.mean:.2f} (one seed)"
    return f"{summary.mean:.2f} +- {summary.half_width:.2f} (95 %, {summary.n} seeds)"
