"""What the training scripts share once they know their data and networks: teacher, objective, optimizer, loaders, and the run itself."""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import data
import models
from AHSG_HT import AHSG_HT
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.base.signals import stop
from utils.compare_tables import comparison_line
from utils.small.filters import format_plan, make_plan
from utils.train.acceleration import Acceleration, accelerate, choose_acceleration, compiled_graphs, make_deterministic
from utils.train.device import flush_denormals, reuse_freed_memory, seed_everything
from utils.train.distillation import Distillation, checksum, share_classifier
from utils.train.distributed import (
    Agreement,
    LostRank,
    ParallelObjective,
    average_batchnorm,
    first_line,
    is_first,
    is_lost_connection,
    local_world_size,
    on_all,
    rank,
    synchronise_batchnorm,
    world_size,
)
from utils.train.engine import evaluate, to_device
from utils.train.objective import cross_entropy
from utils.train.resume import Start, find_start, resume_command
from utils.train.run_folder import RunFolder, SilentFolder
from utils.train.trainer import Training, format_pass, gather_bad_images

EVALUATION_BATCH = 500


@dataclass
class Experiment:
    """A training script's settings, data and network, once they are chosen.

    Attributes:
        script: file name of the script, for the command lines that are printed and saved.
        argv: its command line.
        args: the resolved settings.
        start: where the run starts; see utils.train.resume.
        images: the data set.
        net: the network to train, on `device`.
        teacher: a trained network, or None.
        network_facts: what a checkpoint must say besides `arch` for the network to be built again.
        facts: further entries for results.json.
        acceleration: how it computes, chosen when it runs.
    """

    script: str
    argv: list[str]
    args: argparse.Namespace
    start: Start
    images: data.Data
    net: nn.Module
    teacher: nn.Module | None
    device: torch.device
    network_facts: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    acceleration: Acceleration = Acceleration()  # noqa: RUF009 (immutable)

    def run(self) -> Path | None:
        """Trains, or with --evaluate only tests; returns the run's folder, None after --evaluate."""
        try:
            return self._run()
        except RuntimeError as error:
            if is_lost_connection(error):
                raise LostRank(self.describe_loss(error)) from None
            raise

    def _run(self) -> Path | None:
        if self.args.sync_bn and world_size() > 1:
            self.net = synchronise_batchnorm(self.net, self.device)
        test_loader = build_test_loader(self.images, self.args, self.device)
        if self.args.evaluate:
            self.evaluate(test_loader)
            return None
        self.args.started_from = self.start.origin(self.args.resume)
        plan = make_plan(self.net, self.args.HTrate)
        train_loader = build_train_loader(self.images, self.args, self.device)
        objective, facts = build_objective(self.teacher, self.net, self.images, test_loader, self.args, self.device)
        optimizer = build_optimizer(self.net, getattr(objective, "adapters", None), self.args)
        self.acceleration = on_all(lambda: choose_acceleration(self.args, self.device))
        largest = max(max(train_loader.sizes(epoch)) for epoch in (0, self.args.epochs - 1))
        largest = min(-(-largest // world_size()), self.args.max_images_per_step or largest)
        objective = accelerate(self.net, objective, self.device, self.acceleration, largest)
        if world_size() > 1:
            objective = ParallelObjective(self.net, objective, self.device)
            # Every rank its own dropout.
            torch.manual_seed(self.args.manualSeed + rank() * 0x9E3779B1)
        stop.reduce = Agreement() if world_size() > 1 else None
        with on_all(self.open_folder) as run:
            return self.train(run, optimizer, objective, train_loader, test_loader, plan, facts)

    def train(self, run: RunFolder, optimizer, objective, train_loader, test_loader, plan, facts: dict) -> Path:
        """The run itself, in its folder."""
        sizes = {"train_images": len(self.images.train), "test_images": len(self.images.test)}
        training = Training(
            args=self.args,
            run=run,
            arch=self.args.student,
            num_classes=len(self.images.classes),
            net=self.net,
            optimizer=optimizer,
            objective=objective,
            train_loader=train_loader,
            test_loader=test_loader,
            device=self.device,
            plan=plan,
            data_source=self.images.source,
            facts={
                "command": shlex.join([*launcher(), self.script, *self.argv]),
                "arithmetic": "bfloat16" if self.acceleration.amp else "float32",
                **sizes,
                **self.facts,
                **facts,
            },
            network_facts=self.network_facts,
            resume_command=lambda file: resume_command(self.script, self.argv, file, launcher()),
        )
        if self.start.checkpoint:
            training.restore(self.start.checkpoint, self.args.resume, continues=self.start.continues)
        self.log_settings(training)
        results = training.train()
        if self.acceleration.compile:
            training.run.log(f"compiled graphs: {compiled_graphs()}")
        if results is not None:
            training.run.log(
                f"\nlast epoch {results['last_epoch_accuracy']:.2f} %, best epoch {results['best_epoch_accuracy']:.2f} % "
                f"(epoch {results['best_epoch']}); log, metrics.csv, curves.png, results.json and checkpoints are in {self.start.folder}"
            )
            training.run.log(comparison_line(results))
        return self.start.folder

    def open_folder(self) -> RunFolder:
        if not is_first():
            return SilentFolder(self.start.folder)
        start = self.start
        resumed = (start.file, start.stamp) if start.folder_is_its_own else None
        is_new = resumed is None and not start.begins_again
        return RunFolder(start.folder, self.args.manualSeed, new=is_new, resumed=resumed)

    def evaluate(self, test_loader) -> None:
        """Tests the network of --resume and prints the release's line."""
        args = self.args
        if self.start.checkpoint:
            checkpoints.load_weights(self.net, self.start.checkpoint["state_dict"], args.resume)
        if args.recalibrate:
            self.recalibrate(args.recalibrate)
        tested = evaluate(self.net, test_loader, self.device)
        skipped = gather_bad_images(test_loader)
        if is_first():
            for path in skipped:
                print(f"skipped, cannot be read: {path}")
            print(
                f"{args.student} of {args.resume or self.facts.get('pretrained')} on {len(self.images.test)} test images ({self.images.source})"
            )
            print(format_pass("Test", tested))

    def recalibrate(self, count: int) -> None:
        """Takes BatchNorm's statistics anew over the first training mini-batches: the mean of each one's, no weight changes.

        Those of a network that has just been thresholded are still the unthresholded one's.
        """
        loader = build_train_loader(self.images, self.args, self.device)
        update_bn((to_device(*batch, self.device)[0] for batch in islice(loader, count)), self.net)
        average_batchnorm(self.net)
        sizes = loader.sizes(0)[:count]
        if is_first():
            print(f"BatchNorm statistics taken anew over {sum(sizes)} training images in {len(sizes)} mini-batches")

    def describe_loss(self, error: Exception) -> str:
        """What is left of a run of which a rank has died."""
        text = f"of {world_size()} processes one has died or does not answer ({first_line(error)[:200]})"
        saved = self.start.folder and self.start.folder / f"checkpoint.{self.args.student}.pth.tar"
        if not saved or not saved.is_file():
            return f"{text}; no checkpoint had been written: start the run again"
        return f"{text}; the last checkpoint is intact, with any number of processes continue with --resume {shlex.quote(str(saved))}"

    def log_settings(self, training: Training) -> None:
        """Everything that decides the result, before the first epoch."""
        args, images, log = self.args, self.images, training.run.log
        log("settings: " + ", ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))
        log(
            f"data: {images.source}, {len(images.train)} training and {len(images.test)} test images, {len(images.classes)} classes"
        )
        log(
            f"device: {self.device}, {torch.get_num_threads()} CPU threads; optimizer: {type(training.optimizer).__name__}"
        )
        log(str(self.acceleration))
        for note in self.acceleration.notes:
            log(note)
        if world_size() > 1:
            log(
                f"processes: {world_size()}, {local_world_size()} on this machine, {torch.distributed.get_backend()}; sizes of mini-batches are over "
                f"all of them; BatchNorm's statistics are over {'all' if args.sync_bn else 'the share of each'}"
            )
        for name, value in training.facts.get("teacher", {}).items():
            log(f"teacher {name}: {value}")
        log(f"keeping HTrate={args.HTrate:g} of the filters, that is prune_rate={args.prune_rate:g} removed")
        log(f"schedule: {describe_schedule(training.train_loader.sizes(0))}")
        log(format_plan(training.plan))
        for note in self.start.notes:
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


def launcher() -> list[str]:
    """The words before the script's name in a command line that starts this run again."""
    if world_size() == 1:
        return ["python"]
    machines = world_size() // local_world_size()
    nodes = []
    if machines > 1:
        # Without a place to meet, torchrun would wait on every machine for itself.
        meeting = f"{os.environ.get('MASTER_ADDR', 'FIRST_MACHINE')}:29500"
        nodes = ["--nnodes", str(machines), "--rdzv_backend", "c10d", "--rdzv_endpoint", meeting]
    return ["torchrun", *nodes, "--nproc_per_node", str(local_world_size())]


def prepare_process(args: argparse.Namespace) -> None:
    """What every run does before it builds anything: arithmetic and memory of the CPU, and seeds."""
    flush_denormals()
    reuse_freed_memory()
    if args.deterministic:
        make_deterministic()
    seed_everything(args.manualSeed)


def choose_start(args: argparse.Namespace, given: set[str], settle: Callable) -> tuple[argparse.Namespace, Start]:
    """The settings, and where the run starts.

    Args:
        given: names of the settings that the command line gives.
        settle: the script's own way from (args, given, checkpoint or None) to the settings.
    """
    # With auto the checkpoint is looked for later.
    checkpoint = checkpoints.read(args.resume) if args.resume not in (None, "auto") else None
    args = settle(args, given, checkpoint)
    return args, find_start(args, given, checkpoint, args.student, run_name(args))


def run_name(args: argparse.Namespace) -> str:
    """The folder in runs/ of a run without --save_path."""
    rate = "" if args.HTrate == 1 else f"-HT{args.HTrate:g}"
    rate += "-small" if args.widths_of else ""
    return f"{args.recipe}-{args.dataset}-{args.student}{rate}-seed{args.manualSeed}"


def load_teacher(args: argparse.Namespace, trained_by: Callable[[str | None], list[str]]) -> nn.Module | None:
    """The network of --teacher, checked against --arch; None for a run without.

    Args:
        trained_by: the command line that trains a teacher of this name, or of one to propose.
    """
    if args.evaluate:
        return None
    if not args.teacher:
        if not args.arch_small and args.recipe not in ("distill", "prune_distill"):
            return None
        command = shlex.join(trained_by(args.arch if args.arch_small else None))
        raise UserError(
            f"distillation needs a trained teacher: add --teacher FILE; this trains one: {command} --recipe baseline"
        )
    arch, teacher = models.load_with_name(args.teacher, args.arch)
    if args.arch_small and arch != args.arch:
        raise UserError(f"--teacher '{args.teacher}' is a {arch}, --arch says {args.arch}; use --arch {arch}")
    args.teacher_arch = arch
    return teacher


def build_objective(
    teacher: nn.Module | None, net: nn.Module, images: data.Data, test_loader, args: argparse.Namespace, device
):
    """Cross-entropy, or with a teacher distillation; and what results.json says of the teacher."""
    if teacher is None:
        return cross_entropy, {}
    classes = len(images.classes)
    teacher.to(device, memory_format=torch.channels_last).eval()
    sample = data.first_images(images.test, 2).to(device)
    with torch.no_grad():
        teachers_classes = teacher(sample).shape[1]
    if teachers_classes != classes:
        raise UserError(
            f"--teacher '{args.teacher}' tells {teachers_classes} classes apart, {args.dataset} has {classes}; "
            "use a teacher of the same data set"
        )
    tested = evaluate(teacher, test_loader, device)
    if is_first():
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
    objective = Distillation(
        teacher, net, sample, on=args.kd_on, loss=args.loss, weight=args.kd_weight, temperature=args.kd_T
    )
    facts = {"arch": args.teacher_arch, "file": args.teacher, "accuracy": tested.top1, "sha256": checksum(args.teacher)}
    return objective, {"teacher": facts}


def build_optimizer(net: nn.Module, adapters: nn.Module | None, args: argparse.Namespace):
    """Plain SGD where nothing is thresholded and no ball rolls, else AHSG_HT. Adapters are never thresholded."""
    groups = [{"params": list(net.parameters())}]
    common = dict(
        lr=args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.decay,
        nesterov=args.nesterov and args.momentum > 0,
    )
    plain = args.HTrate == 1 and args.v == 0
    if adapters is not None and list(adapters.parameters()):
        groups.append({"params": list(adapters.parameters()), **({} if plain else {"HTrate": 1})})
    if plain:
        # On a GPU one kernel for all parameters, on a CPU lists of them: torch's default there is a loop in Python.
        on_gpu = next(net.parameters()).is_cuda
        return torch.optim.SGD(groups, **({"fused": True} if on_gpu else {"foreach": True}), **common)
    return AHSG_HT(
        groups,
        v=args.v,
        HTrate=args.HTrate,
        heavy_ball=args.heavy_ball,
        norm=args.norm,
        regrow=not args.no_regrow,
        **common,
    )


def build_train_loader(images: data.Data, args: argparse.Namespace, device: torch.device) -> data.DataLoader:
    """The growing loader over the training images."""
    if args.batch_size < world_size():
        raise UserError(
            f"--batch_size {args.batch_size} leaves some of {world_size()} processes without an image; use a larger one, or fewer processes"
        )
    if args.batch_size > len(images.train):
        raise UserError(
            f"--batch_size {args.batch_size} is more than the {len(images.train)} training images; use a smaller one"
        )
    growth = dict(growth=args.growth, restart=not args.no_restart, max_batch_size=args.max_batch_size)
    try:
        return data.DataLoader(
            images.train,
            args.batch_size,
            args.k,
            shuffle=True,
            seed=args.manualSeed,
            **growth,
            **worker_options(args, device),
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def build_test_loader(images: data.Data, args: argparse.Namespace, device: torch.device) -> data.DataLoader:
    """The test images in mini-batches that a process can take through the network at once."""
    size = min(EVALUATION_BATCH, (args.max_images_per_step or EVALUATION_BATCH) * world_size())
    # Images in memory are handed out faster than a worker process could send them.
    options = worker_options(args, device) if isinstance(images.test, data.ImageFiles) else {}
    return data.DataLoader(images.test, size, **options)


def worker_options(args: argparse.Namespace, device: torch.device) -> dict:
    """Worker processes that live as long as the run, and memory that a GPU can read by itself."""
    if not args.workers:
        return {}
    return dict(
        num_workers=args.workers,
        persistent_workers=True,
        prefetch_factor=args.prefetch_factor,
        pin_memory=device.type == "cuda",
    )


def describe_schedule(sizes: list[int]) -> str:
    """The mini-batch schedule of an epoch: its sizes, and how many of each where they repeat."""
    runs = [(size, len(list(same))) for size, same in groupby(sizes)]
    parts = [f"{size} x{n}" if n > 1 else f"{size}" for size, n in runs]
    if len(parts) > 12:
        parts = [*parts[:4], "...", *parts[-4:]]
    return f"{len(sizes)} mini-batches in the first epoch: {', '.join(parts)} ({sum(sizes)} images)"
