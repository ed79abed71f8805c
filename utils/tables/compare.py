"""Own runs beside published rows and beside each other: differences, and which of them say something."""

from itertools import combinations
from pathlib import Path

from utils.base.errors import UserError
from utils.tables.published import Published, read_published
from utils.tables.runs import Run, SeedGroup
from utils.tables.statistics import half_width_of_difference

# Largest distance, in points of multiply-adds cut, of rows that stand next to each other without a common rate.
NEAR = 8.0


def published_beside(run: Run, rows: list[Published]) -> dict[Published, str]:
    """Published rows of the same network that began as the run did, at random or trained, and removed as much.

    As much is an equal share of the filters where both have one share for all layers, otherwise multiply-adds cut
    within NEAR points. What a tied network saves by count is more than the papers' formula, which leaves streams whole,
    says of the same filters; so runs whose layers differ stand beside rows that are near by either. Unpruned runs
    without a teacher stand beside unpruned rows without one.

    Returns:
        {row: "as many filters" (by the formula) or "as many multiply-adds" (by count); "" where it is near by both or
        the run has but one figure}.
    """
    formula, counted = (None if cut is None else 100 * cut for cut in (run.costs.formula_cut, run.costs.cut))
    if run.pruned is not None or formula is None:
        formula = counted = formula if formula is not None else counted

    def as_much(row: Published) -> str | None:
        if run.pruned == 0:
            return "" if row.pruned == 0 and (run.teacher or row.method == "baseline") else None
        if None not in (run.pruned, row.pruned):
            return "" if abs(row.pruned - run.pruned) < 1e-6 else None
        by_formula, by_count = (
            bool(row.macs_cut) and cut is not None and abs(row.macs_cut - cut) <= NEAR for cut in (formula, counted)
        )
        if by_formula and by_count:
            return ""
        return "as many filters" if by_formula else "as many multiply-adds" if by_count else None

    like = run.dataset, run.arch, run.init
    rows = [row for row in rows if (row.dataset, row.arch, row.init) == like and not run.is_small]
    return {row: how for row in rows if (how := as_much(row)) is not None}


def order(groups: list[SeedGroup]) -> list[str]:
    """Lines on which groups of equal length are ahead of which: differences with their 95 % intervals.

    Groups of one seed have no place in it. Seeds are paired, and answers by test image where both groups know them.
    Intervals are of single pairs, not widened for the number of pairs.
    """
    lines = []
    for title in dict.fromkeys(group.title for group in groups):
        members = [group for group in groups if group.title == title]
        several = sorted((group for group in members if len(group.runs) > 1), key=lambda group: -group.mean)
        if len(members) > 1 and len(several) < len(members):
            lines.append(f"{title}: {len(members) - len(several)} of {len(members)} rows have one seed, so no order")
        for a, b in combinations(several, 2):
            by_image = a.hits - b.hits if a.test_set and a.test_set == b.test_set else None
            half, difference = half_width_of_difference(a.last, b.last, a.first.images[1], by_image), a.mean - b.mean
            how = "95 %" if by_image is None else "95 %, paired by image"
            verdict = "is ahead of" if difference > half else "cannot be distinguished from"
            lines.append(f"{title}: {a.first.name} {verdict} {b.first.name}: {difference:+.2f} ± {half:.2f} ({how})")
    return lines


def comparison_line(results: dict) -> str:
    """A run's last-epoch accuracy beside the published figures, or why there is nothing to compare with.

    Args:
        results: the content of a run's results.json.
    """
    run = Run(Path("no folder"), results)
    if run.data_remark == "SYNTHETIC DATA":
        return "comparison with the papers: none, the data is SYNTHETIC"
    if run.is_small:
        return "comparison with the papers: none, they have no small network trained from scratch"
    cut = f", {100 * run.costs.cut:.1f} % fewer multiply-adds" if run.costs.cut else ""
    what = f"{run.arch} {run.name}{cut}, {run.epochs} epochs from {run.started_from}"
    try:
        rows = published_beside(run, read_published())
    except UserError as error:
        return f"comparison with the papers: none, {error}"
    if not rows:
        return f"comparison with the papers: none, no published row like {what}"
    published = "; ".join(
        f"{row}{f' ({row.doubt})' if row.doubt else ''}{how and f' at {how}'}" for row, how in rows.items()
    )
    remark = f", NOT COMPARABLE: {run.remark}" if run.remark else ""
    own = f"this run {run.accuracy:.2f} (last epoch){remark}"
    return f"comparison with the papers, {what}: {own}; published, top-1 %: {published}"
