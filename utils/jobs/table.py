"""Fills a whole table, networks x rates x methods x seeds: `bash run_cifar.sh table`.

    bash run_cifar.sh table --nets resnet20 --rates 0.3 --methods baseline prune prune_distill --seeds 1 2 3
    bash run_cifar.sh table --epochs 10 --fit_schedule --seeds 1 --methods prune prune_per_epoch scratch_epochs scratch_cost --dry_run
    bash run_cifar.sh table DATA --jobs 2

Methods: baseline; prune; prune_distill; distill; the controls scratch_epochs and scratch_cost (the small network trained from scratch for equal
epochs, and for equal multiply-adds), prune_per_epoch (thresholds once per epoch, as soft filter pruning), prune_released (the release's heavy
ball, which is zero), prune_fixed_batch, prune_no_regrow. Teachers and the networks that controls need are trained first. Repeat the command to go on
after an interruption: what is done is skipped, what was begun continues. Other flags are those of cifar10_resnet_test.py and hold for every row
they concern. Every run has a folder of its own in --save_path; a comparison with the published rows ends the table.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cifar10_resnet_test as script
import models
from utils.base.errors import UserError
from utils.compare.side_by_side import SideBySide
from utils.compare_tables import RESULTS, report
from utils.jobs.hours import Speeds, cost_share, count_images, seconds_per_epoch
from utils.jobs.run_recipe import choose_data, short_run, without
from utils.jobs.table_plan import METHODS, Row, make_plan, state
from utils.train.options import count, pruned_rate, seed_number
from utils.train.progress import format_seconds
from utils.train.run_folder import RUNS

# Flags of the training script that the table sets for every row.
SET_HERE = (
    *("arch", "arch_small", "recipe", "HTrate", "prune_rate", "manualSeed", "resume", "evaluate", "widths_of"),
    *("threshold_every", "heavy_ball", "no_regrow", "head_width"),
)
OWN = {
    **{"nets": "+", "rates": "+", "methods": "+", "seeds": "+", "jobs": 1, "dry_run": 0, "teacher_net": 1},
    **{"teacher": 1, "save_path": 1, "progress": 1},
}


def parser() -> argparse.ArgumentParser:
    parser = script.parser()
    parser.description = __doc__
    group = parser.add_argument_group("table")
    group.add_argument("--nets", nargs="+", default=["resnet20"], metavar="ARCH", help="networks (resnet20)")
    group.add_argument(
        "--rates",
        nargs="+",
        type=pruned_rate,
        default=[0.3],
        metavar="RATE",
        help="shares of the filters REMOVED (0.3)",
    )
    group.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["baseline", "prune", "prune_distill"],
        help="rows of the table",
    )
    group.add_argument("--seeds", nargs="+", type=seed_number, default=[1, 2, 3], metavar="SEED", help="seeds (1 2 3)")
    group.add_argument("--teacher_net", metavar="ARCH", help="teaches every network (resnet20 from resnet56, ...)")
    group.add_argument("--jobs", type=count, default=1, help="runs side by side; the CPU's threads are shared out (1)")
    group.add_argument("--progress", type=count, default=60, help="seconds between two lines of progress (60)")
    group.add_argument("--dry_run", action="store_true", help="only prints the plan, with estimated hours")
    parser.set_defaults(save_path=str(RUNS / "table"))
    return parser


def main(argv: list[str]) -> None:
    flags = parser().canonical(argv)
    args, given = parser().parse_given(flags)
    for name in SET_HERE:
        if name in given:
            raise UserError(f"the table sets --{name} itself; use --nets, --rates, --methods and --seeds")
    for arch in [*args.nets, *([args.teacher_net] if args.teacher_net else [])]:
        models.check_arch(arch)
    if args.teacher and args.teacher_net:
        raise UserError("--teacher names a checkpoint, --teacher_net a network to train; give one of them")
    for name in ("nets", "rates", "methods", "seeds"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    common = without(flags, {name: OWN[name] for name in OWN if name != "teacher" or args.teacher})
    common += [] if args.dry_run else choose_data(args, common)
    args.recipe = "baseline"
    common += short_run(args, common)
    rows = make_plan(
        *(args.nets, args.rates, args.methods, args.seeds, common, Path(args.save_path)),
        **dict(teacher_net=args.teacher_net, teacher=args.teacher),
    )
    threads = share_of_threads(args.jobs)
    hours = Hours(rows, args.jobs, threads, Path(args.save_path))
    print(hours.plan(), flush=True)
    if args.dry_run:
        return
    print(f"{args.jobs} at a time with {threads} CPU threads each, in {args.save_path}", flush=True)
    running = SideBySide(rows, args.jobs, threads, say, hours.ticker(args.progress))
    running.run()
    text, notes = report([Path(args.save_path)], "text")
    print(f"\n{text}", end="")
    for note in notes:
        print(f"note: {note}")
    print(f"\n{len(running.done)} of {len(rows)} runs are done", flush=True)
    if running.failed:
        failed = "".join(f"\n  {path.name}: {why}" for path, why in running.failed.items())
        print(f"{len(running.failed)} failed; repeat the command when they are mended:{failed}", file=sys.stderr)
        sys.exit(1)


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def share_of_threads(jobs: int) -> int:
    """CPU threads of a run: of OMP_NUM_THREADS where it is set, else of all cores that this process may use."""
    try:
        available = int(os.environ["OMP_NUM_THREADS"])
    except (KeyError, ValueError):
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        available = len(cores)
    return max(1, available // jobs)


class Hours:
    """Estimated time of rows, and what is left while they run."""

    def __init__(self, rows: list[Row], jobs: int, threads: int, folder: Path):
        self.rows, self.jobs = rows, jobs
        self.speeds = Speeds([folder, RUNS, RESULTS], threads)
        self.images, self.seen = count_images(rows[0].settings()), 0

    def of(self, row: Row) -> float:
        """Estimated seconds of the epochs that are left; by its own epochs where some are done."""
        history = read_metrics(row.folder / "metrics.csv")
        per_epoch = statistics.median(history) if history else seconds_per_epoch(self.speeds.of(row), self.images)
        return max(0, self.epochs(row) - len(history)) * per_epoch

    def epochs(self, row: Row) -> int:
        """Epochs of a row; those of equal cost are a guess until the other run has ended."""
        return round(row.epochs / cost_share(row)) if row.equal_cost else row.epochs

    def plan(self) -> str:
        """A line per row, and the sum."""
        width = max(len(row.name) for row in self.rows)
        lines, left = [], []
        for row in self.rows:
            there, remark = state(row)
            seconds = 0.0 if there == "done" else self.of(row)
            left.append(seconds)
            source = "" if there == "done" else f"  {self.speeds.of(row).source}"
            epochs = f"{'about ' if row.equal_cost else ''}{self.epochs(row)}"
            status = {"done": f"  done, {remark}", "begun": f"  begun, {remark}", "new": ""}.get(
                there, f"  REFUSED: {remark}"
            )
            lines.append(f"{row.name:{width}}  {epochs:>9} epochs  {format_seconds(seconds):>10}{source}{status}")
        lines.append(
            f"{len(self.rows)} runs; left about {sum(left) / 3600:.1f} hours of runs, {self.wall(left) / 3600:.1f} hours "
            f"({format_seconds(self.wall(left))}) with {self.jobs} at a time if they do not slow each other down"
        )
        return "\n".join(lines)

    def wall(self, left: list[float]) -> float:
        """Seconds until rows of these seconds have ended; no shorter than the longest."""
        return max(sum(left) / self.jobs, *left, 0.0)

    def ticker(self, seconds: int) -> Callable[[SideBySide], None]:
        """A callback that prints a line of progress now and then."""
        last = time.monotonic()

        def tick(running: SideBySide) -> None:
            nonlocal last
            if time.monotonic() - last >= seconds and running.children:
                last = time.monotonic()
                say(self.progress(running))

        return tick

    def progress(self, running: SideBySide) -> str:
        """How many rows are done, the time left, and what runs."""
        if len(running.done) != self.seen:
            self.seen = len(running.done)
            self.speeds.look(self.rows[0])
        left = [
            self.of(row) for row in self.rows if row.folder not in running.done and row.folder not in running.failed
        ]
        now = ", ".join(
            f"{child.row.name} {len(read_metrics(child.row.folder / 'metrics.csv'))}/{self.epochs(child.row)} epochs"
            for child in running.children
        )
        return (
            f"{len(running.done)}/{len(self.rows)} done, {len(running.failed)} failed, "
            f"time left about {format_seconds(self.wall(left))}; running {now}"
        )


def read_metrics(file: Path) -> list[float]:
    """Seconds of every complete epoch of a run; [] before the first."""
    try:
        with open(file, newline="") as metrics:
            return [float(row["seconds"]) for row in csv.DictReader(metrics)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
