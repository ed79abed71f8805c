"""The line that ends a run: its accuracy beside the published figures."""

from pathlib import Path

from utils.tables.compare import published_beside
from utils.tables.published import read_published
from utils.tables.runs import Run


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
    rows = published_beside(run, read_published())
    if not rows:
        return f"comparison with the papers: none, no published row like {what}"
    published = "; ".join(f"{row}{f' ({row.doubt})' if row.doubt else ''}" for row in rows)
    remark = f", NOT COMPARABLE: {run.remark}" if run.remark else ""
    own = f"this run {run.accuracy:.2f} (last epoch){remark}"
    return f"comparison with the papers, {what}: {own}; published, top-1 %: {published}"
