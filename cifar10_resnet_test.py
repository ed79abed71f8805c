"""Trains and prunes CIFAR networks with AHSG-HT.

    python cifar10_resnet_test.py --k 0.1                             # prune ResNet-20 on CIFAR-10: 30 % of the filters, 200 epochs
    python cifar10_resnet_test.py DATA --recipe baseline              # the unpruned network, plain SGD
    python cifar10_resnet_test.py DATA --arch vgg16_bn --HTrate 0.6
    python cifar10_resnet_test.py --recipe finetune --resume runs/.../checkpoint.resnet20.pth.tar
    python cifar10_resnet_test.py DATA --evaluate --resume best.resnet20.pth.tar

DATA holds CIFAR as torchvision stores it (it is downloaded where absent) or an image tree train/<class>/*, test/<class>/*.
Everything a run leaves behind is in its --save_path: log, metrics.csv, curves.png, results.json, checkpoints.
"""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path

import torch

import data
import models
from AHSG_HT import AHSG_HT
from utils import checkpoint as checkpoints
from utils.device import choose_device, seed_everything
from utils.engine import evaluate
from utils.errors import UserError, run_main
from utils.objective import cross_entropy
from utils.options import OneLineParser, add_training_options, resolve_recipe
from utils.plan import format_plan, make_plan
from utils.run_folder import RunFolder, check_writable, new_run_path
from utils.training import Training, format_pass

EVALUATION_BATCH = 500


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data_path", nargs="?", default="./data", help="where the images are, or go (./data)")
    group = parser.add_argument_group("data and network")
    group.add_argument(
        "--dataset", choices=data.DATASETS, default="cifar10", help="folder: an image tree of your own (cifar10)"
    )
    group.add_argument(
        "--arch",
        "-a",
        choices=models.REGISTRY,
        default="resnet20",
        metavar="ARCH",
        help=f"network: {', '.join(models.REGISTRY)}",
    )
    add_training_options(parser)
    return resolve_recipe(parser.parse_args(argv))


def build_optimizer(net: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Plain SGD where nothing is thresholded and no ball rolls, else AHSG_HT."""
    nesterov = args.momentum > 0
    common = dict(lr=args.learning_rate, momentum=args.momentum, weight_decay=args.decay, nesterov=nesterov)
    if args.HTrate == 1 and args.v == 0:
        return torch.optim.SGD(net.parameters(), **common)
    return AHSG_HT(net.parameters(), v=args.v, HTrate=args.HTrate, heavy_ball=args.heavy_ball, norm=args.norm, **common)


def build_loaders(images: data.Data, args: argparse.Namespace, device: torch.device):
    if args.batch_size > len(images.train):
        raise UserError(
            f"--batch_size {args.batch_size} is more than the {len(images.train)} training images; use a smaller one"
        )
    if device.type == "cuda":
        # The images live on the GPU, where worker processes are of no use.
        images.train.to(device), images.test.to(device)
        args.workers = 0
    common = dict(num_workers=args.workers, persistent_workers=args.workers > 0)
    try:
        train_loader = data.DataLoader(
            images.train,
            args.batch_size,
            args.k,
            shuffle=True,
            growth=args.growth,
            restart=not args.no_restart,
            max_batch_size=args.max_batch_size,
            seed=args.manualSeed,
            **common,
        )
    except ValueError as error:
        raise UserError(f"--k: {error}" if "k must be" in str(error) else str(error)) from None
    return train_loader, data.DataLoader(images.test, EVALUATION_BATCH, **common)


def describe_schedule(sizes: list[int]) -> str:
    """The mini-batch schedule of an epoch: its sizes, and how many of each where they repeat."""
    runs = [(size, len(list(same))) for size, same in groupby(sizes)]
    parts = [f"{size} x{n}" if n > 1 else f"{size}" for size, n in runs]
    if len(parts) > 12:
        parts = [*parts[:4], "...", *parts[-4:]]
    return f"{len(sizes)} mini-batches in the first epoch: {', '.join(parts)} ({sum(sizes)} images)"


def load_checkpoint(args: argparse.Namespace) -> dict | None:
    """The checkpoint of --resume, checked against --arch."""
    if not args.resume:
        return None
    checkpoint = checkpoints.read(args.resume)
    arch = checkpoint.get("arch", args.arch)
    if arch != args.arch:
        raise UserError(f"'{args.resume}' is a checkpoint of {arch}, not of {args.arch}; use --arch {arch}")
    return checkpoint


def choose_folder(args: argparse.Namespace) -> Path:
    """A new run's folder, or for a run that is continued the folder of its checkpoint."""
    if args.resume and args.recipe != "finetune":
        own = Path(args.resume).parent
        path = Path(args.save_path) if args.save_path else own
        if path.resolve() != own.resolve():
            return new_run_path(args.save_path, "")
        check_writable(path)
        return path
    rate = "" if args.HTrate == 1 else f"-HT{args.HTrate:g}"
    return new_run_path(args.save_path, f"{args.recipe}-{args.dataset}-{args.arch}{rate}-seed{args.manualSeed}")


def main() -> None:
    args = parse_args()
    checkpoint = load_checkpoint(args)
    folder = None if args.evaluate else choose_folder(args)
    device = choose_device(args.ngpu)
    seed_everything(args.manualSeed)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if args.dataset == "synthetic":
        print(
            "SYNTHETIC DATA: images made by code, to try the software. NO FIGURE OF THIS RUN SAYS ANYTHING ABOUT CIFAR."
        )

    images = data.load(args.dataset, args.data_path, seed=args.manualSeed)
    num_classes = len(images.classes)
    options = models.infer_options(args.arch, checkpoint["state_dict"]) if checkpoint else {"num_classes": num_classes}
    if options["num_classes"] != num_classes:
        raise UserError(
            f"'{args.resume}' tells {options['num_classes']} classes apart, the data has {num_classes}; choose the --dataset it was trained on"
        )
    net = models.build(args.arch, **options).to(device, memory_format=torch.channels_last)
    train_loader, test_loader = build_loaders(images, args, device)
    if args.evaluate:
        checkpoints.load_weights(net, checkpoint["state_dict"], args.resume)
        print(f"{args.arch} of {args.resume} on {len(images.test)} test images ({images.source})")
        print(format_pass("Test", evaluate(net, test_loader, device)))
        return

    plan = make_plan(net, args.HTrate)
    training = Training(
        args=args,
        run=RunFolder(folder, args.manualSeed),
        arch=args.arch,
        num_classes=num_classes,
        net=net,
        optimizer=build_optimizer(net, args),
        objective=cross_entropy,
        train_loader=train_loader,
        test_loader=test_loader,
        device=device,
        plan=plan,
        data_source=images.source,
    )
    if checkpoint:
        training.restore(checkpoint, args.resume)
    log = training.run.log
    log("settings: " + ", ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))
    log(
        f"data: {images.source}, {len(images.train)} training and {len(images.test)} test images, {num_classes} classes"
    )
    log(f"device: {device}, {torch.get_num_threads()} CPU threads; optimizer: {type(training.optimizer).__name__}")
    log(f"keeping HTrate={args.HTrate:g} of the filters, that is prune_rate={args.prune_rate:g} removed")
    log(f"schedule: {describe_schedule(train_loader.sizes(0))}")
    log(format_plan(plan))
    late = [m for m in args.schedule if m >= args.epochs]
    if late:
        log(
            f"note: the run ends before the learning-rate milestones {' '.join(map(str, late))}; --fit_schedule scales a recipe's milestones to --epochs"
        )
    if len(training.history) >= args.epochs:
        log(
            f"nothing left to do: {args.resume} has {len(training.history)} of {args.epochs} epochs; a larger --epochs trains on"
        )
        return
    results = training.train()
    log(
        f"\nlast epoch {results['last_epoch_accuracy']:.2f} %, best epoch {results['best_epoch_accuracy']:.2f} % (epoch {results['best_epoch']}); "
        f"everything is in {folder}"
    )


if __name__ == "__main__":
    run_main(main)
