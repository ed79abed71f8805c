"""How training scales: images per second with one and with several processes here, and a model for GPUs that are not here.

    python -m utils.bench.scaling --processes 1 2                      # measures on this machine's CPU cores, a thread per process
    python -m utils.bench.scaling --model_only --gpu_images_per_s 1200 # the model alone, with a rate of your own GPU

Measured is the training step itself (engine.train_step with AHSG-HT) on random images in memory: as many images per mini-batch
whatever the number of processes, as in training, where the schedule fixes the whole mini-batch. The model is arithmetic on
assumptions that are printed with it; nothing of it was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.multiprocessing as mp

import models
from AHSG_HT import AHSG_HT
from utils.base.errors import run_main
from utils.train import distributed
from utils.train.device import describe_versions, flush_denormals
from utils.train.engine import RunningMeans, train_step
from utils.train.objective import cross_entropy
from utils.train.options import OneLineParser, count, positive

# (network, height and width, images per mini-batch): what a CPU core gets through in a second or so.
CASES = (("resnet20", 32, 128), ("resnet18", 112, 32))


@dataclass(frozen=True)
class Machine:
    """What the model assumes of the GPUs and of the network between them.

    Attributes:
        images_per_s: of one GPU that trains ResNet-50 at 224x224 with large shares.
        half_rate_share: images per GPU at which it reaches half that rate: kernels are too short for small shares.
        node: GPUs per machine.
        node_bytes_per_s, network_bytes_per_s: all-reduce bandwidth per GPU within a machine and between machines.
        latency_s: of a message; an all-reduce takes 2*log2(GPUs) of them in turn.
        buckets: pieces that a gradient is sent in; all but the last travel during the backward pass.
        backward: its share of the computation.
        optimizer_s: a step of AHSG-HT, which every GPU does in full.
    """

    images_per_s: float = 1200.0
    half_rate_share: float = 8.0
    node: int = 8
    node_bytes_per_s: float = 200e9
    network_bytes_per_s: float = 20e9
    latency_s: float = 15e-6
    buckets: int = 5
    backward: float = 2 / 3
    optimizer_s: float = 2e-3


def predict(machine: Machine, gpus: int, batch: int, parameters: int) -> dict:
    """Seconds of one step and what they are made of, for a mini-batch of `batch` images on `gpus` GPUs; gradients are float32."""
    share = math.ceil(batch / gpus)
    compute = (share + machine.half_rate_share) / machine.images_per_s
    size = 4 * parameters
    slowest = machine.node_bytes_per_s if gpus <= machine.node else machine.network_bytes_per_s
    # Ring: every GPU sends and receives 2*(G-1)/G of the gradient.
    exchange = 0.0
    if gpus > 1:
        exchange = 2 * (gpus - 1) / gpus * size / slowest + machine.buckets * 2 * math.log2(gpus) * machine.latency_s
    last = exchange / machine.buckets
    exposed = max(last, exchange - machine.backward * compute) if gpus > 1 else 0.0
    step = compute + exposed + machine.optimizer_s
    return {
        "gpus": gpus,
        "batch": batch,
        "share": batch / gpus,
        "bytes_per_step": size,
        "compute_s": compute,
        "exchange_s": exchange,
        "exposed_s": exposed,
        "optimizer_s": machine.optimizer_s,
        "step_s": step,
        "images_per_s": batch / step,
    }


def model_table(machine: Machine, parameters: int, gpus=(1, 8, 64, 512), batches=(256, 512, 8192, 65536)) -> list[dict]:
    rows = []
    for batch in batches:
        alone = predict(machine, 1, batch, parameters)["images_per_s"]
        for number in gpus:
            row = predict(machine, number, batch, parameters)
            rows.append(
                {**row, "speed_up": row["images_per_s"] / alone, "hours": 100 * 1_281_167 / row["images_per_s"] / 3600}
            )
    return rows


def build(arch: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build(arch) if arch in models.REGISTRY else models.build_torchvision(arch, 1000)


def one_process(
    rank: int, processes: int, port: int, case: tuple[str, int, int], steps: int, folder: str, exchanges_gradients: bool
) -> None:
    """Trains `steps` steps as one of several processes; rank 0 writes the seconds of each."""
    torch.set_num_threads(1)
    flush_denormals()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update(
        {name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with distributed.process_group(0, 600) as device:
        arch, size, batch = case
        net = build(arch).to(memory_format=torch.channels_last).train()
        share = len(range(rank, batch, processes))
        generator = torch.Generator().manual_seed(rank)
        images = torch.randn(share, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (share,), generator=generator)
        optimizer = AHSG_HT(net.parameters(), lr=0.01, momentum=0.9, v=0.1, HTrate=0.7)
        objective = distributed.ParallelObjective(net, cross_entropy, device) if exchanges_gradients else cross_entropy
        means, seconds = RunningMeans(device), []
        for t in range(steps + 2):
            begin = time.perf_counter()
            train_step(net, images, labels, objective, optimizer, means, t=t, sizes=[batch] * (steps + 2), epoch=0)
            seconds.append(time.perf_counter() - begin)
        # What the exchange costs by itself, with nothing to hide behind.
        flat, exchanges = torch.cat([p.detach().flatten() for p in net.parameters()]), []
        for _ in range(5 if processes > 1 else 0):
            begin = time.perf_counter()
            distributed.sum_over_ranks(flat)
            exchanges.append(time.perf_counter() - begin)
        if rank == 0:
            report = {"seconds": seconds[2:], "exchange": exchanges, "parameters": flat.numel()}
            Path(folder, "report.json").write_text(json.dumps(report))


def measure(case: tuple[str, int, int], processes: int, steps: int, exchanges_gradients: bool) -> dict:
    """Median seconds of a step. Without an exchange the processes only run side by side: what the machine itself allows."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(one_process, (processes, port, case, steps, folder, exchanges_gradients), nprocs=processes)
        report = json.loads(Path(folder, "report.json").read_text())
    step = statistics.median(report["seconds"])
    return {
        "arch": case[0],
        "image_size": case[1],
        "batch": case[2],
        "processes": processes,
        "exchanges_gradients": exchanges_gradients,
        "step_s": step,
        "step_s_all": report["seconds"],
        "exchange_s": statistics.median(report["exchange"]) if report["exchange"] else 0.0,
        "bytes_per_step": 4 * report["parameters"],
        "images_per_s": case[2] / step,
    }


def apart(row: dict) -> str:
    return "" if row["exchanges_gradients"] or row["processes"] == 1 else ", no exchange"


def format_measured(rows: list[dict]) -> str:
    lines = [
        "| network | images | mini-batch | processes | step, median | images/s | ratio | gradient | its exchange alone |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    alone = {row["arch"]: row["images_per_s"] for row in rows if row["processes"] == 1}
    for row in rows:
        ratio = f"{row['images_per_s'] / alone[row['arch']]:.2f}" if row["arch"] in alone else ""
        lines.append(
            f"| {row['arch']} | {row['image_size']}x{row['image_size']} | {row['batch']} | {row['processes']}{apart(row)} | {1000 * row['step_s']:.0f} ms | "
            f"{row['images_per_s']:.1f} | {ratio} | {row['bytes_per_step'] / 1e6:.1f} MB | {1000 * row['exchange_s']:.1f} ms |"
        )
    return "\n".join(lines)


def format_model(machine: Machine, rows: list[dict]) -> str:
    assumed = ", ".join(f"{name}={value:g}" for name, value in asdict(machine).items())
    lines = [
        "ResNet-50 at 224x224, float32 gradients. COMPUTED FROM ASSUMPTIONS, NOT MEASURED: " + assumed,
        "",
        "| mini-batch | GPUs | share | compute | exchange | of it not hidden | optimizer | images/s | speed-up | 100 epochs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = [f"{1000 * row[key]:.1f} ms" for key in ("compute_s", "exchange_s", "exposed_s", "optimizer_s")]
        lines.append(
            f"| {row['batch']} | {row['gpus']} | {row['share']:g} | {' | '.join(times)} | {row['images_per_s']:,.0f} | {row['speed_up']:.1f} | "
            f"{row['hours']:.1f} h |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--processes", type=count, nargs="+", default=[1, 2], help="numbers of processes (1 2)")
    parser.add_argument("--steps", type=count, default=9, help="steps that are timed, after two that are not (9)")
    parser.add_argument("--model_only", action="store_true", help="measure nothing")
    parser.add_argument(
        "--gpu_images_per_s", type=positive, default=Machine.images_per_s, help="ResNet-50 on one GPU (1200)"
    )
    parser.add_argument("--save_path", help="folder for scaling.json and table.md")
    args = parser.parse_args(argv)
    machine = Machine(images_per_s=args.gpu_images_per_s)
    rows = []
    for case in () if args.model_only else CASES:
        for processes in args.processes:
            for exchanges_gradients in (True, False) if processes > 1 else (False,):
                rows.append(measure(case, processes, args.steps, exchanges_gradients))
    parameters = sum(p.numel() for p in build("resnet50").parameters())
    model = model_table(machine, parameters)
    text = "\n\n".join([*([format_measured(rows)] if rows else []), format_model(machine, model)])
    print(text)
    if args.save_path:
        folder = Path(args.save_path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(text + "\n")
        found = {"measured": rows, "assumed": asdict(machine), "model": model, "versions": describe_versions()}
        (folder / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
