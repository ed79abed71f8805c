"""Times this project's training loop beside one written as the authors' release writes it (utils.bench.original_loop).

    python -m utils.bench.training data/cifar10                                # every network, with and without a teacher
    python -m utils.bench.training data/cifar10 --nets resnet20 --teacher no --save_path results/bench_training
    python -m utils.bench.training data/cifar10 --startup                      # seconds from command to first step
    python -m utils.bench.training data/cifar10 --accuracy --seeds 1 2 3       # short runs of both loops, tested
    python -m utils.bench.training data/cifar10 --operations --teacher no      # time per kind of operation

The loops take turns, round by round, each in a process of its own that sleeps meanwhile; figures are medians over the rounds. A first
round of each is not counted. On a GPU the shares of time come of one more round with synchronised clocks. Teachers have random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

import data
import models
from utils.base.errors import UserError, run_main
from utils.bench.accuracy import accuracy_table, run_accuracy
from utils.bench.loops import LoopProcess, Setup
from utils.bench.operations import operations_table, time_operations
from utils.small.counts import count
from utils.train.device import choose_device, describe_machine
from utils.train.options import OneLineParser, path_name, whole
from utils.train.options import count as positive_count

ROOT = Path(__file__).resolve().parents[1]
NETS = {"resnet20": "resnet56", "resnet56": "resnet110", "vgg16_bn": "vgg19_bn"}
# What is compared, and the options of this project's loop behind each name.
LOOPS = {
    "release": {},
    "this": {},
    "this --compile": {"compile": True},
    "this --amp": {"amp": True},
    "this --amp --compile": {"amp": True, "compile": True},
}
PARTS = ("data", "forward and backward", "optimizer")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data_path", nargs="?", default="./data", help="where the images are (./data)")
    parser.add_argument("--dataset", choices=data.DATASETS, default="cifar10", help="synthetic needs no data (cifar10)")
    parser.add_argument("--nets", nargs="+", default=list(NETS), help=f"networks ({' '.join(NETS)})")
    parser.add_argument(
        "--teacher", choices=("no", "yes", "both"), default="both", help="time with a larger teacher (both)"
    )
    parser.add_argument(
        "--loops",
        nargs="+",
        choices=list(LOOPS),
        help="what is compared (release, this, this --compile; --accuracy and --operations: without the last)",
    )
    parser.add_argument("--images", type=positive_count, help="training images per round (1280; --accuracy: 10000)")
    parser.add_argument("--rounds", type=positive_count, default=5, help="rounds counted (5)")
    parser.add_argument("--batch_size", type=positive_count, default=128, help="images per mini-batch (128)")
    parser.add_argument("--workers", type=whole, default=2, help="processes that make mini-batches, in each loop (2)")
    parser.add_argument("--threads", type=positive_count, help="CPU threads of each loop (torch's choice)")
    parser.add_argument("--ngpu", type=whole, help="0: CPU (default: a GPU where there is one)")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--accuracy", action="store_true", help="test short pruned runs instead of timing")
    other.add_argument("--startup", action="store_true", help="time the script from command to first step instead")
    other.add_argument(
        "--operations", action="store_true", help="time every kind of tensor operation instead, in eager loops"
    )
    parser.add_argument("--seeds", type=whole, nargs="+", default=[1, 2, 3], help="of --accuracy (1 2 3)")
    parser.add_argument("--epochs", type=positive_count, default=3, help="of --accuracy (3)")
    parser.add_argument("--save_path", type=path_name, help="folder for the table (.md) and all figures (.json)")
    args = parser.parse_args(argv)
    args.device = str(choose_device(args.ngpu))
    args.images = args.images or (10_000 if args.accuracy else 1280)
    compiled = [name for name in args.loops or () if LOOPS[name].get("compile")]
    if args.operations and compiled:
        raise UserError(f"--operations times eager loops, what is compiled is one operation; leave out '{compiled[0]}'")
    args.loops = args.loops or ["release", "this"] + ["this --compile"] * (not args.operations and not args.accuracy)
    for arch in args.nets:
        models.check_arch(arch)
    if args.images < args.batch_size:
        raise UserError(f"--images {args.images} is less than a mini-batch of {args.batch_size}; give more")
    return args


def setups(args: argparse.Namespace, arch: str, teacher: str | None, seed: int = 1, k=None) -> list[Setup]:
    """A Setup per loop that is compared."""
    return [
        Setup(
            loop=name.split()[0],
            arch=arch,
            teacher=teacher,
            dataset=args.dataset,
            data_path=args.data_path,
            images=args.images,
            batch_size=args.batch_size,
            k=k,
            workers=args.workers,
            seed=seed,
            device=args.device,
            threads=args.threads,
            **LOOPS[name],
        )
        for name in args.loops
    ]


def bench(chosen: list[Setup], rounds: int) -> list[dict]:
    """Times loops in turn: a row per loop with medians over the rounds, in the order of `chosen`."""
    with ExitStack() as stack:
        processes = [stack.enter_context(LoopProcess(setup)) for setup in chosen]
        first = [process.call("train")["seconds"] for process in processes]
        taken = [[process.call("train") for process in processes] for _ in range(rounds)]
        on_gpu = chosen[0].device != "cpu"
        parts = [process.call("train", True) for process in processes] if on_gpu else None
        peaks = [process.call("matmul_flops") for process in processes]
    rows = []
    for i, setup in enumerate(chosen):
        own = [one[i] for one in taken]
        speeds = sorted(one["images"] / one["seconds"] for one in own)
        split = [parts[i]] if parts else own
        row = {
            "loop": setup.label,
            "images_per_s": statistics.median(speeds),
            "slowest": speeds[0],
            "fastest": speeds[-1],
            "shares": {name: statistics.median(one[name] / one["seconds"] for one in split) for name in PARTS},
            "memory": own[-1]["memory"],
            "first_round_s": first[i],
            "matmul_flops": peaks[i],
            "rounds": own,
        }
        rows.append(row)
    for row in rows:
        row["times_release"] = row["images_per_s"] / rows[0]["images_per_s"]
    return rows


def training_flops(arch: str, teacher: str | None) -> tuple[int, int]:
    """Floating-point operations per training image, forward and backward.

    2 per multiply-add, once forward and twice backward (gradients of inputs and of weights); a teacher forward only.
    """
    image = torch.zeros(1, 3, 32, 32)
    forward = 2 * count(models.build(arch), image).multiply_adds
    return forward + (2 * count(models.build(teacher), image).multiply_adds if teacher else 0), 2 * forward


def table(results: list[dict], heading: str) -> str:
    """The timings as Markdown."""
    lines = [
        heading,
        "",
        "| network | teacher | loop | images/s | slowest .. fastest | times the first | data | forward and backward | optimizer "
        "| peak memory, MiB (+ workers) | GPU, MiB | of matmul FLOP/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result["rows"]:
            data_share, net_share, optimizer_share = (f"{100 * row['shares'][name]:.1f} %" for name in PARTS)
            memory = row["memory"]
            process = "-" if memory["process"] is None else f"{memory['process']:.0f} + {memory['workers']:.0f}"
            gpu = "-" if memory["gpu"] is None else f"{memory['gpu']:.0f}"
            reached = row["images_per_s"] * result["flops_per_image"] / row["matmul_flops"]
            lines.append(
                f"| {result['arch']} | {result['teacher'] or '-'} | {row['loop']} | {row['images_per_s']:.0f} "
                f"| {row['slowest']:.0f} .. {row['fastest']:.0f} | {row['times_release']:.2f} | {data_share} | {net_share} "
                f"| {optimizer_share} | {process} | {gpu} | {100 * reached:.0f} % |"
            )
    return "\n".join(lines) + "\n"


def time_startup(args: argparse.Namespace, arch: str, repeats: int = 3) -> list[float]:
    """Seconds from starting the CIFAR script to its first training step, a cache of the images being there."""
    taken = []
    for _ in range(repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "cifar10_resnet_test.py"), args.data_path, "--dataset", args.dataset]
            command += ["--arch", arch, "--print_freq", "1", "--epochs", "1", "--save_path", f"{folder}/run"]
            command += ["--ngpu", "0"] if args.device == "cpu" else []
            threads = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
            begin = time.perf_counter()
            script = subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads, "PYTHONUNBUFFERED": "1"}
            )
            try:
                first = next((line for line in script.stdout if "[000][000/" in line), None)
                if first is None:
                    raise UserError(f"the script ended before its first step: {shlex.join(command)}")
                taken.append(time.perf_counter() - begin)
            finally:
                script.kill()
                script.wait()
    # The first one may have made the cache.
    return taken[1:]


def teachers(args: argparse.Namespace, arch: str) -> list[str | None]:
    """The teachers of a network, by --teacher; None: trained without."""
    larger = NETS.get(arch, arch)
    return {"no": [None], "yes": [larger], "both": [None, larger]}[args.teacher]


def describe(args: argparse.Namespace, argv: list[str]) -> tuple[str, dict]:
    """The command, and the machine it ran on."""
    machine = describe_machine(torch.device(args.device)) | {
        "torch": str(torch.__version__),
        "load": [round(x, 2) for x in os.getloadavg()],
    }
    return shlex.join(["python", "-m", "utils.bench.training", *argv]), machine


def save(folder: str | None, name: str, text: str, facts: dict) -> None:
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.md").write_text(text, encoding="utf-8")
        (Path(folder) / f"{name}.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    command, machine = describe(args, argv)
    where = f"{machine['gpu'] or 'CPU'}, {machine['cpu_cores']} cores, {args.threads or machine['threads']} threads, torch {machine['torch']}"
    device = torch.device(args.device).type
    for arch in args.nets:
        if args.startup:
            taken = time_startup(args, arch)
            text = f"`{command}`; {where}: {arch}, {statistics.median(taken):.1f} s from command to first step (median of {len(taken)})\n"
            print(text, end="", flush=True)
            save(
                args.save_path,
                f"startup_{device}_{arch}",
                text,
                {"command": command, "machine": machine, "seconds": taken},
            )
        elif args.accuracy:
            path = Path(args.save_path) / f"accuracy_{device}_{arch}.json" if args.save_path else None
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
            chosen = [one for seed in args.seeds for one in setups(args, arch, None, seed, k=2 * args.batch_size)]
            rows = run_accuracy(chosen, args.epochs, path)
            text = accuracy_table(rows, command)
            print(text, flush=True)
            if path:
                path.with_suffix(".md").write_text(text, encoding="utf-8")
        elif args.operations:
            for teacher in teachers(args, arch):
                results = time_operations(setups(args, arch, teacher), args.rounds)
                forward, backward = training_flops(arch, teacher)
                guided = f" with a {teacher} teacher" if teacher else ""
                text = operations_table(
                    results,
                    {"aten::convolution": forward, "aten::convolution_backward": backward},
                    f"`{command}`; {where}; {arch}{guided}, {args.images} images a round in mini-batches of {args.batch_size}, {args.workers} workers, medians of {args.rounds} rounds "
                    f"in turn; load average at the start {machine['load'][0]}.",
                )
                print(text, flush=True)
                name = f"operations_{device}_{arch}" + (f"_from_{teacher}" if teacher else "")
                save(args.save_path, name, text, {"command": command, "machine": machine, "results": results})
        else:
            results = []
            for teacher in teachers(args, arch):
                rows = bench(setups(args, arch, teacher), args.rounds)
                results.append(
                    {
                        "arch": arch,
                        "teacher": teacher,
                        "flops_per_image": sum(training_flops(arch, teacher)),
                        "rows": rows,
                    }
                )
                for row in rows:
                    print(
                        f"{arch}, teacher {teacher or 'none'}, {row['loop']}: {row['images_per_s']:.0f} images/s, {row['times_release']:.2f} times the first",
                        flush=True,
                    )
            heading = (
                f"`{command}`; {where}; {args.images} images a round in mini-batches of {args.batch_size}, {args.workers} workers, "
                f"medians of {args.rounds} rounds in turn; load average at the start {machine['load'][0]}."
            )
            text = table(results, heading)
            print("\n" + text, flush=True)
            save(
                args.save_path,
                f"speed_{device}_{arch}",
                text,
                {"command": command, "machine": machine, "results": results},
            )


if __name__ == "__main__":
    run_main(main)
