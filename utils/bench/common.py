"""What the benchmarks share: their options, timing in turn, and a table with its command and machine."""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from utils.base.arguments import COUNT, OneLineParser
from utils.base.errors import UserError
from utils.base.files import replace_file
from utils.train.device import describe_machine
from utils.train.engine import RunningMeans, train_step


def benchmark_parser(text: str | None, repeats: int) -> OneLineParser:
    """A parser with the options that every benchmark has; `text` is the module's docstring."""
    form = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=text, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--repeats", type=COUNT, default=repeats, help=f"measurements of each ({repeats})")
    parser.add_argument("--save_path", type=Path, help="folder for the table (.md) and the figures (.json)")
    return parser


def parse_benchmark(parser: OneLineParser, name: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of utils.bench.<name>; beside them its `command`, and the machine's `load` at the start."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA GPU here; use --device cpu")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.command = shlex.join(["python", "-m", f"utils.bench.{name}", *argv])
    args.load = round(os.getloadavg()[0], 2)
    return args


def take_turns(calls: Sequence[Callable], device: torch.device, repeats: int, warm_up: int = 3) -> list[list[float]]:
    """Seconds of every call, `repeats` times; the calls take turns, so that what disturbs one disturbs all."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(-warm_up, repeats):
        for call, own in zip(calls, seconds, strict=True):
            wait()
            begin = time.perf_counter()
            call()
            wait()
            if turn >= 0:
                own.append(time.perf_counter() - begin)
    return seconds


def train_epoch(net, loader, objective, optimizer, device, before_step: Callable[[int], object] = lambda t: None):
    """A pass over a loader with the scripts' training step; the mean loss. `before_step` is called with its number."""
    net.train()
    means, sizes = RunningMeans(device), loader.sizes()
    for t, (images, labels) in enumerate(loader):
        options = dict(device=device, normalise=loader.dataset.normalise, size=sizes[t])
        options["before_update"] = partial(before_step, t)
        train_step(objective, net, images, labels, optimizer, means, **options)
    return means.read().loss


def publish(args: argparse.Namespace, stem: str, note: str, rows: list[dict], **facts) -> None:
    """Prints a Markdown table under its command and machine; with --save_path also stem.md and stem.json.

    Args:
        note: a sentence on what the figures are.
        rows: of the table; their keys are its columns; "timings" in the JSON file.
        facts: further entries of the JSON file.
    """
    machine = describe_machine(args.device) | {"torch": str(torch.__version__), "load": args.load}
    tf32 = "on" if torch.backends.cudnn.allow_tf32 else "off"
    where = f"{machine['gpu']} (TF32 in convolutions {tf32})" if machine["gpu"] else "CPU"
    where += f", {machine['cpu_cores']} cores, {machine['threads']} threads, torch {torch.__version__}"
    lines = [f"`{args.command}`; {where}; load average {args.load} at the start. {note}", ""]
    cells = [list(rows[0]), ["---"] * len(rows[0]), *([_show(value) for value in row.values()] for row in rows)]
    text = "\n".join([*lines, *(f"| {' | '.join(line)} |" for line in cells)]) + "\n"
    print(text, flush=True)
    if args.save_path:
        args.save_path.mkdir(parents=True, exist_ok=True)
        content = {"command": args.command, "machine": machine, "note": note, **facts, "timings": rows}
        replace_file(args.save_path / f"{stem}.md", text.encode())
        replace_file(args.save_path / f"{stem}.json", (json.dumps(content, indent=1) + "\n").encode())


def _show(value: object) -> str:
    digits = 0 if isinstance(value, float) and value >= 100 else 2
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
