"""The table of killed runs in tests/README.md: `PYTHONPATH=. python tests/crash_table.py [--kills 25] [--only NAME]`.

Each case is a run of a tiny network on a tiny image tree that is killed, from outside after a random time or by itself
at an exact point, resumed (SIGTERM: with the printed command) and compared with the uninterrupted run. Prints Markdown;
about half an hour on one core.
"""

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from crash_lab import FLAGS, POINTS, differences, resume_argv, run, start
from tiny import make_teacher, make_tree


def variants(tree: Path, teacher: Path) -> dict[str, tuple[list, int]]:
    """{name: (command line, ranks)}."""
    distilled = [tree, "--arch", "resnet8", "--arch_small", "resnet8_dropout", "--teacher", teacher, *FLAGS[2:]]
    return {
        "one process": ([tree, *FLAGS], 1),
        "2 workers": ([tree, *FLAGS, "--workers", "2"], 1),
        "with a teacher": (distilled, 1),
        "two processes": ([tree, *FLAGS], 2),
        "three processes": ([tree, *FLAGS], 3),
    }


def killed_once(folder, argv, ranks, whole, delay, signum) -> tuple[str, list[str]]:
    """What a run was doing when the signal came, and what differs after it was resumed."""
    killed = start(folder, argv, ranks=ranks)
    time.sleep(delay)
    where = killed.doing()
    for process in killed.processes:
        if process.is_alive():
            os.kill(process.pid, signum)
    if killed.statuses[0] == 0:
        return "after its end", differences(folder / "out", whole)
    # On SIGTERM one rank may have reached the end before the signal came.
    expected = (-signum,) if signum == signal.SIGKILL else (128 + signum, 0)
    problems = [f"status {s}: {killed.errors[-300:]}" for s in killed.statuses if s not in expected]
    resumed = run(folder, resume_argv(killed.errors) or [*argv, "--resume", "auto"], ranks=ranks)
    if resumed.statuses != [0] * ranks:
        return where, [*problems, f"resume: {resumed.statuses} {resumed.errors[-300:]}"]
    return where, problems + differences(folder / "out", whole)


def killed_at(base: Path, argv: list, whole: Path, point: str) -> list[list[str]]:
    """What differs for a run that ends itself at the first, fourth, seventh, ... time it comes to a point."""
    found = []
    for count in range(1, 31, 3):
        folder = base / f"{point} {count}"
        if run(folder, argv, point=point, count=count).statuses != [-signal.SIGKILL]:
            break
        resumed = run(folder, [*argv, "--resume", "auto"])
        found.append(differences(folder / "out", whole) if resumed.statuses == [0] else [resumed.errors])
    return found


def print_row(name: str, label: str, wheres: list[str], problems: list[list[str]]) -> int:
    bad = [f"{where}: {'; '.join(problem)}" for where, problem in zip(wheres, problems, strict=True) if problem]
    counts = ", ".join(f"{n} {where}" for where, n in collections.Counter(wheres).most_common())
    print(f"| {name} | {label} | {len(wheres)} | {counts} | {len(bad)} |", flush=True)
    print("".join(f"{line}\n" for line in bad), file=sys.stderr, end="", flush=True)
    return len(bad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="random moments per row (25)")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    failures = 0
    print("| what was killed | signal | times | what it was doing | resumed runs that differ |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as base:
        base = Path(base)
        tree, teacher = make_tree(base / "tree"), make_teacher(base / "best.resnet8.pth.tar")
        for name, (argv, ranks) in variants(tree, teacher).items():
            if args.only not in name:
                continue
            # The first run also fills caches, so that the second takes as long as those that follow.
            whole = run(base / name / "whole", argv, ranks=ranks).folder / "out"
            begin = time.monotonic()
            again = run(base / name / "again", argv, ranks=ranks)
            seconds = time.monotonic() - begin
            if again.statuses != [0] * ranks or differences(again.folder / "out", whole):
                raise SystemExit(f"{name}: two uninterrupted runs differ: {again.errors[-500:]}")
            for signum in (signal.SIGKILL, signal.SIGTERM):
                draw, cases = random.Random(int(signum)), []
                for i in range(args.kills):
                    folder, delay = base / name / f"{signum}_{i}", draw.uniform(0.02, seconds)
                    cases.append(killed_once(folder, argv, ranks, whole, delay, signum))
                failures += print_row(name, signum.name, *map(list, zip(*cases, strict=True)))
            for point in POINTS if name == "one process" else ():
                problems = killed_at(base / "points", argv, whole, point)
                failures += print_row("one process, by itself", "SIGKILL", [f"at: {point}"] * len(problems), problems)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
