"""What the training scripts build once they know data and network: teacher, objective, optimizer, loaders."""

import argparse
import math
import os
import shlex
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import data
import models
from AHSG_HT import AHSG_HT
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.base.signals import stop
from utils.small.filters import filter_additives, logits_layer
from utils.train.acceleration import make_deterministic
from utils.train.device import flush_denormals, reuse_freed_memory, seed_everything, true_float32
from utils.train.distillation import Distillation
from utils.train.distributed import (
    Agreement,
    average_batchnorm,
    is_first,
    local_world_size,
    on_all,
    world_size,
)
from utils.train.engine import cross_entropy, evaluate, format_pass, gather_bad_images, to_device
from utils.train.losses import parse_term
from utils.train.resume import Start
from utils.train.run_folder import RunFolder, SilentFolder
from utils.train.teacher_cache import TeacherCache


def load_teacher(args: argparse.Namespace, script: str) -> tuple[nn.Module, dict] | None:
    """The network of --teacher and the checkpoint it is from, checked against --arch; None for a run without.

    Raises:
        UserError: distillation without a teacher (the line has the command of `script` that trains one), or one of
            another network.
    """
    if args.evaluate:
        return None
    if not args.teacher:
        if not args.arch_small and args.recipe not in ("distill", "prune_distill"):
            return None
        imagenet = args.dataset == "imagenet"
        arch = args.arch if args.arch_small else "resnet50" if imagenet else "resnet56"
        data_set = shlex.quote(str(args.data_path)) + ("" if imagenet else f" --dataset {args.dataset}")
        command = f"python {script} {data_set} --arch {arch} --recipe baseline"
        raise UserError(f"distillation needs a trained teacher: add --teacher FILE; this trains one: {command}")
    net, checkpoint = models.load_with_checkpoint(args.teacher, args.arch)
    arch = args.teacher_arch = checkpoint["arch"]
    if args.arch_small and arch != args.arch:
        raise UserError(f"--teacher '{args.teacher}' is a {arch}, --arch is {args.arch}; use --arch {arch}")
    return net, checkpoint


def build_objective(
    teacher: tuple[nn.Module, dict] | None,
    net: nn.Module,
    images: data.Data,
    test_loader,
    args: argparse.Namespace,
    usual: dict,
):
    """Cross-entropy, or with a teacher distillation; and what results.json records of the teacher.

    Args:
        usual: the data set's own normalisation, that of a teacher whose checkpoint names none.

    Raises:
        UserError: a teacher of other classes, one that is no better than chance, or an unusable --teacher_cache.
    """
    if teacher is None:
        return cross_entropy, {}
    teacher, checkpoint = teacher
    identity = f"{args.teacher_sha256}{' tf32' if args.tf32 else ''}"
    cache = on_all(lambda: TeacherCache(args.teacher_cache, identity)) if args.teacher_cache else None
    device, classes = next(net.parameters()).device, len(images.classes)
    models.renormalise(teacher, checkpoint.get("normalisation", usual), images.normalisation)
    teacher.to(device, memory_format=torch.channels_last).eval()
    sample = data.first_images(images.test, 2).to(device)
    with torch.no_grad():
        teachers_classes = teacher(sample).shape[1]
    if teachers_classes != classes:
        raise UserError(
            f"--teacher '{args.teacher}' has {teachers_classes} classes, {args.dataset} has {classes}; "
            "use a teacher of the same data set"
        )
    tested = evaluate(teacher, test_loader, device)
    if is_first():
        print(f"teacher {args.teacher_arch} of {args.teacher}: {format_pass('Teacher', tested).strip()}", flush=True)
    # The accuracy of guessing is 100/classes with this standard deviation.
    chance = 100 / classes
    deviation = math.sqrt(chance * (100 - chance) / len(images.test))
    if tested.top1 < chance + 3 * deviation:
        raise UserError(
            f"--teacher '{args.teacher}' has {tested.top1:.2f} %, no better than chance ({chance:g} %); train it first"
        )
    terms = [parse_term(term) for term in args.kd]
    objective = Distillation(teacher, net, sample, terms, ce_weight=args.ce_weight)
    facts = {"arch": args.teacher_arch, "file": args.teacher, "accuracy": tested.top1, "sha256": args.teacher_sha256}
    if cache:
        on_all(lambda: objective.keep_outputs(cache, sample))
        facts["cache"] = cache.counts
    return objective, {"teacher": facts}


def build_optimizer(
    net: nn.Module, adapters: nn.Module | None, args: argparse.Namespace, example: Tensor, start: Start
):
    """Plain SGD where HTrate is 1, v is 0 and nothing is pruned, otherwise AHSG_HT. Adapters are never thresholded.

    Args:
        start: removed filters that its checkpoint names stay removed, which plain SGD cannot do.
        example: a mini-batch (2, C, H, W) on the network's device, to trace it with.

    Raises:
        UserError: a rate that keeps no filter of a layer.
    """
    common = dict(lr=args.learning_rate, momentum=args.momentum, weight_decay=args.decay)
    common["nesterov"] = args.nesterov and args.momentum > 0
    gradual = args.recipe == "prune_gradual"
    states = ((start.checkpoint or {}).get("optimizer") or {}).get("state", {}).values()
    has_removed = any(isinstance(state, dict) and "kept" in state for state in states)
    plain = args.HTrate == 1 and args.v == 0 and not gradual and not has_removed
    # A convolution that makes the logits keeps all of its filters, which are the classes; adapters are not thresholded.
    head = logits_layer(net, example)
    whole = list(head.parameters()) if isinstance(head, nn.Conv2d) else []
    groups = [{"params": [p for p in net.parameters() if not any(p is q for q in whole)]}]
    whole += adapters.parameters() if adapters is not None else []
    if whole:
        groups.append({"params": whole, **({} if plain else {"HTrate": 1})})
    if plain:
        # On a GPU one kernel for all parameters, on a CPU lists of them: torch's default there is a loop in Python.
        return torch.optim.SGD(groups, **{"fused" if example.is_cuda else "foreach": True}, **common)
    rate = 1.0 if gradual else args.HTrate
    options = dict(v=args.v, HTrate=rate, heavy_ball=args.heavy_ball, norm=args.norm, regrow=not args.no_regrow)
    options["additives"] = filter_additives(net, example) if rate < 1 else None
    try:
        return AHSG_HT(groups, **options, **common)
    except ValueError as error:
        raise UserError(str(error)) from None


def build_train_loader(images: data.Data, args: argparse.Namespace, device: torch.device) -> data.DataLoader:
    """The growing loader over the training images.

    Raises:
        UserError: a batch size that does not fit the data or the processes, or a --k that fits no schedule.
    """
    if args.batch_size < world_size():
        raise UserError(
            f"--batch_size {args.batch_size} leaves some of {world_size()} processes without an image; "
            "use a larger one, or fewer processes"
        )
    if args.batch_size > len(images.train):
        raise UserError(
            f"--batch_size {args.batch_size} is more than the {len(images.train)} training images; use a smaller one"
        )
    growth = dict(growth=args.growth, restart=not args.no_restart, max_batch_size=args.max_batch_size)
    options = dict(shuffle=True, seed=args.manualSeed, **growth, **worker_options(args, device))
    try:
        loader = data.DataLoader(images.train, args.batch_size, args.k, **options)
    except ValueError as error:
        raise UserError(str(error)) from None
    data.check_shared_memory(loader, epochs=args.epochs, processes=local_world_size())
    return loader


def build_test_loader(images: data.Data, args: argparse.Namespace, device: torch.device) -> data.DataLoader:
    """The test images in mini-batches that a process can take through the network at once: as in training, or in memory
    more where images are small.
    """
    in_files = isinstance(images.test, data.ImageFiles)
    # Those in files go through shared memory, from worker processes.
    size = args.batch_size if in_files else max(args.batch_size, evaluation_batch(images.test))
    size = min(size, args.max_images_per_step * world_size()) if args.max_images_per_step else size
    # Images in memory are handed out faster than a worker process could send them.
    loader = data.DataLoader(images.test, size, **(worker_options(args, device) if in_files else {}))
    data.check_shared_memory(loader, processes=local_world_size())
    return loader


def evaluation_batch(images) -> int:
    """Images of a set that go through a network at once where nothing is trained: 500 of 32x32."""
    _, height, width = images.image_shape
    return max(1, 500 * 32 * 32 // (height * width))


def worker_options(args: argparse.Namespace, device: torch.device) -> dict:
    """Worker processes that live as long as the run, and memory that a GPU can read by itself."""
    if not args.workers:
        return {}
    options = dict(num_workers=args.workers, persistent_workers=True, prefetch_factor=args.prefetch_factor)
    return options | dict(pin_memory=device.type == "cuda", worker_init_fn=leave_process_group)


def leave_process_group(worker: int) -> None:
    """Leaves the terminal's process group: Ctrl-C is for the training process, which ends its workers."""
    os.setpgid(0, 0)


def open_folder(args: argparse.Namespace, start: Start) -> RunFolder:
    """The run's folder: on the first rank locked and ready for the run, on the others one that writes nothing."""
    if not is_first():
        return SilentFolder(start.folder)
    return RunFolder(start.folder, args.manualSeed, resumed=start.resumed)


def prepare_process(args: argparse.Namespace) -> None:
    """What every run does before it builds anything: arithmetic and memory of the CPU, seeds, and how ranks stop."""
    flush_denormals()
    reuse_freed_memory()
    if args.deterministic:
        make_deterministic()
    seed_everything(args.manualSeed)
    stop.reduce = Agreement() if world_size() > 1 else None


def use_normalisation(images: data.Data, start: Start) -> dict:
    """Normalises the images as the network of the start's checkpoint was trained with; the data set's own otherwise."""
    usual = images.normalisation
    normalise_as(images, (start.checkpoint or {}).get("normalisation"), "the checkpoint", start)
    return usual


def normalise_as(images: data.Data, wanted: dict | None, origin: str, start: Start) -> None:
    """Normalises images by this mean and std, None for their own; the log has a note where they are others."""
    if wanted and wanted != images.normalisation:
        images.normalise_as(**wanted)
        start.notes.append(f"images are normalised as those of {origin}: {wanted}")


def check_input(net: nn.Module, images: data.Data, args: argparse.Namespace) -> None:
    """Raises UserError where a network does not take the images, or has another number of outputs than classes."""
    _, height, width = images.train.image_shape
    is_sized = args.dataset == "imagenet" or data.DATASETS[args.dataset].size is None
    remedy = "use a resnet, which takes any" + (", or another --image_size" if is_sized else "")
    was_training = net.training
    net.to(memory_format=torch.channels_last)  # as it is trained; a view() that it does not allow fails here
    try:
        with torch.no_grad():
            logits = net.eval()(torch.zeros(2, *images.train.image_shape).to(memory_format=torch.channels_last))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"{args.student} does not take images of {height}x{width} ({error}); {remedy}") from None
    net.train(was_training)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"{args.student} must return logits (images, classes), got {found}; flatten its output")
    if logits.shape[1] != len(images.classes):
        found = f"{args.resume or args.student} has {logits.shape[1]} classes, the data has {len(images.classes)}"
        raise UserError(f"{found}; choose the data set that it was trained on")


def place_network(net: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The network on its device, in channels_last layout, with --sync_bn BatchNorm over all processes."""
    if args.sync_bn and device.type != "cuda":
        raise UserError("--sync_bn works on GPUs only, as torch's SyncBatchNorm; leave it out")
    net.to(device, memory_format=torch.channels_last)
    return nn.SyncBatchNorm.convert_sync_batchnorm(net) if args.sync_bn else net


def test_only(
    net: nn.Module, images: data.Data, args: argparse.Namespace, device: torch.device, start: Start, origin: str
) -> None:
    """--evaluate: tests a network, with the weights of the checkpoint if there is one, and prints the release's line.

    Args:
        origin: where the weights came from.
    """
    if start.checkpoint:
        checkpoints.load_weights(net, start.checkpoint["state_dict"], origin)
    if args.recalibrate:
        recalibrate(net, build_train_loader(images, args, device), args.recalibrate, device)
    test_loader = on_all(lambda: build_test_loader(images, args, device))
    tested = evaluate(net, test_loader, device)
    skipped = gather_bad_images(test_loader)
    count = len(images.test) - len(skipped)
    if not count:
        raise UserError("not one test image can be read; check the data path")
    if is_first():
        for path in skipped:
            print(f"skipped, cannot be read: {path}")
        print(f"{args.student} of {origin} on {count} test images ({images.source})")
        print(format_pass("Test", tested))


def recalibrate(net: nn.Module, loader: data.DataLoader, count: int, device: torch.device) -> None:
    """Recomputes BatchNorm's statistics over the first training mini-batches: the mean of each one's, no weight
    changes.

    Those of a network that has just been thresholded are still the unthresholded one's.
    """
    normalise = loader.dataset.normalise
    with true_float32():
        update_bn((to_device(*batch, device, normalise)[0] for batch in islice(loader, count)), net)
    average_batchnorm(net)
    sizes = loader.sizes(0)[:count]
    if is_first():
        print(f"BatchNorm statistics recomputed over {sum(sizes)} training images in {len(sizes)} mini-batches")
