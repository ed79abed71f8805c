"""Times a step of the optimizer beside torch's SGD and a per-filter loop as in the authors' release.

    python -m utils.bench.optimizer                                   # every network, on the GPU where there is one
    python -m utils.bench.optimizer --device cpu --nets resnet56 --repeats 50 --channels_last
    OMP_NUM_THREADS=2 python -m utils.bench.optimizer --device cpu --save_path results/bench_optimizer

One process, every optimizer on its own copy of the parameters with fixed gradients; the optimizers take turns step by step, so that load and
clock rates hit all alike. Ratios are quotients of medians. The recipe is the release's: momentum 0.9 (Nesterov), weight decay 5e-4, v 0.1,
HTrate 0.7. On CUDA every time is taken between two synchronisations, and a step that itself waits for the GPU ends the script with exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import models
from AHSG_HT import AHSG_HT
from utils.base.errors import UserError, run_main
from utils.base.torchvision_import import import_torchvision
from utils.bench.per_filter_loop import PerFilterLoop
from utils.train.device import describe_machine
from utils.train.options import OneLineParser

NETS = ("resnet20", "resnet56", "resnet110", "vgg16_bn", "resnet50")
SGD_RECIPE = dict(lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
HT_RECIPE = SGD_RECIPE | dict(v=0.1, HTrate=0.7)

# Name in the table: what makes the optimizer. The first one is what the ratios refer to.
OPTIMIZERS: dict[str, Callable[[list[Tensor]], object]] = {
    "SGD foreach": lambda params: torch.optim.SGD(params, foreach=True, **SGD_RECIPE),
    "SGD fused": lambda params: torch.optim.SGD(params, fused=True, **SGD_RECIPE),
    "AHSG-HT": lambda params: AHSG_HT(params, **HT_RECIPE),
    "per-filter loop": lambda params: PerFilterLoop(params, **HT_RECIPE),
}
# The loop takes up to seconds a step on large networks; its median needs fewer repeats.
LOOP_SHARE = 5
# torch also warns once that the debug mode is a prototype, in words that speak of synchronizing operations.
SYNC_WARNING = "called a synchronizing CUDA operation"


def build_net(name: str) -> nn.Module:
    """A network of the registry, or torchvision's resnet50 (ImageNet)."""
    return import_torchvision().models.resnet50(weights=None) if name == "resnet50" else models.build(name)


def parameters_with_gradients(name: str, device: torch.device, channels_last: bool) -> list[Tensor]:
    """The parameters of a network from a fixed seed, with random gradients of their own layout."""
    torch.manual_seed(0)
    net = build_net(name).to(device)
    if channels_last:
        net.to(memory_format=torch.channels_last)
    params = list(net.parameters())
    for p in params:
        p.grad = torch.empty_like(p).normal_(std=1e-4)
    return params


def one_step(optimizer: object) -> None:
    """A step in the released calling order."""
    if isinstance(optimizer, torch.optim.SGD):
        optimizer.step()
    else:
        optimizer.update_HSG(1)
        optimizer.step(None, 1.0, 0, 1)


def count_synchronisations(optimizer: object) -> int:
    """Times that one step makes the host wait for the GPU, as torch's sync debug mode reports them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            one_step(optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNC_WARNING in str(warning.message) for warning in caught)


def bench(name: str, device: torch.device, repeats: int, channels_last: bool) -> dict:
    """Step times of every optimizer on one network, in ms: {"net", "layout", "parameters", "rows": {optimizer: figures}}."""
    optimizers = {
        label: make(parameters_with_gradients(name, device, channels_last)) for label, make in OPTIMIZERS.items()
    }
    rows = {label: {} for label in optimizers}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for label, optimizer in optimizers.items():
        for _ in range(2):
            one_step(optimizer)  # state is made in the first step
        if device.type == "cuda":
            rows[label]["synchronisations"] = count_synchronisations(optimizer)
    times = {label: [] for label in optimizers}
    for repeat in range(repeats):
        for label, optimizer in optimizers.items():
            if label == "per-filter loop" and repeat % LOOP_SHARE:
                continue
            wait()
            begin = time.perf_counter()
            one_step(optimizer)
            wait()
            times[label].append(1e3 * (time.perf_counter() - begin))
    base = statistics.median(times["SGD foreach"])
    for label, row in rows.items():
        taken = sorted(times[label])
        row |= {
            "median_ms": statistics.median(taken),
            "fastest_ms": taken[0],
            "slowest_ms": taken[-1],
            "steps": len(taken),
            "ratio": statistics.median(taken) / base,
            "ratio_of_fastest": taken[0] / min(times["SGD foreach"]),
        }
    params = parameters_with_gradients(name, torch.device("cpu"), False)
    return {
        "net": name,
        "layout": "channels_last" if channels_last else "contiguous",
        "parameters": sum(p.numel() for p in params),
        "rows": rows,
    }


def table(results: list[dict], heading: str) -> str:
    """The results as Markdown."""
    lines = [
        heading,
        "",
        "| network | layout | optimizer | median ms | fastest .. slowest | ratio to SGD foreach | of the fastest | host waits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for label, row in result["rows"].items():
            lines.append(
                f"| {result['net']} | {result['layout']} | {label} | {row['median_ms']:.2f} | {row['fastest_ms']:.2f} .. {row['slowest_ms']:.2f} "
                f"| {row['ratio']:.2f} | {row['ratio_of_fastest']:.2f} | {row.get('synchronisations', '-')} |"
            )
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--nets", nargs="+", default=list(NETS), help=f"of the registry, or resnet50; default {' '.join(NETS)}"
    )
    parser.add_argument(
        "--repeats", type=int, default=50, help="steps timed per optimizer (a fifth of them for the loop)"
    )
    parser.add_argument(
        "--channels_last", action="store_true", help="parameters in channels_last, as the scripts train"
    )
    parser.add_argument("--save_path", type=Path, help="folder for bench_<device>_<layout>.md and .json")
    args = parser.parse_args(argv)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA GPU here; use --device cpu")
    if args.repeats < 1:
        raise UserError(f"--repeats must be >= 1, got {args.repeats}")
    for name in args.nets:
        if name != "resnet50":
            models.check_arch(name)
    return args


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    command = "python -m utils.bench.optimizer " + shlex.join(sys.argv[1:] if argv is None else argv)
    machine = describe_machine(args.device) | {
        "torch": torch.__version__,
        "load": [round(x, 2) for x in os.getloadavg()],
    }
    results = []
    for name in args.nets:
        results.append(bench(name, args.device, args.repeats, args.channels_last))
        print(f"{name}: AHSG-HT {results[-1]['rows']['AHSG-HT']['ratio']:.2f} times SGD foreach", flush=True)
    heading = (
        f"`{command.strip()}`; {machine['gpu'] or 'CPU'}, {machine['cpu_cores']} cores, {machine['threads']} threads, torch {machine['torch']}; "
        f"load average at the start {machine['load'][0]}."
    )
    text = table(results, heading)
    print("\n" + text)
    if args.save_path:
        args.save_path.mkdir(parents=True, exist_ok=True)
        stem = f"bench_{args.device.type}_{results[0]['layout']}"
        (args.save_path / f"{stem}.md").write_text(text, encoding="utf-8")
        facts = {"command": command.strip(), "machine": machine, "results": results}
        (args.save_path / f"{stem}.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    waits = {r["net"]: r["rows"]["AHSG-HT"].get("synchronisations", 0) for r in results}
    if any(waits.values()):
        found = ", ".join(f"{count} on {net}" for net, count in waits.items() if count)
        print(f"error: AHSG-HT's step waited for the GPU: {found}", file=sys.stderr)
        sys.exit(1)
    return results


if __name__ == "__main__":
    run_main(main)
