"""Is the small network faster? Dense against small, interleaved in one run: `python -m utils.bench.latency FILE`.

    python -m utils.bench.latency runs/.../checkpoint.resnet56.pth.tar                 # a pruned network and its small one
    python -m utils.bench.latency runs/.../small.resnet56.pth.tar                      # a small network and the dense one of its name
    python -m utils.bench.latency --arch vgg16_bn --HTrate 0.7 --layers                # untrained weights, thresholded once; where the time goes
    python -m utils.bench.latency --arch resnet56 --HTrate 0.5 --batch_sizes 1 128 --device cuda --save_path speed

Timings of one machine under its present load. The networks take turns, so that what disturbs one disturbs the other; figures are medians.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import models
from AHSG_HT import hard_threshold
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError, run_main
from utils.base.files import replace_file
from utils.small.counts import multiply_adds
from utils.small.cut import make_small
from utils.small.trace import layer_name, run, trace
from utils.train.device import describe_machine, flush_denormals
from utils.train.options import OneLineParser, kept_rate
from utils.train.options import count as whole_number
from utils.train.run_folder import check_writable

BATCH_SIZES = (1, 8, 32, 128)
REPEATS, WARM_UP = 15, 3
# Share of the multiply-add ratio that counts as its speed-up.
EXPECTED = 0.8


@dataclass(frozen=True)
class Timing:
    """Seconds per mini-batch of the dense and of the small network.

    Attributes:
        dense, small: medians.
        dense_spread, small_spread: from the first to the third quartile.
        ratio: multiply-adds of the dense network over those of the small one.
    """

    device: str
    batch_size: int
    dense: float
    dense_spread: float
    small: float
    small_spread: float
    ratio: float

    @property
    def speed_up(self) -> float:
        return self.dense / self.small


def timings(
    dense: nn.Module,
    small: nn.Module,
    shape: tuple[int, ...],
    device: torch.device,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    repeats: int = REPEATS,
) -> list[Timing]:
    """Times both networks on random images, taking turns, after a warm-up.

    Args:
        dense, small: in eval mode; copies are moved to the device.
        shape: (C, H, W) of an image.
        repeats: measurements per network and batch size.
    """
    nets = [dense.to(device, memory_format=torch.channels_last), small.to(device, memory_format=torch.channels_last)]
    costs = [sum(multiply_adds(net, torch.zeros(1, *shape, device=device)).values()) for net in nets]
    found = []
    for batch in batch_sizes:
        x = torch.randn(batch, *shape, device=device).contiguous(memory_format=torch.channels_last)
        seconds = take_turns([lambda net=net, x=x: net(x) for net in nets], device, repeats)
        (a, a_spread), (b, b_spread) = (median_and_spread(s) for s in seconds)
        found.append(Timing(device.type, batch, a, a_spread, b, b_spread, costs[0] / costs[1]))
    return found


@torch.no_grad()
def take_turns(calls: list[Callable[[], Tensor]], device: torch.device, repeats: int) -> list[list[float]]:
    """Seconds of every call, `repeats` times, one after the other in turn. Waits for a GPU before each reading of the clock."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(-WARM_UP, repeats):
        for call, own in zip(calls, seconds, strict=True):
            wait()
            begin = time.perf_counter()
            call()
            wait()
            if turn >= 0:
                own.append(time.perf_counter() - begin)
    return seconds


def median_and_spread(seconds: list[float]) -> tuple[float, float]:
    """Median, and the distance between first and third quartile."""
    if len(seconds) < 2:
        return seconds[0], 0.0
    first, middle, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return middle, third - first


def verdict(timing: Timing, layers: list[tuple[str, float, float]] | None = None) -> str:
    """One sentence on the speed-up at one batch size; it says why where there is none.

    Args:
        timing: the measurement.
        layers: (operation, dense seconds, small seconds), where they were measured.
    """
    head = f"batch {timing.batch_size} on {timing.device}: {timing.speed_up:.2f} times as fast with {timing.ratio:.2f} times fewer multiply-adds"
    if timing.ratio < 1.02:
        return f"{head}: the small network does the same work, nothing was removed."
    if timing.dense_spread + timing.small_spread > abs(timing.dense - timing.small):
        return f"{head}: the difference is within the spread of the measurements; repeat it on an idle machine."
    if timing.speed_up >= EXPECTED * timing.ratio:
        return f"{head}: as expected."
    rest = other_share(layers) if layers else None
    if rest is not None and rest > 0.4:
        return f"{head}: {100 * rest:.0f} % of the small network's time goes into other operations than convolutions and linear layers, which multiply-adds do not count."
    if timing.batch_size <= 8 or timing.device == "cuda":
        return f"{head}: layers this small take a time of their own, for starting them and moving data, that hardly depends on their width; larger batches or images gain more."
    return f"{head}: convolutions lose efficiency as they get narrower, and the other operations are not counted; --layers shows where, --round_to 8 may help."


def other_share(layers: list[tuple[str, float, float]]) -> float:
    """Share of the small network's time that is not in convolutions and linear layers."""
    total = sum(small for _, _, small in layers)
    return sum(small for kind, _, small in layers if not kind.startswith(("Conv", "Linear"))) / total


@torch.no_grad()
def layer_timings(
    dense: nn.Module, small: nn.Module, x: Tensor, repeats: int = REPEATS
) -> list[tuple[str, str, float, float]]:
    """(name, kind of operation, dense seconds, small seconds) of every operation, medians of interleaved runs on the CPU or GPU of x."""
    graphs = [trace(net, x) for net in (dense, small)]
    wait = torch.cuda.synchronize if x.device.type == "cuda" else lambda: None
    seconds: list[dict] = [{}, {}]
    names = {}
    for turn in range(-WARM_UP, repeats):
        for graph, own in zip(graphs, seconds, strict=True):
            wait()
            begin = time.perf_counter()
            for node, _ in run(graph, x):
                wait()
                now = time.perf_counter()
                if turn >= 0:
                    own.setdefault(node.name, []).append(now - begin)
                    kind = type(graph.get_submodule(node.target)).__name__ if node.op == "call_module" else ""
                    names[node.name] = (layer_name(node), kind or layer_name(node).split(" ")[0])
                begin = time.perf_counter()
    return [
        (*names[name], statistics.median(times), statistics.median(seconds[1][name]))
        for name, times in seconds[0].items()
        if names[name][1] not in ("x", "output")
    ]


def format_timings(found: list[Timing]) -> str:
    """A table, milliseconds per mini-batch."""
    lines = ["device  batch   dense ms  spread   small ms  spread  speed-up  of multiply-adds"]
    for t in found:
        a, a_spread, b, b_spread = (1000 * s for s in (t.dense, t.dense_spread, t.small, t.small_spread))
        lines.append(
            f"{t.device:6}  {t.batch_size:5d}  {a:9.2f}  {a_spread:6.2f}  {b:9.2f}  {b_spread:6.2f}  {t.speed_up:7.2f}x  {100 * t.speed_up / t.ratio:8.0f} %"
        )
    return "\n".join(lines)


def format_layers(layers: list[tuple[str, str, float, float]], costs: tuple[dict, dict]) -> str:
    """A table of operations, those that take the small network longest first, and sums by kind."""
    lines = [f"{'operation':40}  {'dense ms':>9}  {'small ms':>9}  speed-up  multiply-add ratio"]
    for name, _, a, b in sorted(layers, key=lambda row: -row[3])[:25]:
        ratio = f"{costs[0][name] / costs[1][name]:.2f}" if costs[1].get(name) else "-"
        lines.append(f"{name:40}  {1000 * a:9.3f}  {1000 * b:9.3f}  {a / b:7.2f}x  {ratio:>18}")
    kinds = dict.fromkeys(kind for _, kind, _, _ in layers)
    for kind in kinds:
        a, b = (sum(row[i] for row in layers if row[1] == kind) for i in (2, 3))
        lines.append(f"{'all ' + kind:40}  {1000 * a:9.3f}  {1000 * b:9.3f}  {a / b:7.2f}x")
    return "\n".join(lines)


def draw(found: list[Timing], title: str, path: Path) -> None:
    """Writes a PNG: a pair of bars per batch size, milliseconds per image, with the speed-up above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(max(6, 1.8 + 1.5 * len(found)), 4), layout="constrained")
    for offset, name, color in ((-0.2, "dense", "#9aa5b1"), (0.2, "small", "#2b6cb0")):
        heights = [1000 * getattr(t, name) / t.batch_size for t in found]
        spreads = [1000 * getattr(t, f"{name}_spread") / t.batch_size / 2 for t in found]
        axes.bar(
            [i + offset for i in range(len(found))], heights, 0.4, yerr=spreads, capsize=3, label=name, color=color
        )
    for i, t in enumerate(found):
        top = 1000 * max(t.dense + t.dense_spread / 2, t.small + t.small_spread / 2) / t.batch_size
        axes.annotate(f"{t.speed_up:.2f}x", (i, top), xytext=(0, 3), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(found)), [f"batch {t.batch_size}" for t in found])
    axes.set(ylabel="ms per image (median, quartiles)", title=title)
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    plt.close(figure)
    replace_file(path, picture.getvalue())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="with zeroed filters, or a small network's file; without one, --arch is thresholded once",
    )
    parser.add_argument("--arch", help="the network (default: the checkpoint's)")
    parser.add_argument(
        "--HTrate", type=kept_rate, default=0.7, help="share of filters KEPT, without a checkpoint (0.7)"
    )
    parser.add_argument("--round_to", type=whole_number, default=1, help="as in utils.get_small_model")
    parser.add_argument(
        "--batch_sizes", type=whole_number, nargs="+", default=BATCH_SIZES, help="images per mini-batch"
    )
    parser.add_argument("--repeats", type=whole_number, default=REPEATS, help=f"measurements each ({REPEATS})")
    parser.add_argument("--threads", type=whole_number, help="CPU threads (torch's default)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", action="store_true", help="also time every operation, at the largest batch size")
    parser.add_argument("--save_path", help="folder for latency.<arch>.json and .png")
    return parser.parse_args(argv)


def networks(args: argparse.Namespace) -> tuple[str, nn.Module, nn.Module, tuple[int, ...]]:
    """(arch, dense network, small network, shape of an image) of the command line."""
    arch, net, shape, narrow = read_network(args)
    if narrow:
        dense = models.build(arch) if arch in models.REGISTRY else models.build_torchvision(arch, 1000)
        return arch, dense.eval(), net, shape
    return arch, net, make_small(net, torch.zeros(1, *shape), round_to=args.round_to)[0], shape


def read_network(args: argparse.Namespace) -> tuple[str, nn.Module, tuple[int, ...], bool]:
    """(arch, network, shape of an image, whether the network is a small one) of the command line."""
    if args.checkpoint:
        arch, net = models.load_with_name(args.checkpoint, args.arch)
        checkpoint = checkpoints.read(args.checkpoint)
        shape = tuple(checkpoint.get("input_shape", models.input_shape(arch, checkpoint)))
        return arch, net.eval(), shape, checkpoint.get("small") is True
    if not args.arch:
        raise UserError("nothing to time: name a checkpoint, or a network with --arch")
    torch.manual_seed(0)
    net = models.build(args.arch) if args.arch in models.REGISTRY else models.build_torchvision(args.arch, 1000)
    try:
        with torch.no_grad():
            hard_threshold(list(net.parameters()), args.HTrate)
    except ValueError:
        raise UserError(
            f"--HTrate {args.HTrate:g} keeps no filter of some layer of {args.arch}; use a larger one"
        ) from None
    return args.arch, net.eval(), models.input_shape(args.arch), False


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA GPU here; use --device cpu")
    if args.save_path:
        check_writable(Path(args.save_path))
    if args.threads:
        torch.set_num_threads(args.threads)
    flush_denormals()
    arch, dense, small, shape = networks(args)
    device = torch.device(args.device)
    found = timings(dense, small, shape, device, tuple(args.batch_sizes), args.repeats)
    machine = describe_machine(device)
    where = machine["gpu"] or f"{torch.get_num_threads()} CPU threads"
    title = f"{arch}: {found[0].ratio:.2f} times fewer multiply-adds; {where}"
    print(f"{title}\n{format_timings(found)}")
    layers = None
    if args.layers:
        x = torch.randn(max(args.batch_sizes), *shape, device=device).contiguous(memory_format=torch.channels_last)
        layers = layer_timings(dense, small, x, args.repeats)
        costs = tuple(multiply_adds(net, x[:1]) for net in (dense, small))
        print(format_layers(layers, costs))
    for timing in found:
        at_largest = layers if timing.batch_size == max(args.batch_sizes) else None
        print(verdict(timing, [(kind, a, b) for _, kind, a, b in at_largest] if at_largest else None))
    if args.save_path:
        folder = Path(args.save_path)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{**asdict(t), "speed_up": t.speed_up} for t in found]
        content = {"arch": arch, "machine": machine, "timings": rows, "layers": layers}
        replace_file(folder / f"latency.{arch}.json", (json.dumps(content, indent=1) + "\n").encode())
        draw(found, title, folder / f"latency.{arch}.png")
        print(f"written: {folder / f'latency.{arch}.json'} and .png")


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
