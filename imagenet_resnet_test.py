"""Trains and prunes torchvision's networks on ImageNet with AHSG-HT.

    python imagenet_resnet_test.py DATA -a resnet50                                  # prune ResNet-50: 30 % of the filters, 100 epochs
    python imagenet_resnet_test.py DATA -a resnet50 --use_pretrain --lr 0.01         # from torchvision's weights (or --use_pretrain FILE)
    python imagenet_resnet_test.py DATA -a resnet34 --recipe baseline                # the unpruned network, plain SGD
    python imagenet_resnet_test.py DATA -a resnet50 --arch_small resnet18 --teacher resnet50.pth    # prune and distil
    python imagenet_resnet_test.py --resume runs/.../checkpoint.resnet50.pth.tar
    python imagenet_resnet_test.py DATA -a resnet50 -e --resume best.resnet50.pth.tar
    torchrun --nproc_per_node 4 imagenet_resnet_test.py DATA -a resnet50             # on the four GPUs of a machine

DATA holds train/<class>/* and val/<class>/*. Everything a run leaves behind is in its --save_path.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Ctrl-C in the seconds that torch takes to be imported ends the process quietly; run_main takes over from there.
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import nn

import data
import models
from data.image_files import ON_BAD_IMAGE
from models.pretrained import load_pretrained
from utils.base.errors import UserError, run_main
from utils.train.device import usable_cores
from utils.train.distributed import copy_from_first, from_first, local_world_size, on_all, process_group
from utils.train.experiment import Experiment, choose_start, load_teacher, prepare_process
from utils.train.options import OneLineParser, add_training_options, number, path_name, resolve_recipe
from utils.train.recipes import IMAGENET_RECIPES
from utils.train.resume import Start, adopt_settings

SCRIPT = "imagenet_resnet_test.py"
# What --use_pretrain without a file means.
TORCHVISION = "torchvision"
# Worker processes that one process starts by itself at most.
MOST_WORKERS = 16
# Networks that are for larger images than the others' 224.
SIZES = {"inception_v3": 299}

image_size = number(int, lambda n: 32 <= n <= 1024, "a whole number in 32..1024")


def parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data_path", nargs="?", help="folder with train/<class>/ and val/<class>/")
    group = parser.add_argument_group("data and network")
    group.add_argument(
        "--arch", "-a", default="resnet50", metavar="ARCH", help="any classification network of torchvision (resnet50)"
    )
    group.add_argument(
        "--use_pretrain",
        nargs="?",
        const=TORCHVISION,
        type=path_name,
        metavar="FILE",
        help="start from the weights in FILE, or without FILE from torchvision's, which are downloaded",
    )
    group.add_argument("--image_size", type=image_size, help="height and width of the images (224; inception_v3 299)")
    group.add_argument(
        "--on_bad_image", choices=ON_BAD_IMAGE, default="skip", help="what an image that cannot be read does (skip)"
    )
    add_training_options(parser, IMAGENET_RECIPES)
    parser.set_defaults(workers=None)
    return parser


def settle(args: argparse.Namespace, given: set[str], checkpoint: dict | None = None) -> argparse.Namespace:
    """The settings of a run, from its command line, the checkpoint that it resumes, and its recipe."""
    if args.data_path is None and args.use_pretrain and os.path.isdir(args.use_pretrain):
        # `--use_pretrain DATA`, as soft filter pruning's script takes it: the folder is the data.
        args.data_path, args.use_pretrain = args.use_pretrain, TORCHVISION
        given = given | {"data_path"}
    adopt_settings(args, given, checkpoint)
    args.dataset = "imagenet"
    if not isinstance(args.data_path, str):
        raise UserError(f"name the folder of the images: python {SCRIPT} DATA")
    resolve_recipe(args, given, IMAGENET_RECIPES)
    # The network that is trained; --arch names the teacher when there is an --arch_small.
    args.student = args.arch_small or args.arch
    for arch in (args.arch, args.student):
        models.check_torchvision_arch(arch)
    for name in ("head_width", "widths_of"):
        if getattr(args, name):
            raise UserError(f"--{name} is for cifar10_resnet_test.py; leave it out")
    args.image_size = image_size(str(args.image_size or SIZES.get(args.student, 224)))
    if args.workers is None:
        args.workers = min(MOST_WORKERS, usable_cores() // local_world_size())
    return args


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The settings of a command line by itself."""
    return settle(*parser().parse_given(argv))


def teacher_command(args: argparse.Namespace, arch: str | None) -> list[str]:
    """The command line that trains a teacher, less its recipe."""
    return ["python", SCRIPT, args.data_path, "-a", arch or "resnet50"]


def load_images(args: argparse.Namespace) -> data.Data:
    """The image files, decoded when they are needed."""
    return data.load_imagenet(
        args.data_path, size=args.image_size, seed=args.manualSeed, on_bad_image=args.on_bad_image
    )


def build_network(args: argparse.Namespace, num_classes: int, checkpoint: dict | None) -> nn.Module:
    """The network that is trained; with a checkpoint one of its shape, which may be narrower than its name says."""
    if checkpoint is None:
        net = models.build_torchvision(args.student, num_classes)
    else:
        net = models.build_like({"library": "torchvision", **checkpoint}, args.student, args.resume)
    try:
        with torch.no_grad():
            classes = net.eval()(torch.zeros(2, 3, args.image_size, args.image_size)).shape[1]
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"{args.student} does not take images of {args.image_size}x{args.image_size} ({error})"
        ) from None
    if classes != num_classes:
        raise UserError(
            f"'{args.resume}' tells {classes} classes apart, the data has {num_classes}; name the data it was trained on"
        )
    return net


def start_from_trained(net: nn.Module, args: argparse.Namespace, start: Start) -> dict:
    """Loads the weights of --use_pretrain into a network that starts anew; what results.json says of them."""
    if not args.use_pretrain or start.checkpoint:
        return {}
    file = None if args.use_pretrain == TORCHVISION else args.use_pretrain
    source = from_first(lambda: load_pretrained(net, args.student, file))
    copy_from_first(net)
    return {"pretrained": source}


def main(argv: list[str] | None = None) -> Path | None:
    """Runs the command line (the process's own by default); returns the run's folder, None after --evaluate."""
    argv = sys.argv[1:] if argv is None else argv
    args, given = parser().parse_given(argv)
    with process_group(args.ngpu, args.dist_timeout) as device:
        args, start = from_first(lambda: choose_start(args, given, settle))
        teacher = on_all(lambda: load_teacher(args, lambda arch: teacher_command(args, arch)))
        prepare_process(args)
        images = on_all(lambda: load_images(args))
        net = on_all(lambda: build_network(args, len(images.classes), start.checkpoint))
        facts = start_from_trained(net, args, start)
        net.to(device, memory_format=torch.channels_last)
        network_facts = {"library": "torchvision", "input_shape": [3, args.image_size, args.image_size]}
        return Experiment(SCRIPT, argv, args, start, images, net, teacher, device, network_facts, facts).run()


if __name__ == "__main__":
    run_main(main)
