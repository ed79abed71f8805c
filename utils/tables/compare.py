"""Own runs beside published rows and beside each other: differences, and which of them say something."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from utils.tables.published import Published, read_published
from utils.tables.runs import Group, Run
from utils.tables.statistics import half_width_of_difference

# Largest distance, in points of multiply-adds cut, of rows that stand next to each other without a common rate.
NEAR = 8.0


def published_beside(run: Run, rows: list[Published]) -> list[Published]:
    """Published rows of the same network that began as the run did, from random weights or trained, and removed as much.

    As much is an equal share of the filters where both have one share for all layers, otherwise multiply-adds cut within NEAR points, as
    they are counted: by the papers' formula for the papers' recipes, in the real network for others. Unpruned runs without a teacher
    stand beside unpruned rows without one.
    """
    costs = run.costs
    share = costs.cut if run.is_gradual or costs.formula_cut is None else costs.formula_cut

    def as_much(row: Published) -> bool:
        if run.pruned == 0:
            return row.pruned == 0 and (bool(run.teacher) or row.method == "baseline")
        if None not in (run.pruned, row.pruned):
            return abs(row.pruned - run.pruned) < 1e-6
        return None not in (share, row.macs_cut) and row.macs_cut > 0 and abs(row.macs_cut - 100 * share) <= NEAR

    like = run.results["dataset"], run.results["arch"], run.init
    return [row for row in rows if not run.is_small and (row.dataset, row.arch, row.init) == like and as_much(row)]


def own_baseline(group: Group, groups: list[Group]) -> Group | None:
    """Own unpruned network of as many epochs on the same images; of several that of the same number format, then of like options."""
    kind = {**group.kind, "init": "scratch"}
    found = [other for other in groups if other.first.method == "baseline" and other.kind == kind]

    def unlike(other: Group) -> tuple:
        a, b = other.first, group.first
        return a.arithmetic != b.arithmetic, sum(a.settings.get(name) != value for name, value in b.settings.items())

    return min(found, key=unlike, default=None)


def order(groups: list[Group]) -> list[str]:
    """Lines on which groups of equal length are ahead of which: differences of last-epoch accuracies with their 95 % intervals.

    Groups of one seed have no place in it. Intervals are of single pairs, not widened for the number of pairs.
    """
    lines = []
    for kind in [group.kind for i, group in enumerate(groups) if group.kind not in [g.kind for g in groups[:i]]]:
        members = [group for group in groups if group.kind == kind]
        several = sorted((group for group in members if len(group) > 1), key=lambda group: -group.mean)
        title = "{arch} on {dataset}, {epochs} epochs, {init}".format(**kind)
        if len(members) > 1 and len(several) < len(members):
            lines.append(
                f"{title}: {len(members) - len(several)} of {len(members)} rows have one seed: no order follows"
            )
        for a, b in combinations(several, 2):
            half, difference = half_width_of_difference(a.last, b.last, a.test_images), a.mean - b.mean
            verdict = "is ahead of" if difference > half else "cannot be told from"
            lines.append(f"{title}: {a.first.name} {verdict} {b.first.name}: {difference:+.2f} ± {half:.2f} (95 %)")
    return lines


def comparison_line(results: dict) -> str:
    """One line: a run's last-epoch accuracy beside the published figures, or why there is nothing to compare with.

    Args:
        results: the content of a run's results.json.
    """
    run = Run(Path("no folder"), results)
    if run.data_remark == "SYNTHETIC DATA":
        return "comparison with the papers: none, the data is SYNTHETIC"
    if run.is_small:
        return "comparison with the papers: none, they have no small network trained from scratch"
    cut = f", {100 * run.costs.cut:.1f} % fewer multiply-adds" if run.costs.cut else ""
    what = f"{run.name}{cut}, {run.epochs} epochs from {run.started_from}"
    rows = published_beside(run, read_published())
    if not rows:
        return f"comparison with the papers: none, no published row like {what}"
    published = "; ".join(f"{row}{f' ({row.doubt})' if row.doubt else ''}" for row in rows)
    own = f"this run {results['last_epoch_accuracy']:.2f} (last epoch)"
    own += f", NOT COMPARABLE: {run.remark}" if run.remark else ""
    return f"comparison with the papers, {what}: {own}; published, top-1 %: {published}"
