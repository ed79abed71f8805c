"""Times training loops in turn: one as in the authors' release (utils.bench.original_loop), number formats, losses.

    python -m utils.bench.training data/cifar10                                 # ResNet-20, ResNet-56, VGG-16-bn
    python -m utils.bench.training data/cifar10 --arch resnet20 --loops original plain amp compile both
    python -m utils.bench.training --dataset synthetic --arch resnet20 --teacher resnet56 --kd logits:KL feature:MSE

With a teacher each loop is timed without it and with each loss. The last column is then what the teacher adds to the
time of an image, as a share of its own forward pass (eval mode, nothing folded or compiled).
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import nn

import data
import models
from AHSG_HT import AHSG_HT
from utils.base.arguments import COUNT, WHOLE
from utils.base.errors import UserError, run_main
from utils.bench.common import benchmark_parser, parse_benchmark, publish, take_turns, train_epoch
from utils.bench.optimizer import HT_RECIPE
from utils.bench.original_loop import PerFilterLoop, PilImages, train_epoch_original
from utils.train.acceleration import Acceleration, accelerate, check_compiler
from utils.train.device import flush_denormals, reuse_freed_memory, seed_everything, usable_cores
from utils.train.distillation import Distillation
from utils.train.engine import cross_entropy
from utils.train.losses import parse_term

NETS = ("resnet20", "resnet56", "vgg16_bn")
LOOPS = {"original": {}, "plain": {}, "amp": dict(amp=True), "compile": dict(compile=True)}
LOOPS["both"] = LOOPS["amp"] | LOOPS["compile"]
FORWARD = "forward pass of the teacher"


def load_images(args: argparse.Namespace) -> data.ImageArrays:
    """The first training images, as many as a round has, where they are trained on; sets `args.classes`."""
    loaded = data.load(args.dataset, args.data_path, seed=1)
    images, args.classes = loaded.train, len(loaded.classes)
    if args.images > len(images):
        raise UserError(f"--images {args.images}: the data set has {len(images)}; give fewer")
    images.images, images.labels = images.images[: args.images].clone(), images.labels[: args.images].clone()
    return images.to(args.device)


def make_loop(
    loop: str, term: str, arch: str, teacher: nn.Module | None, images: data.ImageArrays, args: argparse.Namespace
) -> Callable[[], float]:
    """A loop ready to train epoch after epoch; each call returns the mean loss. `term` is a loss of --kd, or none."""
    seed_everything(1)
    layout = torch.contiguous_format if loop == "original" else torch.channels_last
    net = models.build(arch, num_classes=args.classes).to(args.device, memory_format=layout)
    objective = cross_entropy
    if term != "none":
        objective = Distillation(teacher, net, data.first_images(images, 2).to(args.device), [parse_term(term)])
    if loop == "original":
        workers = dict(num_workers=args.workers, persistent_workers=args.workers > 0)
        loader = data.DataLoader(PilImages(images), args.batch_size, shuffle=True, seed=1, **workers)
        optimizer = PerFilterLoop([*net.parameters()], **HT_RECIPE)
        return lambda: train_epoch_original(net, loader, objective, optimizer, args.device)[0]
    optimizer = AHSG_HT(net.parameters(), **HT_RECIPE)
    objective = accelerate(net, objective, args.device, Acceleration(**LOOPS[loop]), args.batch_size)
    loader = data.DataLoader(images, args.batch_size, shuffle=True, seed=1)

    return lambda: train_epoch(net, loader, objective, optimizer, args.device)


def forward_pass(teacher: nn.Module, images: data.ImageArrays, args: argparse.Namespace) -> Callable[[], None]:
    """The teacher's plain forward pass over the images of a round, and nothing else."""
    inputs = [images.normalise(x) for x, _ in data.DataLoader(images, args.batch_size)]

    @torch.no_grad()
    def run() -> None:
        for x in inputs:
            teacher(x)

    return run


def bench(arch: str, images: data.ImageArrays, args: argparse.Namespace) -> list[dict]:
    """A row per loop and loss: images per second, and what a teacher adds to a step."""
    teacher = models.build(args.teacher, num_classes=args.classes).eval() if args.teacher else None
    calls = {
        (loop, term): make_loop(loop, term, arch, teacher, images, args)
        for loop, term in product(args.loops, ["none", *(args.kd if teacher else [])])
    }
    if teacher:
        teacher.to(args.device, memory_format=torch.channels_last)
        calls[FORWARD, "none"] = forward_pass(teacher, images, args)
    found = take_turns(list(calls.values()), args.device, args.repeats, warm_up=1)
    median = {key: statistics.median(own) for key, own in zip(calls, found, strict=True)}
    rows, first = [], next(iter(median.values()))
    for (loop, term), own in zip(calls, found, strict=True):
        speeds = [args.images / seconds for seconds in own]
        row = {"network": arch, "teacher": args.teacher or "-", "loop": loop, "loss": term}
        row |= {"images/s": statistics.median(speeds), "slowest": min(speeds), "fastest": max(speeds)}
        row["times the first"] = first / median[loop, term]
        added = (median[loop, term] - median[loop, "none"]) / median[FORWARD, "none"] if term != "none" else "-"
        rows.append(row | ({"teacher's share": added} if teacher else {}))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, repeats=5)
    add = parser.add_argument
    add("data_path", nargs="?", default="./data", help="where the images are (./data)")
    add("--dataset", choices=list(data.DATASETS), default="cifar10", help="synthetic needs no files")
    add("--arch", nargs="+", default=NETS, help=f"networks ({' '.join(NETS)})")
    add("--loops", nargs="+", choices=list(LOOPS), default=["original", "plain"], help="original plain")
    add("--teacher", help="a network to distil from, with random weights: only time is measured")
    add("--kd", nargs="+", default=["logits:KL"], metavar="TERM", help="losses, as of the scripts' --kd (logits:KL)")
    add("--images", type=COUNT, default=1280, help="training images a round (1280)")
    add("--batch_size", type=COUNT, default=128, help="images a mini-batch (128)")
    add("--workers", type=WHOLE, default=usable_cores(), help="loader processes of the original loop (one a core)")
    args = parse_benchmark(parser, "training", argv)
    for arch in [*args.arch, args.teacher] if args.teacher else args.arch:
        models.check_arch(arch)
    if any(LOOPS[loop].get("compile") for loop in args.loops):
        try:
            check_compiler(args.device)
        except UserError as error:
            print(f"note: {error}")
            args.loops = [loop for loop in args.loops if not LOOPS[loop].get("compile")]
    flush_denormals()
    reuse_freed_memory()
    images = load_images(args)
    for arch in args.arch:
        rows = bench(arch, images, args)
        note = f"Medians of {args.repeats} rounds of {args.images} images in turn; mini-batches of {args.batch_size}."
        stem = f"training_{args.device.type}_{arch}" + (f"_from_{args.teacher}" if args.teacher else "")
        publish(args, stem, note, rows)


if __name__ == "__main__":
    run_main(main)
