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
    gradual = [tree, *FLAGS, "--recipe", "prune_gradual", "--macs_cut", "0.5", "--warmup", "0", "--lr", "0.05"]
    return {
        "one process": ([tree, *FLAGS], 1),
        "2 workers": ([tree, *FLAGS, "--workers", "2"], 1),
        "with a teacher": (distilled, 1),
        "two processes": ([tree, *FLAGS], 2),
        "three processes": ([tree, *FLAGS], 3),
        "gradual pruning": (gradual, 1),
        "gradual pruning, two processes": (gradual, 2),
    }


def killed(folder, argv, ranks, whole, signum, delay=None, **point) -> tuple[str, list[str]]:
    """What a run was doing when it was killed, after `delay` seconds or at a point, and what differs once resumed."""
    crashed = start(folder, argv, ranks=ranks, signum=signum, **point)
    if delay is not None:
        time.sleep(delay)
    where = crashed.doing() if delay is not None else point["point"]
    for process in crashed.processes if delay is not None else ():
        if process.is_alive():
            os.kill(process.pid, signum)
    if crashed.statuses[0] == 0:
        return "after its end", differences(folder / "out", whole)
    # Other ranks than the first may have reached the end before the signal came.
    expected = (-signum if signum == signal.SIGKILL else 128 + signum, 0)
    problems = [f"status {s}: {crashed.errors[-300:]}" for s in crashed.statuses if s not in expected]
    resumed = run(folder, resume_argv(crashed.errors) or [*argv, "--resume", "auto"], ranks=ranks)
    if resumed.statuses != [0] * ranks:
        return where, [*problems, f"resume: {resumed.statuses} {resumed.errors[-300:]}"]
    return where, problems + differences(folder / "out", whole)


def print_row(name: str, signum: int, cases: list[tuple[str, list[str]]]) -> int:
    """Prints what `killed` returned for a number of runs; the number of those that differ."""
    counts = collections.Counter(where for where, _ in cases).most_common()
    bad = [f"{where}: {'; '.join(problems)}" for where, problems in cases if problems]
    cells = [name, signal.Signals(signum).name, len(cases), ", ".join(f"{n} {where}" for where, n in counts), len(bad)]
    print(f"| {' | '.join(map(str, cells))} |", *bad, sep="\n", flush=True)
    return len(bad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="random moments per row (25)")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    failures = 0
    print("| what was killed | signal | times | what it was doing | resumed runs that differ |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
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
                    cases.append(killed(folder, argv, ranks, whole, signum, delay))
                failures += print_row(name, signum, cases)
            cases = []
            for point in POINTS if name == "one process" else ():
                for count in range(1, 31, 3):
                    folder = base / f"{point} {count}"
                    case = killed(folder, argv, 1, whole, signal.SIGKILL, point=point, count=count)
                    if case[0] == "after its end":
                        break
                    cases.append(case)
            failures += print_row("one process, exactly at", signal.SIGKILL, cases) if cases else 0
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
