"""What cutting a network while it trains saves: `python -m utils.bench.shrinking [--arch ...] [--save_path FOLDER]`.

Gradual pruning by the defaults of prune_gradual, on random images: the network cut after each epoch (`--shrink on`)
and one that keeps its removed filters as zeros (off), epoch by epoch in turn. Removals and cuts are part of the time.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from itertools import count

import torch

import data
import models
from AHSG_HT import AHSG_HT
from utils.base.arguments import COUNT, SHARE
from utils.base.errors import UserError, run_main
from utils.bench.common import benchmark_parser, parse_benchmark, publish, take_turns, train_epoch
from utils.bench.optimizer import SGD_RECIPE
from utils.prune.gradual import GradualPruning
from utils.train.device import flush_denormals, reuse_freed_memory, seed_everything
from utils.train.engine import cross_entropy

NETS = ("resnet20", "vgg16_bn")
BEGIN, END = 0.2, 0.6


def make_run(arch: str, shrink: bool, args: argparse.Namespace) -> Callable[[], None]:
    """A run whose next epoch each call trains."""
    seed_everything(1)
    pixels = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8)
    images = data.ImageArrays(pixels, torch.arange(args.images) % 10, [0.5] * 3, [0.25] * 3, augment=True)
    loader = data.DataLoader(images.to(args.device), args.batch_size, shuffle=True, seed=1)
    net = models.build(arch).to(args.device, memory_format=torch.channels_last).train()
    optimizer = AHSG_HT(net.parameters(), **SGD_RECIPE)
    options = dict(steps=args.repeats * len(loader), begin=BEGIN, end=END, macs_cut=args.macs_cut, shrink=shrink)
    options |= dict(round_to=args.round_to)
    pruning = GradualPruning(net, optimizer, data.first_images(images, 2).to(args.device), **options)
    epochs = count()

    def train_next() -> None:
        first = next(epochs) * len(loader)
        train_epoch(net, loader, cross_entropy, optimizer, args.device, lambda t: pruning.before_step(first + t))
        pruning.cut(first + len(loader))

    return train_next


def bench(arch: str, args: argparse.Namespace) -> list[dict]:
    """A row for the masked run and one for the cut one."""
    shrinks = {"masked": False, "cut": True}
    calls = [make_run(arch, shrink, args) for shrink in shrinks.values()]
    seconds, rows = take_turns(calls, args.device, args.repeats, warm_up=0), []
    for name, own in zip(shrinks, seconds, strict=True):
        # Whole epochs before the first removal, and after the cut that follows the last one.
        ends = own[: int(BEGIN * args.repeats)], own[int(END * args.repeats) + 1 :]
        before, after = (args.images / statistics.median(epochs) for epochs in ends)
        row = {
            "network": arch,
            "run": name,
            "images/s before": before,
            "after": after,
            "after / before": after / before,
        }
        rows.append(row | {"whole run (s)": sum(own), "of the masked run's": sum(own) / sum(seconds[0])})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, repeats=15)
    parser.add_argument("--arch", nargs="+", default=NETS, help=f"networks ({' '.join(NETS)})")
    parser.add_argument("--macs_cut", type=SHARE, default=0.5, help="share of the multiply-adds to remove (0.5)")
    parser.add_argument("--round_to", type=COUNT, default=1, help="widths are multiples of it (1)")
    parser.add_argument("--images", type=COUNT, default=1280, help="training images an epoch (1280)")
    parser.add_argument("--batch_size", type=COUNT, default=128, help="images a mini-batch (128)")
    args = parse_benchmark(parser, "shrinking", argv)
    if args.repeats < 5:
        raise UserError(f"--repeats {args.repeats} are the epochs of a run, of which 5 are needed; give more")
    for arch in args.arch:
        models.check_arch(arch)
    flush_denormals()
    reuse_freed_memory()
    rows = [row for arch in args.arch for row in bench(arch, args)]
    note = f"Runs of {args.repeats} epochs of {args.images} images in turn; medians over the epochs before {BEGIN:.0%} "
    note += f"and after {END:.0%} of them; mini-batches of {args.batch_size}; {args.macs_cut:.0%} fewer multiply-adds, "
    note += f"widths multiples of {args.round_to}."
    publish(args, f"shrinking_{args.device.type}", note, rows)


if __name__ == "__main__":
    run_main(main)
