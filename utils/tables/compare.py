"""Own runs beside published rows and beside each other: differences, and which of them say something."""

from itertools import combinations

from utils.tables.published import Published
from utils.tables.runs import Group, Run
from utils.tables.statistics import half_width_of_difference

# Largest distance, in points of multiply-adds cut, of rows that stand next to each other without a common rate.
NEAR = 8.0


def published_beside(run: Run, rows: list[Published]) -> list[Published]:
    """Published rows of the same network that began as the run did, at random or trained, and removed as much.

    As much is an equal share of the filters where both have one share for all layers, otherwise multiply-adds cut
    within NEAR points, by the papers' formula for the papers' recipes, by count for others. Unpruned runs without a
    teacher stand beside unpruned rows without one.
    """
    costs = run.costs
    share = costs.cut if run.is_gradual or costs.formula_cut is None else costs.formula_cut

    def as_much(row: Published) -> bool:
        if run.pruned == 0:
            return row.pruned == 0 and (bool(run.teacher) or row.method == "baseline")
        if None not in (run.pruned, row.pruned):
            return abs(row.pruned - run.pruned) < 1e-6
        return None not in (share, row.macs_cut) and row.macs_cut > 0 and abs(row.macs_cut - 100 * share) <= NEAR

    like = run.dataset, run.arch, run.init
    return [row for row in rows if (row.dataset, row.arch, row.init) == like and as_much(row) and not run.is_small]


def order(groups: list[Group]) -> list[str]:
    """Lines on which groups of equal length are ahead of which: differences with their 95 % intervals.

    Groups of one seed have no place in it. Intervals are of single pairs, not widened for the number of pairs.
    """
    lines = []
    for title in dict.fromkeys(group.title for group in groups):
        members = [group for group in groups if group.title == title]
        several = sorted((group for group in members if len(group.runs) > 1), key=lambda group: -group.mean)
        if len(members) > 1 and len(several) < len(members):
            lines.append(f"{title}: {len(members) - len(several)} of {len(members)} rows have one seed, so no order")
        for a, b in combinations(several, 2):
            half, difference = half_width_of_difference(a.last, b.last, a.first.images[1]), a.mean - b.mean
            verdict = "is ahead of" if difference > half else "cannot be distinguished from"
            lines.append(f"{title}: {a.first.name} {verdict} {b.first.name}: {difference:+.2f} ± {half:.2f} (95 %)")
    return lines
