"""What to measure where a GPU is, in one command: `python -m utils.bench.gpu [--quick] [--out results/gpu]`.

The optimizer's tests on the GPU (tests.txt), the training loops, the optimizer's step and synchronisations. Rows of the
comparison are runs of the scripts, as on a CPU. --parts takes some of them, where a machine is lent for minutes at a
time. --quick takes small numbers, which show that everything runs, on a CPU too; they are no measurements.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.base.arguments import OneLineParser
from utils.base.errors import UserError, run_main
from utils.bench import optimizer, training

PARTS = ("tests", "training", "optimizer")
ROOT = Path(__file__).resolve().parents[2]
TESTS = ["tests/test_bench_optimizer.py", "tests/test_optimizer_on_gpus.py", "tests/test_optimizer.py"]
TRAINING = ["--dataset", "synthetic", "--images", "9984", "--loops", "original", "plain", "amp", "compile", "both"]
QUICK_TESTS = ["--noconftest", "-k", "waits", TESTS[0]]
QUICK = ["--arch", "resnet20", "--repeats", "2"]
QUICK_TRAINING = [*QUICK, "--dataset", "synthetic", "--loops", "plain", "--images", "32", "--batch_size", "16"]


def run_tests(args: argparse.Namespace) -> int:
    """The tests' exit status."""
    command = [sys.executable, "-m", "pytest", "-rs", *(QUICK_TESTS if args.quick else TESTS)]
    tests = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (args.out / "tests.txt").write_text(tests.stdout, encoding="utf-8")
    print(tests.stdout, flush=True)
    return tests.returncode


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that everything runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help=f"all: {' '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder for the results (results/gpu)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    save = ["--save_path", str(args.out)]
    # A failed test must not keep a machine that is lent for minutes from being measured.
    status = run_tests(args) if "tests" in args.parts else 0
    if "training" in args.parts:
        training.main([*(QUICK_TRAINING if args.quick else TRAINING), *save])
    for layout in ([], ["--channels_last"]) if "optimizer" in args.parts else ():
        optimizer.main([*(QUICK if args.quick else []), *layout, *save])
    if status:
        raise UserError(f"tests failed, see {args.out / 'tests.txt'}")


if __name__ == "__main__":
    run_main(main)
