"""Trains and prunes CIFAR networks with AHSG-HT.

    python cifar10_resnet_test.py --k 0.1                             # prune ResNet-20 on CIFAR-10: 30 % of the filters
    python cifar10_resnet_test.py DATA --recipe baseline              # the unpruned network, plain SGD
    python cifar10_resnet_test.py DATA --arch vgg16_bn --HTrate 0.6
    python cifar10_resnet_test.py DATA --arch resnet56 --arch_small resnet20 --teacher best.resnet56.pth.tar   # distil
    python cifar10_resnet_test.py DATA --recipe prune_gradual --macs_cut 0.5 --resume resnet20.th    # a trained network
    python cifar10_resnet_test.py --recipe finetune --resume runs/.../checkpoint.resnet20.pth.tar
    python cifar10_resnet_test.py DATA --recipe baseline --widths_of small.resnet20.pth.tar   # small, from scratch
    python cifar10_resnet_test.py DATA --evaluate --resume best.resnet20.pth.tar

DATA holds CIFAR as torchvision stores it (downloaded where absent) or an image tree train/<class>/*, test/<class>/*.
A run leaves in its --save_path: log, metrics.csv, curves.png, results.json, checkpoints and the small network.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

import data
import models
from utils.base.arguments import OneLineParser
from utils.base.errors import UserError, run_main
from utils.tables.compare import comparison_line
from utils.tables.runs import describe_source
from utils.train import command_line, setup
from utils.train.distributed import first_on_machine, from_first, is_first, on_all, process_group
from utils.train.resume import choose_start
from utils.train.trainer import Trainer

SCRIPT = "cifar10_resnet_test.py"
ARCH = "resnet20"


def parser() -> OneLineParser:
    return command_line.make_parser("cifar", __doc__, ARCH, ", ".join(models.REGISTRY))


def settings(given: dict, adopted: dict) -> argparse.Namespace:
    """The settings of a run, from its command line and the checkpoint that it resumes.

    Raises:
        UserError: an unknown network, or options that contradict each other.
    """
    args = command_line.resolve(given, adopted, family="cifar", arch=ARCH)
    args.data_path = args.data_path or "./data"
    args.workers = args.workers or 0
    for arch in (args.arch, args.student):
        models.check_arch(arch)
    if args.head_width and args.widths_of:
        raise UserError(
            f"--head_width {args.head_width} is for new networks, that of --widths_of has its own; leave it out"
        )
    if args.head_width and not args.student.startswith("resnet"):
        raise UserError(f"--head_width is for the CIFAR ResNets, got {args.student}")
    return args


def load_images(args: argparse.Namespace, device: torch.device) -> data.Data:
    """The data set in memory: the GPU's where there is one."""
    if args.dataset == "synthetic" and is_first():
        print(
            "SYNTHETIC DATA: images made by code, to try the software. NO FIGURE OF THIS RUN SAYS ANYTHING ABOUT CIFAR."
        )
    images = data.load(args.dataset, args.data_path, seed=args.manualSeed, size=args.image_size)
    if device.type == "cuda":
        # Worker processes are of no use to images that are on the GPU.
        images.train.to(device), images.test.to(device)
        args.workers = 0
    return images


def build_network(args: argparse.Namespace, images: data.Data, checkpoint: dict | None) -> nn.Module:
    """The network that is trained; with a checkpoint one of its shapes, which may be narrower than the network of its
    name.
    """
    classes = len(images.classes)
    if checkpoint is None and args.widths_of:
        net = models.build_with_widths(args.widths_of, args.student, classes)
    elif checkpoint is None:
        options = {"head_width": args.head_width} if args.head_width else {}
        net = models.build(args.student, num_classes=classes, **options)
    else:
        net = models.build_like(checkpoint, args.student, args.resume)
    setup.check_input(net, images, args)
    return net


def main(argv: list[str] | None = None) -> Path | None:
    """Runs the command line (the process's own by default); returns the run's folder, None after --evaluate."""
    # Settings.
    argv = sys.argv[1:] if argv is None else argv
    given = command_line.parse(parser(), argv)
    with process_group(given) as device:
        args, start = from_first(lambda: choose_start(given, settings, ARCH))
        teacher = on_all(lambda: setup.load_teacher(args, SCRIPT))
        setup.prepare_process(args)

        # Data.
        images = first_on_machine(lambda: load_images(args, device))
        usual = setup.use_normalisation(images, start)

        # Networks and teacher.
        net = on_all(lambda: build_network(args, images, start.checkpoint))
        net = setup.place_network(net, args, device)
        if args.evaluate:
            return setup.test_only(net, images, args, device, start, args.resume)
        train_loader = on_all(lambda: setup.build_train_loader(images, args, device))
        test_loader = on_all(lambda: setup.build_test_loader(images, args, device))
        objective, facts = setup.build_objective(teacher, net, images, test_loader, args, usual)
        facts |= {"widths_from": describe_source(args.widths_of)} if args.widths_of else {}

        # Optimizer.
        example = data.first_images(images.test, 2).to(device)
        optimizer = setup.build_optimizer(net, getattr(objective, "adapters", None), args, example, start)

        # Train, then cut out the small network.
        trainer = Trainer(
            [SCRIPT, *argv], args, start, images, net, optimizer, objective, train_loader, test_loader, device,
            facts,
        )  # fmt: skip
        with on_all(lambda: setup.open_folder(args, start)) as run:
            trainer.train(run)
            results = trainer.finish()
            if results:
                run.log(comparison_line(results))
        return start.folder


if __name__ == "__main__":
    run_main(main)
