"""Times this project's training loop beside one in the style of the authors' release (utils.bench.original_loop).

    python -m utils.bench.training data/cifar10                                    # ResNet-20, ResNet-56, VGG-16-bn
    python -m utils.bench.training data/cifar10 --arch resnet20 --loops original this amp compile both
    python -m utils.bench.training --dataset synthetic --arch resnet20 --teacher resnet56

Each loop has a process of its own, with its own allocator, threads and workers, and sleeps while another has its turn.
They take turns round by round. A first round of each (compilation, start of workers) is not counted.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial

import torch

import data
import models
from AHSG_HT import AHSG_HT
from utils.base.arguments import COUNT, WHOLE
from utils.base.errors import UserError, run_main
from utils.bench.optimizer import HT_RECIPE
from utils.bench.original_loop import PerFilterLoop, PilImages, train_epoch_original
from utils.bench.report import make_parser, parse, publish, take_turns
from utils.train.acceleration import Acceleration, accelerate
from utils.train.device import flush_denormals, reuse_freed_memory, seed_everything, usable_cores
from utils.train.distillation import Distillation
from utils.train.engine import RunningMeans, train_step
from utils.train.losses import parse_term
from utils.train.objective import cross_entropy

NETS = ("resnet20", "resnet56", "vgg16_bn")
# What is compared, and the options of this project's loop behind each name.
LOOPS = {"original": {}, "this": {}, "amp": dict(amp=True), "compile": dict(compile=True)}
LOOPS["both"] = LOOPS["amp"] | LOOPS["compile"]
# In a loop's own process: the loop, once it is made.
_made: list[Callable] = []


def make_loop(name: str, arch: str, args: argparse.Namespace) -> Callable[[], tuple[float, ...]]:
    """One of LOOPS, ready to train epoch after epoch; each call returns mean loss, top-1 and top-5 accuracy.

    A teacher (args.teacher) is used by every loop in the same way.
    """
    original, on_gpu = name == "original", args.device.type == "cuda"
    seed_everything(1)
    loaded = data.load(args.dataset, args.data_path, seed=1)
    images, classes = loaded.train, len(loaded.classes)
    if args.images > len(images):
        raise UserError(f"--images {args.images}: the data set has {len(images)}; give fewer")
    images.images, images.labels = images.images[: args.images].clone(), images.labels[: args.images].clone()
    layout = torch.contiguous_format if original else torch.channels_last
    net = models.build(arch, num_classes=classes).to(args.device, memory_format=layout)
    objective = cross_entropy
    if args.teacher:
        teacher = models.build(args.teacher, num_classes=classes).to(args.device, memory_format=layout)
        sample = data.first_images(images, 2).to(args.device)
        objective = Distillation(teacher, net, sample, [parse_term("feature:MSE")])
    # On a GPU this loop keeps the images there and needs no workers.
    workers = 0 if on_gpu and not original else args.workers
    options = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=original and on_gpu)
    images = PilImages(images) if original else images.to(args.device)
    loader = data.DataLoader(images, args.batch_size, shuffle=True, seed=1, **options)
    if original:
        optimizer = PerFilterLoop(list(net.parameters()), **HT_RECIPE)
        return lambda: train_epoch_original(net, loader, objective, optimizer, args.device)
    optimizer = AHSG_HT(net.parameters(), **HT_RECIPE)
    objective = accelerate(net, objective, args.device, Acceleration(**LOOPS[name]), args.batch_size)

    def train_epoch() -> tuple[float, ...]:
        net.train()
        means, sizes = RunningMeans(args.device), loader.sizes()
        for t, (x, y) in enumerate(loader):
            options = dict(device=args.device, normalise=images.normalise, size=sizes[t])
            train_step(objective, net, x, y, optimizer, means, **options)
        result = means.read()
        return result.loss, result.top1, result.top5

    return train_epoch


def train_round(name: str, arch: str, args: argparse.Namespace, start_method: str) -> None:
    """Trains one epoch in the loop's own process; the first call makes the loop."""
    if not _made:
        # A spawned process spawns by default; the loader's workers are to start as in a script.
        multiprocessing.set_start_method(start_method, force=True)
        if name != "original":
            flush_denormals()
            reuse_freed_memory()
        _made.append(make_loop(name, arch, args))
    _made[0]()
    if args.device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument("data_path", nargs="?", default="./data", help="where the images are (./data)")
    parser.add_argument("--dataset", choices=list(data.DATASETS), default="cifar10", help="synthetic needs no files")
    parser.add_argument("--arch", nargs="+", default=NETS, help=f"networks ({' '.join(NETS)})")
    parser.add_argument("--teacher", help="distil from this network, with random weights: only time is measured")
    parser.add_argument("--loops", nargs="+", choices=list(LOOPS), default=["original", "this"], help="original this")
    parser.add_argument("--images", type=COUNT, default=1280, help="training images a round (1280)")
    parser.add_argument("--batch_size", type=COUNT, default=128, help="images a mini-batch (128)")
    parser.add_argument("--workers", type=WHOLE, default=usable_cores(), help="loader processes a loop (one a core)")
    args = parse(parser, "training", argv)
    for arch in [*args.arch, args.teacher] if args.teacher else args.arch:
        models.check_arch(arch)
    for arch in args.arch:
        with ExitStack() as stack:
            submits = []
            for name in args.loops:
                pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
                submits.append(partial(pool.submit, train_round, name, arch, args, multiprocessing.get_start_method()))
            # The first rounds, which are not counted, may run at the same time.
            for first in [submit() for submit in submits]:
                first.result()
            calls = [lambda submit=submit: submit().result() for submit in submits]
            seconds = take_turns(calls, torch.device("cpu"), args.repeats, warm_up=0)
        speeds = [[args.images / second for second in own] for own in seconds]
        base = statistics.median(speeds[0])
        rows = []
        for name, own in zip(args.loops, speeds, strict=True):
            median = statistics.median(own)
            row = {"network": arch, "teacher": args.teacher or "-", "loop": name, "images/s": median}
            rows.append(row | {"slowest": min(own), "fastest": max(own), f"times {args.loops[0]}": median / base})
        note = f"Medians of {args.repeats} rounds of {args.images} images in turn; mini-batches of {args.batch_size}."
        stem = f"training_{args.device.type}_{arch}" + (f"_from_{args.teacher}" if args.teacher else "")
        publish(args, stem, note, rows)


if __name__ == "__main__":
    run_main(main)
