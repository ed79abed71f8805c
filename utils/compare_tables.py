"""Published and own results side by side: `python -m utils.compare_tables [RESULTS...]`.

    python -m utils.compare_tables                                  # every results.json under results/ and runs/
    python -m utils.compare_tables runs/table --format markdown
    python -m utils.compare_tables --format csv > rows.csv
    python -m utils.compare_tables results --picture accuracy.png   # accuracy against multiply-adds
    python -m utils.compare_tables --update                         # results/tables.md, results/accuracy.png, the README's table

Own figures are last-epoch accuracies, mean over seeds with standard deviation and Student's 95 % interval; the best epoch on the test set, which this
line of papers prints, stands beside under that name. Runs on synthetic images, on other numbers of images or with shortened recipes are marked and
never subtracted from published figures or from runs of another length. Every difference is computed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from utils.base.errors import UserError, run_main
from utils.base.files import replace_file
from utils.compare.formats import FORMATS, markdown_table, with_interval
from utils.compare.order import order
from utils.compare.own_runs import ROOT, find_runs, group_runs, init, not_comparable, odd_data, show_path
from utils.compare.picture import draw_accuracy
from utils.compare.published import published_rows, read_published
from utils.compare.rows import against_published, make_rows, own_row
from utils.train.options import OneLineParser
from utils.train.run_folder import RUNS

RESULTS = ROOT / "results"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def readme_block(folder: Path = RESULTS) -> str:
    """The README's table of own results, with the markers around it."""
    groups, _ = group_runs(find_runs([folder])[0])
    published = read_published()
    rows = [own_row(group, groups, published) for group in groups]
    cells = []
    for row in rows:
        change = "" if row.change is None else f"{row.change:+.2f}"
        macs = "" if row.multiply_adds is None else f"{row.multiply_adds / 1e6:.2f} M"
        macs += f" ({-row.cut_count:+.1f} %)" if row.cut_count else ""
        name = f"{row.arch} {row.method}{f' {row.pruned:g} %' if row.pruned else ''}: {row.recipe}"
        figures = [row.seeds, with_interval(row), f"{row.best_epoch_accuracy:.2f}", change, macs, row.speed_up]
        cells.append([name, *figures, f"`{row.commands}`"])
    header = ["run", "seeds", "last epoch, %", "best epoch, %", "against own baseline", "multiply-adds"]
    header += ["times as fast (seed: where)", "command"]
    marked = sorted({row.marks for row in rows if row.marks})
    lines = [BEGIN, markdown_table(header, cells), ""]
    if marked:
        lines += [f"Not comparable with published figures: {'; '.join(marked)}.", ""]
    lines += [f"- {line}" for line in order(groups, published)]
    return "\n".join([*lines, END]) + "\n"


def replace_block(text: str, block: str) -> str:
    """The README with its generated block renewed.

    Raises:
        UserError: the markers are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"README.md must hold '{BEGIN}' and, after it, '{END}', once each; put them back")
    before, rest = text.split(BEGIN)
    return before + block.rstrip("\n") + rest.split(END)[1]


def report(folders: list[Path], form: str, *, every: bool = False) -> tuple[str, list[str]]:
    """(rows and what follows from them in one of FORMATS, notes on what was passed over)."""
    runs, notes = find_runs(folders)
    groups, repeats = group_runs(runs)
    published = read_published()
    rows = make_rows(groups, published, every=every)
    return FORMATS[form](rows, [*against_published(groups), *order(groups, published)]), notes + repeats


def update() -> list[Path]:
    """Renews what is generated from results/: results/tables.md, results/accuracy.png and the README's table."""
    readme = ROOT / "README.md"
    text = replace_block(readme.read_text(encoding="utf-8"), readme_block())
    groups, _ = group_runs(find_runs([RESULTS])[0])
    tables, picture = RESULTS / "tables.md", RESULTS / "accuracy.png"
    replace_file(tables, report([RESULTS], "markdown")[0].encode())
    draw_accuracy(groups, read_published(), picture)
    replace_file(readme, text.encode())
    return [tables, picture, readme]


def comparison_line(results: dict) -> str:
    """One line: a run's last-epoch accuracy beside the published figures, or why there is nothing to compare with.

    Args:
        results: the content of a run's results.json.
    """
    marks = not_comparable(results)
    if odd_data(results) == "SYNTHETIC DATA":
        return "comparison with the papers: none, the data is SYNTHETIC"
    if results.get("settings", {}).get("widths_of"):
        return "comparison with the papers: none, they have no small network trained from scratch"
    start = init(results) if "settings" in results else "scratch"
    rows = published_rows(results["dataset"], results["arch"], results["prune_rate"], start)
    what = f"{results['arch']} on {results['dataset']} with {100 * results['prune_rate']:g} % of the filters removed, {start}"
    if not rows:
        return f"comparison with the papers: none, no published row for {what}"
    published = "; ".join(
        f"{row.method} {row.acc:.2f}{f' +- {row.acc_std:.2f}' if row.acc_std is not None else ''} "
        f"({row.source}{', ' + row.doubt if row.doubt else ''})"
        for row in rows
    )
    own = f"this run {results['last_epoch_accuracy']:.2f} (last epoch){f', NOT COMPARABLE: {marks}' if marks else ''}"
    return f"comparison with the papers, {what}: {own}; published, top-1 %: {published}"


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "results", nargs="*", metavar="RESULTS", help="folders with results.json at any depth (results/ and runs/)"
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="what is printed (text)")
    parser.add_argument(
        "--all_published", action="store_true", help="also published rows of networks without an own run"
    )
    parser.add_argument("--picture", metavar="PNG", help="also draws accuracy against multiply-adds into this file")
    parser.add_argument(
        "--update", action="store_true", help="renews results/tables.md, results/accuracy.png and the README's table"
    )
    args = parser.parse_args(argv)
    if args.update:
        if args.results:
            raise UserError("--update works on the project's own results/; leave RESULTS out")
        for path in update():
            print(f"written: {show_path(path)}")
        return
    folders = [Path(name) for name in args.results] or [path for path in (RESULTS, RUNS) if path.is_dir()]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"'{folder}' is no folder; give folders that hold results.json")
    if hasattr(sys.stdout, "reconfigure"):
        # Whatever a results.json says, and whatever the terminal can show.
        sys.stdout.reconfigure(errors="backslashreplace")
    text, notes = report(folders, args.format, every=args.all_published)
    print(text, end="")
    for note in notes:
        # Beside a table that goes to a file, not in it.
        print(f"note: {note}", file=sys.stdout if args.format == "text" else sys.stderr)
    if args.picture:
        groups, _ = group_runs(find_runs(folders)[0])
        draw_accuracy(groups, read_published(), Path(args.picture))
        print(f"written: {args.picture}", file=sys.stderr)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
