"""Own results beside published ones: every results.json under results/ and runs/, or under the folders given.

python -m utils.compare_tables                             # prints the tables
python -m utils.compare_tables runs/table --picture a.png  # and draws accuracy against multiply-adds
python -m utils.compare_tables --update                    # renews results/README.md, picture, README's table
"""

import argparse
from pathlib import Path

from utils.base.arguments import OneLineParser
from utils.base.errors import UserError, run_main
from utils.tables.markdown import make_report, update
from utils.tables.picture import draw_accuracy
from utils.tables.published import read_published
from utils.tables.runs import ROOT, find_runs, show_path
from utils.train.run_folder import RUNS


def main(argv: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="holds results.json at any depth (results runs)")
    parser.add_argument("--picture", metavar="PNG", help="also draws accuracy against multiply-adds into this file")
    parser.add_argument("--update", action="store_true", help="renews results/README.md, picture, README.md's table")
    args = parser.parse_args(argv)
    if args.update and (args.folders or args.picture):
        raise UserError("--update works on the project's own results/; leave folders and --picture out")
    if args.update:
        print("\n".join(f"written: {show_path(path)}" for path in update()))
        return
    if args.picture is not None and not args.picture.endswith(".png"):
        raise UserError(f"--picture '{args.picture}' must end in .png")
    folders = [Path(name) for name in args.folders] or [path for path in (ROOT / "results", RUNS) if path.is_dir()]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"'{folder}' is no folder; give folders that hold results.json")
    groups, notes = find_runs(folders)
    print(make_report(groups, notes, base=Path.cwd()), end="")
    if args.picture and not draw_accuracy(groups, read_published(), Path(args.picture)):
        raise UserError(f"there is nothing to draw, so '{args.picture}' was not written; give folders of finished runs")


if __name__ == "__main__":
    run_main(main)
