"""Trains and prunes CIFAR networks with AHSG-HT.

    python cifar10_resnet_test.py --k 0.1                             # prune ResNet-20 on CIFAR-10: 30 % of the filters, 200 epochs
    python cifar10_resnet_test.py DATA --recipe baseline              # the unpruned network, plain SGD
    python cifar10_resnet_test.py DATA --arch vgg16_bn --HTrate 0.6
    python cifar10_resnet_test.py DATA --arch resnet56 --arch_small resnet20 --teacher best.resnet56.pth.tar    # prune and distil
    python cifar10_resnet_test.py --recipe finetune --resume runs/.../checkpoint.resnet20.pth.tar
    python cifar10_resnet_test.py DATA --recipe baseline --widths_of small.resnet20.pth.tar    # the small network, from scratch
    python cifar10_resnet_test.py DATA --evaluate --resume best.resnet20.pth.tar

DATA holds CIFAR as torchvision stores it (it is downloaded where absent) or an image tree train/<class>/*, test/<class>/*.
Everything a run leaves behind is in its --save_path: log, metrics.csv, curves.png, results.json, checkpoints.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Ctrl-C in the seconds that torch takes to be imported ends the process quietly; run_main takes over from there.
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

import data
import models
from utils.base.errors import UserError, run_main
from utils.compare.own_runs import describe_source
from utils.train.distributed import from_first, is_first, on_all, process_group
from utils.train.experiment import Experiment, choose_start, load_teacher, prepare_process
from utils.train.options import OneLineParser, add_training_options, resolve_recipe
from utils.train.resume import adopt_settings

SCRIPT = "cifar10_resnet_test.py"


def parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data_path", nargs="?", default="./data", help="where the images are, or go (./data)")
    group = parser.add_argument_group("data and network")
    group.add_argument(
        "--dataset", choices=data.DATASETS, default="cifar10", help="folder: an image tree of your own (cifar10)"
    )
    group.add_argument(
        "--arch", "-a", default="resnet20", metavar="ARCH", help=f"network: {', '.join(models.REGISTRY)}"
    )
    add_training_options(parser)
    return parser


def settle(args: argparse.Namespace, given: set[str], checkpoint: dict | None = None) -> argparse.Namespace:
    """The settings of a run, from its command line, the checkpoint that it resumes, and its recipe."""
    adopt_settings(args, given, checkpoint)
    resolve_recipe(args, given)
    # The network that is trained; --arch names the teacher when there is an --arch_small.
    args.student = args.arch_small or args.arch
    for arch in (args.arch, args.student):
        models.check_arch(arch)
    if args.head_width and args.widths_of:
        raise UserError(
            f"--head_width {args.head_width} is for new networks, that of --widths_of has its own; leave it out"
        )
    if args.head_width and not args.student.startswith("resnet"):
        raise UserError(f"--head_width is for the CIFAR ResNets, got {args.student}")
    return args


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The settings of a command line by itself."""
    return settle(*parser().parse_given(argv))


def teacher_command(args: argparse.Namespace, arch: str | None) -> list[str]:
    """The command line that trains a teacher, less its recipe."""
    return ["python", SCRIPT, args.data_path, "--dataset", args.dataset, "--arch", arch or "resnet56"]


def load_images(args: argparse.Namespace, device: torch.device) -> data.Data:
    """The data set in memory: the GPU's where there is one."""
    if args.dataset == "synthetic" and is_first():
        print(
            "SYNTHETIC DATA: images made by code, to try the software. NO FIGURE OF THIS RUN SAYS ANYTHING ABOUT CIFAR."
        )
    images = data.load(args.dataset, args.data_path, seed=args.manualSeed)
    if device.type == "cuda":
        # Worker processes are of no use to images that live on the GPU.
        images.train.to(device), images.test.to(device)
        args.workers = 0
    return images


def build_network(args: argparse.Namespace, num_classes: int, checkpoint: dict | None) -> nn.Module:
    """The network that is trained; with a checkpoint one of its shape, as it may be of a small network, narrower than its name says."""
    if checkpoint is None and args.widths_of:
        return models.build_with_widths(args.widths_of, args.student, num_classes)
    if checkpoint is None:
        options = {"head_width": args.head_width} if args.head_width else {}
        return models.build(args.student, num_classes=num_classes, **options)
    classes = models.build_like(checkpoint, args.student, args.resume).num_classes
    if classes != num_classes:
        raise UserError(
            f"'{args.resume}' tells {classes} classes apart, the data has {num_classes}; "
            "choose the --dataset it was trained on"
        )
    return models.build_like(checkpoint, args.student, args.resume)


def main(argv: list[str] | None = None) -> Path | None:
    """Runs the command line (the process's own by default); returns the run's folder, None after --evaluate."""
    argv = sys.argv[1:] if argv is None else argv
    args, given = parser().parse_given(argv)
    with process_group(args.ngpu, args.dist_timeout) as device:
        args, start = from_first(lambda: choose_start(args, given, settle))
        teacher = on_all(lambda: load_teacher(args, lambda arch: teacher_command(args, arch)))
        prepare_process(args)
        images = on_all(lambda: load_images(args, device))
        net = on_all(lambda: build_network(args, len(images.classes), start.checkpoint))
        net.to(device, memory_format=torch.channels_last)
        facts = {"widths_from": describe_source(args.widths_of)} if args.widths_of else {}
        return Experiment(SCRIPT, argv, args, start, images, net, teacher, device, facts=facts).run()


if __name__ == "__main__":
    run_main(main)
