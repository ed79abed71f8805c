"""Every way to kill a run that the README's table lists, all of them: `PYTHONPATH=. python tests/crash_table.py [--kills 25]`.

Each case is a run of a tiny network on a tiny image tree that is killed (from outside after a random time, or by itself at an exact
point), resumed with `--resume auto`, and compared with the uninterrupted run: weights, momentum, x_{t-1}, random states and history to
the last bit, metrics.csv and the log but for times. Prints a Markdown table; takes about half an hour on one core.
"""

import argparse
import collections
import signal
import sys
import tempfile
import time
from pathlib import Path

from crash_lab import FLAGS, POINTS, Lab, differences, random_delays, resume_argv
from tiny import make_teacher, make_tree


def variants(tree: Path, teacher: Path) -> dict[str, tuple[list, int]]:
    """{name: (command line, ranks)}."""
    plain = [tree, *FLAGS]
    distilled = [tree, "--arch", "resnet8", "--arch_small", "resnet8_dropout", "--teacher", teacher, *FLAGS[2:]]
    return {
        "one process": (plain, 1),
        "2 workers": ([*plain, "--workers", "2"], 1),
        "with a teacher": (distilled, 1),
        "two processes": (plain, 2),
    }


def killed_once(lab, folder, argv, ranks, whole, delay, signum) -> tuple[str, list[str]]:
    """Where a run was when the signal came, and what differs after it was resumed."""
    run = lab.start(folder, argv, ranks=ranks)
    time.sleep(delay)
    where = run.doing()
    run.kill(signum)
    status = run.wait()
    again = [*argv, "--resume", "auto"]
    if status == 0:
        return "after its end", differences(folder / "out", whole)
    problems = []
    if signum == signal.SIGTERM:
        # One rank may have reached the end before the signal came.
        if any(s not in (128 + signum, 0) for s in run.statuses):
            problems.append(f"statuses {run.statuses}: {run.text('stderr')[-300:]}")
        again = resume_argv(run.text("stderr")) or again
    elif any(s != -signum for s in run.statuses):
        problems.append(f"statuses {run.statuses}")
    resumed = lab.run(folder, again, ranks=ranks)
    if resumed.statuses != [0] * ranks:
        return where, [*problems, f"resume: {resumed.statuses} {resumed.text('stderr')[-300:]}"]
    return where, problems + differences(folder / "out", whole)


def summary(wheres: list[str]) -> str:
    counts = collections.Counter(wheres).most_common()
    return ", ".join(f"{n} in {where}" if where not in ("after its end",) else f"{n} {where}" for where, n in counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="random moments per row (25)")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as base, Lab() as lab:
        base = Path(base)
        tree, teacher = make_tree(base / "tree"), make_teacher(base / "best.resnet8.pth.tar")
        print(
            "| what was killed | signal | times | where it was | resumed runs that differ |\n|---|---|---|---|---|",
            flush=True,
        )
        for name, (argv, ranks) in variants(tree, teacher).items():
            if args.only not in name:
                continue
            whole = base / name / "whole"
            lab.run(whole, argv, ranks=ranks)  # also fills caches, so that the timed one is like those that follow
            begin = time.monotonic()
            again = lab.run(base / name / "again", argv, ranks=ranks)
            seconds = time.monotonic() - begin
            if again.statuses != [0] * ranks or differences(again.folder / "out", whole / "out"):
                raise SystemExit(f"{name}: two uninterrupted runs differ: {again.text('stderr')[-500:]}")
            for signum in (signal.SIGKILL, signal.SIGTERM):
                wheres, bad = [], []
                for i, delay in enumerate(random_delays(args.kills, seconds, seed=int(signum))):
                    folder = base / name / f"{signum}_{i}"
                    where, problems = killed_once(lab, folder, argv, ranks, whole / "out", delay, signum)
                    wheres.append(where)
                    if problems:
                        bad.append(f"{delay:.2f} s ({where}): {'; '.join(problems)}")
                failures += len(bad)
                label = signal.Signals(signum).name
                print(f"| {name} | {label} | {len(wheres)} | {summary(wheres)} | {len(bad)} |", flush=True)
                for line in bad:
                    print(line, file=sys.stderr, flush=True)
            if ranks == 1 and name == "one process":
                failures += exact_points(lab, base / "points", argv, whole / "out")
    sys.exit(failures > 0)


def exact_points(lab, base: Path, argv: list, whole: Path) -> int:
    """A run that ends itself at exact points, at the first, second, ... time it comes there."""
    failures = 0
    for point in POINTS:
        times = bad = 0
        for count in range(1, 31, 3):
            folder = base / f"{point} {count}"
            if lab.run(folder, argv, point=point, count=count).statuses != [-signal.SIGKILL]:
                break
            resumed = lab.run(folder, [*argv, "--resume", "auto"])
            problems = differences(folder / "out", whole) if resumed.statuses == [0] else [resumed.text("stderr")]
            times, bad = times + 1, bad + bool(problems)
            if problems:
                print(f"{point} {count}: {problems}", file=sys.stderr, flush=True)
        print(f"| one process, by itself | SIGKILL | {times} | exactly at: {point} | {bad} |", flush=True)
        failures += bad
    return failures


if __name__ == "__main__":
    main()
