"""Trains and prunes torchvision's networks on ImageNet with AHSG-HT.

    python imagenet_resnet_test.py DATA -a resnet50                            # prune 30 % of the filters, 100 epochs
    python imagenet_resnet_test.py DATA -a resnet50 --use_pretrain --lr 0.01   # from torchvision's weights, or a file's
    python imagenet_resnet_test.py DATA -a resnet34 --recipe baseline          # the unpruned network, plain SGD
    python imagenet_resnet_test.py DATA -a resnet50 --arch_small resnet18 --teacher resnet50.pth    # prune and distil
    python imagenet_resnet_test.py DATA -a resnet18 --image_size 64 --recipe prune_gradual --macs_cut 0.45
    python imagenet_resnet_test.py --resume runs/.../checkpoint.resnet50.pth.tar
    python imagenet_resnet_test.py DATA -a resnet50 -e --resume best.resnet50.pth.tar
    torchrun --nproc_per_node 4 imagenet_resnet_test.py DATA -a resnet50             # on the four GPUs of a machine

DATA holds train/<class>/* and val/<class>/*. Everything a run leaves behind is in its --save_path.
"""

import argparse
import os
import sys
from pathlib import Path

from torch import nn

import data
import models
from models.pretrained import load_pretrained
from utils.base.arguments import OneLineParser
from utils.base.errors import UserError, run_main
from utils.tables.compare import comparison_line
from utils.train import command_line, setup
from utils.train.device import usable_cores
from utils.train.distributed import (
    first_on_machine,
    from_first,
    local_world_size,
    on_all,
    process_group,
)
from utils.train.resume import Start, choose_start
from utils.train.trainer import Trainer

SCRIPT = "imagenet_resnet_test.py"
ARCH = "resnet50"
# Networks that are for larger images than the others' 224.
SIZES = {"inception_v3": 299}


def parser() -> OneLineParser:
    return command_line.make_parser("imagenet", __doc__, ARCH, "any classification network of torchvision")


def settings(given: dict, adopted: dict) -> argparse.Namespace:
    """The settings of a run, from its command line and the checkpoint that it resumes.

    Raises:
        UserError: no data path, an unknown network, or options that contradict each other.
    """
    pretrain = given.get("use_pretrain")
    if "data_path" not in given and pretrain and os.path.isdir(pretrain):
        # `--use_pretrain DATA`, as soft filter pruning's script takes it: the folder is the data.
        given = {**given, "data_path": pretrain, "use_pretrain": "torchvision"}
    args = command_line.resolve(given, adopted, family="imagenet", arch=ARCH)
    if not isinstance(args.data_path, str):
        raise UserError(f"name the folder of the images: python {SCRIPT} DATA")
    for arch in (args.arch, args.student):
        models.check_torchvision_arch(arch)
    args.image_size = args.image_size or SIZES.get(args.student, 224)
    if args.workers is None:
        args.workers = usable_cores() // local_world_size()
    return args


def load_images(args: argparse.Namespace) -> data.Data:
    """The image files, decoded when they are needed."""
    return data.load_imagenet(
        args.data_path, size=args.image_size, seed=args.manualSeed, on_bad_image=args.on_bad_image
    )


def build_network(args: argparse.Namespace, images: data.Data, checkpoint: dict | None) -> nn.Module:
    """The network that is trained; with a checkpoint one of its shapes, which may be narrower than the network of its
    name.
    """
    if checkpoint is None:
        net = models.build_torchvision(args.student, len(images.classes))
    else:
        net = models.build_like({"library": "torchvision", **checkpoint}, args.student, args.resume)
    setup.check_input(net, images, args)
    return net


def load_trained(net: nn.Module, args: argparse.Namespace, images: data.Data, start: Start) -> str | None:
    """Loads the weights of --use_pretrain into a new network, and normalises the images as they need it; where they
    came from, None without.
    """
    if not args.use_pretrain or args.resume:
        return None
    file = None if args.use_pretrain == "torchvision" else args.use_pretrain
    source, normalisation = first_on_machine(lambda: load_pretrained(net, args.student, file))
    setup.normalise_as(images, normalisation, source, start)
    return source


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
        images = first_on_machine(lambda: load_images(args))
        usual = setup.use_normalisation(images, start)

        # Networks and teacher.
        net = on_all(lambda: build_network(args, images, start.checkpoint))
        source = load_trained(net, args, images, start)
        net = setup.place_network(net, args, device)
        if args.evaluate:
            return setup.test_only(net, images, args, device, start, args.resume or source)
        train_loader = on_all(lambda: setup.build_train_loader(images, args, device))
        test_loader = on_all(lambda: setup.build_test_loader(images, args, device))
        objective, facts = setup.build_objective(teacher, net, images, test_loader, args, usual)
        facts |= {"pretrained": source} if source else {}

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
