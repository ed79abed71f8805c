"""Is the small network faster? Unpruned against small, in turn: `python -m utils.bench.latency FILE`.

    python -m utils.bench.latency runs/.../checkpoint.resnet56.pth.tar  # a pruned network and its small one
    python -m utils.bench.latency runs/.../small.resnet56.pth.tar       # a small one and the unpruned one of its name
    python -m utils.bench.latency --arch vgg16_bn --HTrate 0.5 --batch_sizes 1 128 --save_path results/speed

Timings of one machine under its present load. With --save_path RUN_FOLDER the comparison shows the run's speed-up.
"""

import argparse
import statistics
from collections.abc import Sequence

import torch
from torch import nn

import models
from AHSG_HT import hard_threshold
from utils.base.arguments import COUNT, KEPT_RATE
from utils.base.errors import UserError, run_main
from utils.bench.common import benchmark_parser, parse_benchmark, publish, take_turns
from utils.bench.optimizer import build_net
from utils.small.counts import multiply_adds
from utils.small.cut import make_small
from utils.train.device import flush_denormals


@torch.no_grad()
def timings(dense: nn.Module, small: nn.Module, shape: tuple[int, ...], args: argparse.Namespace) -> list[dict]:
    """Times both networks on random images (C, H, W). A row per mini-batch size: medians in ms, the distances from
    first to third quartile ("spread"), the speed-up, and the ratio of multiply-adds."""
    nets = [net.eval().to(args.device, memory_format=torch.channels_last) for net in (dense, small)]
    costs = [multiply_adds(net, torch.zeros(1, *shape, device=args.device)) for net in nets]
    rows = []
    for batch in args.batch_sizes:
        x = torch.randn(batch, *shape, device=args.device).contiguous(memory_format=torch.channels_last)
        seconds = take_turns([lambda net=net, x=x: net(x) for net in nets], args.device, args.repeats)
        row = {"device": args.device.type, "batch_size": batch}
        for name, own in zip(("dense", "small"), seconds, strict=True):
            row[f"{name}_ms"] = 1000 * statistics.median(own)
            first, _, third = statistics.quantiles(own * 2, n=4, method="inclusive")  # twice, as it needs two values
            row[f"{name}_spread"] = 1000 * (third - first)
        rows.append(row | {"speed_up": row["dense_ms"] / row["small_ms"], "multiply_add_ratio": costs[0] / costs[1]})
    return rows


@torch.no_grad()
def networks(args: argparse.Namespace) -> tuple[str, nn.Module, nn.Module, tuple[int, ...]]:
    """(arch, unpruned or masked network, small network, shape of an image) of the command line."""
    if args.checkpoint:
        net, checkpoint = models.load_with_checkpoint(args.checkpoint, args.arch)
        arch, shape = checkpoint["arch"], tuple(checkpoint["input_shape"])
        if checkpoint.get("small") is True:
            return arch, models.build_full(checkpoint, arch, args.checkpoint), net, shape
    elif args.arch:
        torch.manual_seed(0)
        arch, net = args.arch, build_net(args.arch)
        shape = (3, 32, 32) if arch in models.REGISTRY else (3, 224, 224)
        try:
            hard_threshold(list(net.parameters()), args.HTrate)
        except ValueError as error:
            raise UserError(f"--HTrate {args.HTrate:g}: {error}") from None
    else:
        raise UserError("nothing to time: name a checkpoint, or a network with --arch")
    return arch, net, make_small(net, torch.zeros(1, *shape), round_to=args.round_to)[0], shape


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, repeats=15)
    parser.add_argument("checkpoint", nargs="?", help="with zeroed filters, or a small network's file")
    parser.add_argument("--arch", help="the network; without a checkpoint: random weights, thresholded once")
    parser.add_argument("--HTrate", type=KEPT_RATE, default=0.7, help="share of filters KEPT with --arch (0.7)")
    parser.add_argument("--round_to", type=COUNT, default=1, help="as in utils.get_small_model (1)")
    parser.add_argument("--batch_sizes", type=COUNT, nargs="+", default=(1, 8, 32, 128), help="images a mini-batch")
    args = parse_benchmark(parser, "latency", argv)
    flush_denormals()
    arch, dense, small, shape = networks(args)
    rows = timings(dense, small, shape, args)
    publish(args, f"latency.{arch}", f"{arch}; medians of {args.repeats} mini-batches in turn.", rows, arch=arch)


if __name__ == "__main__":
    run_main(main)
