"""The comparison as Markdown: results/README.md, the block in the project's README, and what is printed."""

import os
from itertools import groupby
from pathlib import Path

from utils.base.errors import UserError
from utils.base.files import replace_file
from utils.tables.compare import order, published_beside
from utils.tables.picture import draw_accuracy
from utils.tables.published import read_published
from utils.tables.runs import ROOT, SeedGroup, find_runs

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
README_ROWS, README_PUBLISHED = 6, 2
NONE_YET = "No run of full length yet, so nothing here may be set beside a published figure."
LEGEND = """\
Top-1 accuracy in % on the test images. Own figures: last epoch, mean over seeds ± half the 95 % interval (variance
over seeds plus that of the finite test set); without ± there is one seed and no interval. In brackets the best
epoch on the test set, which this line of papers prints. Published: rows of the same network that began as the run
did and removed the same share of filters or, where that differs from layer to layer, cut multiply-adds within 8
points, as the source counts; a tied network saves more by count ("as many multiply-adds") than by the formula that
most of these papers use, which leaves the residual stream whole ("as many filters"). Behind each stands own last epoch
less published, its ± is the source's standard deviation over runs, and † needs care; sources, and the accuracy that
they started from: `published.csv`. Full length is 200 epochs from random weights here, 40 from a trained network; the
epochs of published rows are not recorded. Multiply-adds of convolutions and linear layers for one image: counted in the
network that is left, and by soft filter pruning's formula. Minutes are the whole run's. Speed-ups were read on a
shared machine. The last line of a log is the comparison of its day; this table is today's.
"""
README_LEGEND = """
Without ±: one seed, up to ± 0.6 by the test images. Of similar rows the best is shown. Bold: less the highest
published figures at a near cut. One-shot: filters go before the first step; KD: with a teacher; †: needs care. All
rows, logs, commands, and what they do not show: [results/README.md](results/README.md).
"""
README = ("network", "method", "epochs", "started from", "top-1 %: last (best) epoch", "multiply-adds", "published")
SHORT = (
    *("method", "epochs", "started from", "teacher", "top-1 %: last (best) epoch", "multiply-adds"),
    *("minutes, machine", "small network's speed-up", "log"),
)
MAIN = (
    *("network", "method", "epochs", "started from", "teacher", "top-1 %: last (best) epoch", "multiply-adds"),
    *("papers' formula", "published", "minutes, machine", "small network's speed-up", "log"),
)


def row_cells(group: SeedGroup, base: Path) -> dict[str, str]:
    """{column: cell} of a group of runs, for the columns of every table; links are relative to the folder `base`."""
    run, costs = group.first, group.first.costs
    beside = {} if run.remark else published_beside(run, read_published())
    logs = {r.seed: r.folder / f"log_seed_{r.seed}.txt" for r in group.runs}
    links = {seed: Path(os.path.relpath(log, base)).as_posix() for seed, log in logs.items() if log.is_file()}
    times: dict[str, list[str]] = {}
    for r in group.runs:
        times.setdefault(r.machine, []).append(f"{r.results['seconds'] / 60:.0f}")
    counted = "" if costs.left is None else f"{costs.left / 1e6:.2f} M"
    return {
        "network": run.arch + ("" if run.dataset == "cifar10" else f" on {run.dataset}"),
        "method": run.name + (f" **{run.data_remark}**" if run.data_remark else ""),
        "epochs": str(run.epochs),
        "started from": run.started_from,
        "teacher": run.teacher,
        "top-1 %: last (best) epoch": group.accuracy(),
        "multiply-adds": counted + (f" (-{100 * costs.cut:.1f} %)" if costs.cut else ""),
        "papers' formula": f"-{100 * costs.formula_cut:.1f} %" if costs.formula_cut else "",
        "published": "<br>".join(
            f"{row}: **{group.mean - row.acc:+.2f}**{how and f' at {how}'}" for row, how in beside.items()
        ),
        "minutes, machine": "<br>".join(f"{' + '.join(own)}, {where}" for where, own in times.items()),
        "small network's speed-up": "<br>".join(r.speed_up for r in group.runs if r.speed_up),
        "log": " ".join(f"[seed {seed}]({link})" for seed, link in links.items()),
    }


def table(columns: tuple[str, ...], rows: list[dict[str, str]]) -> str:
    """Rows as a Markdown table, columns that are empty throughout left out."""
    used = [column for column in columns if any(row[column] for row in rows)]
    lines = [used, ["---"] * len(used), *([" ".join(row[c].split()).replace("|", "\\|") for c in used] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def make_report(groups: list[SeedGroup], notes: list[str], *, base: Path, by_hand: str = "", picture: str = "") -> str:
    """The whole report.

    Args:
        groups, notes: of find_runs.
        base: folder that links are relative to.
        by_hand: text that follows the first table.
        picture: the picture's file, "" for none.
    """
    full = [group for group in groups if group.is_comparable]
    parts = ["# Results", "Written by `python -m utils.compare_tables --update`." if picture else ""]
    parts += [table(MAIN, [row_cells(group, base) for group in full]) if full else NONE_YET, LEGEND]
    parts += [f"![accuracy against multiply-adds]({picture})" if picture else "", by_hand]
    others = [group for group in groups if group not in full]
    parts += ["## Shorter runs and controls", "To be compared with each other at equal epochs only."] if others else []
    for title, section in groupby(others, lambda group: f"{group.first.arch} on {group.first.dataset}"):
        parts += [f"### {title}", table(SHORT, [row_cells(group, base) for group in section])]
    runs = [(os.path.relpath(run.folder, base), run.command) for group in groups for run in group.runs]
    commands = [f"{Path(folder).as_posix()}: `{command}`" for folder, command in runs]
    for title, lines in (("Order", order(groups)), ("Commands", commands), ("Not in the tables", notes)):
        parts += [f"## {title}", "\n".join(f"- {line}" for line in lines)] if lines else []
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def readme_block(groups: list[SeedGroup]) -> str:
    """The README's table with its markers: full-length rows, of those that differ in details the best one, beside the
    highest published rows or, while there are none, shorter ones of recipes as they are.
    """
    best: dict[tuple, SeedGroup] = {}
    for group in sorted((group for group in groups if group.is_comparable), key=lambda group: -group.mean):
        run = group.first
        best.setdefault((run.dataset, run.arch, run.started_from, run.method, run.asked, run.epochs), group)
    full = [group for group in groups if group in best.values()]
    chosen = (full or [group for group in groups if group.first.is_usual and not group.first.data_remark])[:README_ROWS]
    rows = [row_cells(group, ROOT) for group in chosen]
    for group, row in zip(chosen, rows, strict=True):
        beside = sorted(published_beside(group.first, read_published()), key=lambda other: -other.acc)
        lines = [other.short + (f": **{group.mean - other.acc:+.2f}**" if full else "") for other in beside]
        not_run = "full length (not run): " if lines and not full else ""
        row["published"] = not_run + "<br>".join(lines[:README_PUBLISHED])
    return "\n\n".join([BEGIN, *([] if full else [NONE_YET]), table(README, rows), README_LEGEND.strip(), END])


def replace_block(text: str, block: str) -> str:
    """A README with its generated block renewed.

    Raises:
        UserError: the markers are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"README.md must hold '{BEGIN}' and, after it, '{END}', once each; put them back")
    return text.split(BEGIN)[0] + block + text.split(END)[1]


def update(root: Path = ROOT) -> list[Path]:
    """Renews results/README.md, with results/notes.md in it, results/accuracy.png and the block in README.md.

    Raises:
        UserError: a results.json is damaged, or there is none.
    """
    folder, readme, picture = root / "results", root / "README.md", root / "results" / "accuracy.png"
    groups, notes = find_runs([folder])
    if damaged := [note for note in notes if " is damaged " in note]:
        raise UserError(f"{'; '.join(damaged)}; repair or remove it, nothing has been written")
    if not groups:
        raise UserError("results/ holds no results.json of a finished run; nothing has been written")
    text = replace_block(readme.read_text(encoding="utf-8"), readme_block(groups))
    hand = folder / "notes.md"
    by_hand = hand.read_text(encoding="utf-8") if hand.is_file() else ""
    drawn = picture.name if draw_accuracy(groups, read_published(), picture) else ""
    report = make_report(groups, notes, base=folder, by_hand=by_hand, picture=drawn)
    replace_file(folder / "README.md", report.encode())
    replace_file(readme, text.encode())
    return [folder / "README.md", *([picture] if drawn else []), readme]
