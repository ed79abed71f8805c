"""The picture of a comparison: accuracy against multiply-adds, published and own."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from utils.base.errors import UserError
from utils.base.files import replace_file
from utils.compare.own_runs import Group, odd_data
from utils.compare.published import Published

# Distance of two labels, as a share of the panel's height.
LABEL_GAP = 0.055


@dataclass(frozen=True)
class Point:
    """A mark with its label: millions of multiply-adds by formula (or count, where there is none) and by count, accuracy and its error in %."""

    macs: float
    counted: float | None
    accuracy: float
    error: float
    label: str
    own: bool


def draw_accuracy(groups: list[Group], published: list[Published], path: Path) -> None:
    """Writes a PNG with a panel per network of full recipes beside the published rows, and one per network of runs that must not be compared.

    Multiply-adds of pruned networks are those of the papers' formula where there is one, so that published and own stand on one scale;
    a small mark shows the count of the network that is really left.
    """
    panels: list[tuple[str, list[Point], bool]] = []
    for kind in sorted({(group.first["dataset"], group.first["arch"]) for group in groups}):
        own = [group for group in groups if (group.first["dataset"], group.first["arch"]) == kind]
        full = next((g.costs.full_multiply_adds for g in own if g.costs.full_multiply_adds), None)
        if not full:
            continue
        rows = [row for row in published if (row.dataset, row.arch) == kind and row.macs_cut is not None]
        points = [_published_point(row, full) for row in rows]
        points += [p for group in own if not group.marks and (p := _own_point(group))]
        if points:
            panels.append((f"{kind[1]} on {kind[0]}", points, False))
        for odd in sorted({odd_data(group.first) for group in own}):
            points = [p for g in own if g.marks and odd_data(g.first) == odd and (p := _own_point(g))]
            if points:
                title = f"{kind[1]} on {kind[0]}, {odd or 'other epochs than the recipes'}: not comparable with published figures"
                panels.append((title, points, True))
    if not panels:
        raise UserError("no run whose multiply-adds are known: nothing to draw")
    heights = [max(3.2, 0.8 + 0.27 * len(points)) for _, points, _ in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(13, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for panel, (title, points, short) in zip(axes[:, 0], panels, strict=True):
        _draw(panel, title, points, short)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100, metadata={"Software": None})
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, picture.getvalue())


def _published_point(row: Published, full: int) -> Point:
    rate = f" {row.pruned:g} %" if row.pruned else ""
    start = ", pretrained" if row.init == "pretrained" else ""
    label = f"{row.method}{rate}{start}, {row.acc:.2f} ({row.source}{', in doubt' if row.doubt else ''})"
    return Point(full * (1 - row.macs_cut / 100) / 1e6, None, row.acc, row.acc_std or 0, label, own=False)


def _own_point(group: Group) -> Point | None:
    costs, summary = group.costs, group.summary
    if costs.multiply_adds is None:
        return None
    counted = costs.multiply_adds / 1e6
    by_formula = None if costs.formula_cut is None else costs.full_multiply_adds * (1 - costs.formula_cut) / 1e6
    rate = f" {100 * group.first['prune_rate']:g} %" if group.first["prune_rate"] else ""
    label = (
        f"own {group.method}{rate}, {summary.mean:.2f} ({group.recipe}; {summary.n} seed{'s' if summary.n > 1 else ''})"
    )
    return Point(by_formula or counted, counted, summary.mean, summary.half_width or 0, label, own=True)


def _draw(panel, title: str, points: list[Point], short: bool) -> None:
    values = [p.accuracy + sign * p.error for p in points for sign in (-1, 1)]
    spread = max(max(values) - min(values), 1)
    low, high = min(values) - 0.12 * spread, max(values) + 0.12 * spread
    right = max(p.macs for p in points)
    left = min(min(p.macs, p.counted or p.macs) for p in points)
    width = max(right - left, 0.1 * right)
    # The right half of the panel is for the labels.
    panel.set(xlim=(left - 0.08 * width, right + 1.7 * width), ylim=(low, high), title=title)
    panel.set(
        xlabel="multiply-adds (millions): papers' formula (large mark), counted (small mark)",
        ylabel="top-1 accuracy (%)",
    )
    panel.grid(alpha=0.25)
    panel.set_xticks([tick for tick in panel.get_xticks() if left - 0.08 * width <= tick <= right + 0.06 * width])
    ordered = sorted(points, key=lambda p: p.accuracy)
    heights = spread_out(
        [(p.accuracy - low) / (high - low) for p in ordered], LABEL_GAP if len(points) <= 16 else 0.9 / len(points)
    )
    for p, height in zip(ordered, heights, strict=True):
        color = "tab:orange" if p.own and short else "tab:red" if p.own else "tab:blue"
        mark = dict(fmt="o", markersize=7) if p.own else dict(fmt="s", markersize=5)
        panel.errorbar(p.macs, p.accuracy, yerr=p.error or None, color=color, capsize=3, **mark)
        if p.counted is not None and p.counted != p.macs:
            panel.plot([p.counted, p.macs], [p.accuracy, p.accuracy], ":", color=color, linewidth=1)
            panel.plot(p.counted, p.accuracy, "o", color=color, markersize=4, markerfacecolor="white")
        panel.annotate(
            p.label,
            xy=(p.macs, p.accuracy),
            xytext=(right + 0.12 * width, low + height * (high - low)),
            fontsize=8,
            va="center",
            color=color,
            arrowprops=dict(arrowstyle="-", color=color, alpha=0.3, linewidth=0.7, shrinkB=4),
        )


def spread_out(heights: list[float], gap: float) -> list[float]:
    """Ascending heights in 0..1 moved apart until neighbours are at least `gap` apart, within 0..1 where they fit."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap if placed else 0.03))
    ceiling = 0.97
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed
