"""Trains and prunes CIFAR networks with AHSG-HT.

    python cifar10_resnet_test.py --k 0.1                             # prune ResNet-20 on CIFAR-10: 30 % of the filters, 200 epochs
    python cifar10_resnet_test.py DATA --recipe baseline              # the unpruned network, plain SGD
    python cifar10_resnet_test.py DATA --arch vgg16_bn --HTrate 0.6
    python cifar10_resnet_test.py DATA --arch resnet56 --arch_small resnet20 --teacher best.resnet56.pth.tar    # prune and distil
    python cifar10_resnet_test.py --recipe finetune --resume runs/.../checkpoint.resnet20.pth.tar
    python cifar10_resnet_test.py DATA --evaluate --resume best.resnet20.pth.tar

DATA holds CIFAR as torchvision stores it (it is downloaded where absent) or an image tree train/<class>/*, test/<class>/*.
Everything a run leaves behind is in its --save_path: log, metrics.csv, curves.png, results.json, checkpoints.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from itertools import groupby
from pathlib import Path

import torch

import data
import models
from AHSG_HT import AHSG_HT
from utils import checkpoint as checkpoints
from utils.compare_tables import comparison_line
from utils.device import choose_device, flush_denormals, seed_everything
from utils.distillation import Distillation, checksum, share_classifier
from utils.engine import evaluate
from utils.errors import UserError, run_main
from utils.objective import cross_entropy
from utils.options import OneLineParser, add_training_options, resolve_recipe
from utils.plan import format_plan, make_plan
from utils.resume import adopt_settings, find_start
from utils.run_folder import RunFolder
from utils.training import Training, format_pass

EVALUATION_BATCH = 500


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
    if args.head_width and not args.student.startswith("resnet"):
        raise UserError(f"--head_width is for the CIFAR ResNets, got {args.student}")
    return args


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The settings of a command line by itself."""
    return settle(*parser().parse_given(argv))


def build_optimizer(net: torch.nn.Module, adapters: torch.nn.Module | None, args: argparse.Namespace):
    """Plain SGD where nothing is thresholded and no ball rolls, else AHSG_HT. Adapters are never thresholded."""
    groups = [{"params": list(net.parameters())}]
    common = dict(lr=args.learning_rate, momentum=args.momentum, weight_decay=args.decay, nesterov=args.momentum > 0)
    plain = args.HTrate == 1 and args.v == 0
    if adapters is not None and list(adapters.parameters()):
        groups.append({"params": list(adapters.parameters()), **({} if plain else {"HTrate": 1})})
    if plain:
        return torch.optim.SGD(groups, **common)
    return AHSG_HT(groups, v=args.v, HTrate=args.HTrate, heavy_ball=args.heavy_ball, norm=args.norm, **common)


def build_train_loader(images: data.Data, args: argparse.Namespace) -> data.DataLoader:
    if args.batch_size > len(images.train):
        raise UserError(
            f"--batch_size {args.batch_size} is more than the {len(images.train)} training images; use a smaller one"
        )
    growth = dict(growth=args.growth, restart=not args.no_restart, max_batch_size=args.max_batch_size)
    workers = dict(num_workers=args.workers, persistent_workers=args.workers > 0)
    try:
        return data.DataLoader(
            images.train, args.batch_size, args.k, shuffle=True, seed=args.manualSeed, **growth, **workers
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def load_teacher(args: argparse.Namespace) -> torch.nn.Module | None:
    """The network of --teacher, checked against --arch; None for a run without."""
    if args.evaluate:
        return None
    if not args.teacher:
        if not args.arch_small and args.recipe not in ("distill", "prune_distill"):
            return None
        arch = args.arch if args.arch_small else "resnet56"
        command = ["python", "cifar10_resnet_test.py", args.data_path, "--dataset", args.dataset, "--arch", arch]
        raise UserError(
            f"distillation needs a trained teacher: add --teacher FILE; this trains one: {shlex.join(command)} --recipe baseline"
        )
    arch, teacher = models.load_with_name(args.teacher, args.arch)
    if args.arch_small and arch != args.arch:
        raise UserError(f"--teacher '{args.teacher}' is a {arch}, --arch says {args.arch}; use --arch {arch}")
    args.teacher_arch = arch
    return teacher


def build_objective(
    teacher: torch.nn.Module | None, net: torch.nn.Module, images: data.Data, test_loader, args, device
):
    """Cross-entropy, or with a teacher distillation; and what results.json says of the teacher."""
    if teacher is None:
        return cross_entropy, {}
    classes = len(images.classes)
    if teacher.num_classes != classes:
        raise UserError(
            f"--teacher '{args.teacher}' tells {teacher.num_classes} classes apart, {args.dataset} has {classes}; "
            "use a teacher of the same data set"
        )
    teacher.to(device, memory_format=torch.channels_last)
    tested = evaluate(teacher, test_loader, device)
    print(f"teacher {args.teacher_arch} of {args.teacher}: {format_pass('Teacher', tested).strip()}", flush=True)
    # A network that knows nothing scores 100/classes with this standard deviation.
    chance = 100 / classes
    spread = math.sqrt(chance * (100 - chance) / len(images.test))
    if tested.top1 < chance + 3 * spread:
        raise UserError(
            f"--teacher '{args.teacher}' scores {tested.top1:.2f} %, no better than chance ({chance:g} %); train it first"
        )
    if args.share_classifier:
        share_classifier(teacher, net)
    sample, _ = images.test.__getitems__([0, 1])
    objective = Distillation(
        teacher, net, sample, on=args.kd_on, loss=args.loss, weight=args.kd_weight, temperature=args.kd_T
    )
    facts = {"arch": args.teacher_arch, "file": args.teacher, "accuracy": tested.top1, "sha256": checksum(args.teacher)}
    return objective, {"teacher": facts}


def describe_schedule(sizes: list[int]) -> str:
    """The mini-batch schedule of an epoch: its sizes, and how many of each where they repeat."""
    runs = [(size, len(list(same))) for size, same in groupby(sizes)]
    parts = [f"{size} x{n}" if n > 1 else f"{size}" for size, n in runs]
    if len(parts) > 12:
        parts = [*parts[:4], "...", *parts[-4:]]
    return f"{len(sizes)} mini-batches in the first epoch: {', '.join(parts)} ({sum(sizes)} images)"


def run_name(args: argparse.Namespace) -> str:
    """The folder in runs/ of a run without --save_path."""
    rate = "" if args.HTrate == 1 else f"-HT{args.HTrate:g}"
    return f"{args.recipe}-{args.dataset}-{args.student}{rate}-seed{args.manualSeed}"


def main(argv: list[str] | None = None) -> Path | None:
    """Runs the command line (the process's own by default); returns the run's folder, None after --evaluate."""
    argv = sys.argv[1:] if argv is None else argv
    args, given = parser().parse_given(argv)
    device = choose_device(args.ngpu)
    checkpoint = checkpoints.read(args.resume) if args.resume not in (None, "auto") else None
    settle(args, given, checkpoint)
    start = find_start(args, given, checkpoint, args.student, run_name(args))
    teacher = load_teacher(args)
    flush_denormals()
    seed_everything(args.manualSeed)
    if args.dataset == "synthetic":
        print(
            "SYNTHETIC DATA: images made by code, to try the software. NO FIGURE OF THIS RUN SAYS ANYTHING ABOUT CIFAR."
        )

    images = data.load(args.dataset, args.data_path, seed=args.manualSeed)
    num_classes = len(images.classes)
    options = {"num_classes": num_classes, **({"head_width": args.head_width} if args.head_width else {})}
    if start.checkpoint:
        options = models.infer_options(args.student, start.checkpoint["state_dict"])
        if options["num_classes"] != num_classes:
            raise UserError(
                f"'{args.resume}' tells {options['num_classes']} classes apart, the data has {num_classes}; "
                "choose the --dataset it was trained on"
            )
    # A checkpoint may be of a small network, narrower than its name says.
    net = (
        models.build_like(start.checkpoint, args.student, args.resume)
        if start.checkpoint
        else models.build(args.student, **options)
    )
    net.to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        # The images live on the GPU, where worker processes are of no use.
        images.train.to(device), images.test.to(device)
        args.workers = 0
    test_loader = data.DataLoader(images.test, EVALUATION_BATCH)
    if args.evaluate:
        checkpoints.load_weights(net, start.checkpoint["state_dict"], args.resume)
        print(f"{args.student} of {args.resume} on {len(images.test)} test images ({images.source})")
        print(format_pass("Test", evaluate(net, test_loader, device)))
        return None

    plan = make_plan(net, args.HTrate)
    train_loader = build_train_loader(images, args)
    objective, facts = build_objective(teacher, net, images, test_loader, args, device)
    optimizer = build_optimizer(net, getattr(objective, "adapters", None), args)
    sizes = {"train_images": len(images.train), "test_images": len(images.test)}
    training = Training(
        args=args,
        run=RunFolder(start.folder, args.manualSeed, new=not start.folder_is_its_own),
        arch=args.student,
        num_classes=num_classes,
        net=net,
        optimizer=optimizer,
        objective=objective,
        train_loader=train_loader,
        test_loader=test_loader,
        device=device,
        plan=plan,
        data_source=images.source,
        facts={"command": shlex.join(["python", "cifar10_resnet_test.py", *argv]), **sizes, **facts},
    )
    if start.checkpoint:
        training.restore(start.checkpoint, args.resume, continues=start.continues)
    log = training.run.log
    log("settings: " + ", ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))
    log(
        f"data: {images.source}, {len(images.train)} training and {len(images.test)} test images, {num_classes} classes"
    )
    log(f"device: {device}, {torch.get_num_threads()} CPU threads; optimizer: {type(optimizer).__name__}")
    for name, value in facts.get("teacher", {}).items():
        log(f"teacher {name}: {value}")
    log(f"keeping HTrate={args.HTrate:g} of the filters, that is prune_rate={args.prune_rate:g} removed")
    log(f"schedule: {describe_schedule(train_loader.sizes(0))}")
    log(format_plan(plan))
    for note in start.notes:
        log(note)
    late = [m for m in args.schedule if m >= args.epochs]
    if late:
        log(
            f"note: the run ends before the learning-rate milestones {' '.join(map(str, late))}; "
            "--fit_schedule scales a recipe's milestones to --epochs"
        )
    if training.epochs_done >= args.epochs:
        log(
            f"nothing left to do: {args.resume} has {training.epochs_done} of {args.epochs} epochs; a larger --epochs trains on"
        )
    results = training.train()
    if results is None:
        return start.folder
    log(
        f"\nlast epoch {results['last_epoch_accuracy']:.2f} %, best epoch {results['best_epoch_accuracy']:.2f} % "
        f"(epoch {results['best_epoch']}); log, metrics.csv, curves.png, results.json and checkpoints are in {start.folder}"
    )
    log(comparison_line(results))
    return start.folder


if __name__ == "__main__":
    run_main(main)
