"""The picture of a comparison: accuracy against multiply-adds, published and own."""

import io
import textwrap
from pathlib import Path
from typing import NamedTuple

from utils.base.files import replace_file
from utils.tables.published import Published
from utils.tables.runs import SeedGroup

# Points of accuracy below the best that a panel shows.
SHOWN = 25
XLABEL = "multiply-adds (millions)\npublished by their cut; own counted, hollow by the papers' formula"
LABEL_WIDTH = 80  # characters in a line of the legend


class Point(NamedTuple):
    """Millions of multiply-adds, as counted or published and, of own networks, by the papers' formula; top-1 in %."""

    macs: float
    formula: float | None
    accuracy: float
    bar: float | None
    label: str
    is_own: bool


def panels_of(groups: list[SeedGroup], published: list[Published]) -> dict[str, list[Point]]:
    """{title: points}, a panel per network: full-length runs beside published rows or, where there is none, shorter
    ones. Published rows stand at the multiply-adds that their cut leaves of the network here.
    """
    panels: dict[str, list[Point]] = {}
    with_full = {(group.first.dataset, group.first.arch) for group in groups if group.is_comparable}
    for group in sorted(groups, key=lambda group: -group.mean):
        run, costs = group.first, group.first.costs
        if costs.left is None or (run.remark and (run.dataset, run.arch) in with_full):
            continue
        title = f"{run.arch} on {run.dataset}" + (f", {run.data_remark}" if run.data_remark else "")
        if not group.is_comparable:
            title += ": shorter runs and controls, not comparable with published figures"
        elif title not in panels:
            like = run.dataset, run.arch
            rows = [row for row in published if (row.dataset, row.arch) == like and row.macs_cut is not None]
            at = [costs.full * (1 - row.macs_cut / 100) / 1e6 for row in rows]
            labels = [f"{row}{', pretrained' if row.init == 'pretrained' else ''}" for row in rows]
            points = zip(at, rows, labels, strict=True)
            panels[title] = [Point(x, None, row.acc, row.acc_std, label, False) for x, row, label in points]
        label = textwrap.fill(
            f"OWN {group.mean:.2f} {run.name}, {run.epochs} epochs", LABEL_WIDTH, break_on_hyphens=False
        )
        formula = costs.full * (1 - costs.formula_cut) / 1e6 if costs.formula_cut else None
        panels.setdefault(title, []).append(Point(costs.left / 1e6, formula, group.mean, group.half_width, label, True))
    return panels


def draw_accuracy(groups: list[SeedGroup], published: list[Published], path: Path) -> bool:
    """Writes a PNG of `panels_of`; own points by the papers' formula are hollow. Bars: published, standard deviation;
    own, 95 % interval. Returns whether there was anything to draw.
    """
    panels = panels_of(groups, published)
    if not panels:
        return False
    from matplotlib.figure import Figure

    lines = [sum(1 + point.label.count("\n") for point in points) for points in panels.values()]
    heights = [max(3.0, 1.0 + 0.24 * count) for count in lines]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, (title, points) in zip(axes, panels.items(), strict=True):
        for i, point in enumerate(sorted(points, key=lambda point: -point.accuracy)):
            color, marker = f"C{i % 10}", ("oDv^" if point.is_own else "sPX*")[i // 10 % 4]
            style = dict(fmt=marker, markersize=8) if point.is_own else dict(fmt=marker, markersize=5, alpha=0.7)
            # A $ would begin a formula.
            style |= dict(yerr=point.bar, color=color, capsize=3, label=point.label.replace("$", r"\$"))
            panel.errorbar(point.macs, point.accuracy, **style)
            if point.formula:
                panel.plot([point.macs, point.formula], [point.accuracy] * 2, color, linewidth=1)
                panel.plot(point.formula, point.accuracy, color + marker, markersize=8, markerfacecolor="white")
        panel.set_title(title.replace("$", r"\$"), loc="left", fontsize=9)
        explained = any(point.formula or not point.is_own for point in points)
        panel.set(xlabel=XLABEL if explained else XLABEL.partition("\n")[0], ylabel="top-1 accuracy (%)")
        # A run that failed would squeeze all others; it is named in the legend.
        panel.set_ylim(bottom=max(panel.get_ylim()[0], max(point.accuracy for point in points) - SHOWN))
        panel.grid(alpha=0.25)
        panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getvalue())
    return True
