"""What `--resume` means: which checkpoint a run starts from, whether it continues that run, and in which folder.

A checkpoint of this project carries its settings. Resumed, a run takes them over where the command line is silent, so that
`--resume FILE` alone is the same run. With another --recipe than its own (finetune above all) the file is a starting point
instead: weights and momentum, a new folder, epoch 0. Files of others have no settings; they continue at their epoch in a new folder.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from utils import checkpoint as checkpoints
from utils.errors import UserError
from utils.run_folder import RUNS, check_writable, new_run_path

# Settings that two runs share when they are the same run.
SAME_RUN = (
    *("recipe", "dataset", "data_path", "batch_size", "k", "growth", "max_batch_size", "no_restart", "learning_rate"),
    *("momentum", "decay", "schedule", "gammas", "HTrate", "v", "heavy_ball", "norm", "threshold_every", "manualSeed"),
    *("teacher", "loss", "kd_on", "kd_weight", "kd_T", "share_classifier", "widths_of"),
    *("max_images_per_step", "sync_bn"),
)
# Of these a new run that starts from a checkpoint keeps what describes the network.
SAME_NETWORK = ("dataset", "HTrate", "norm")


@dataclass
class Start:
    """Where a run starts.

    Attributes:
        folder: the run's folder; None with --evaluate.
        checkpoint: its content, None for a new network.
        continues: epochs, metrics and random states go on; otherwise only weights and momentum are taken.
        folder_is_its_own: the folder is that of the checkpoint.
        notes: lines for the log.
    """

    folder: Path | None
    checkpoint: dict | None = None
    continues: bool = False
    folder_is_its_own: bool = False
    notes: list[str] = field(default_factory=list)


def adopt_settings(args: argparse.Namespace, given: set[str], checkpoint: dict | None) -> None:
    """Fills options that the command line does not give from the settings of the checkpoint that is resumed."""
    saved = (checkpoint or {}).get("settings")
    if not saved:
        return
    if args.evaluate:
        names = ("dataset",)
    elif is_same_recipe(args, given, saved):
        names = (*SAME_RUN, "epochs")
    else:
        names = SAME_NETWORK
    taken = given | ({"HTrate"} if "prune_rate" in given else set()) | ({"schedule"} if args.fit_schedule else set())
    for name in names:
        if name in saved and name not in taken:
            # A constant mini-batch is a choice, which the recipe must not fill in again.
            setattr(args, name, "none" if name == "k" and saved[name] is None else saved[name])


def is_same_recipe(args: argparse.Namespace, given: set[str], saved: dict) -> bool:
    return "recipe" not in given or args.recipe == saved["recipe"]


def find_start(args: argparse.Namespace, given: set[str], checkpoint: dict | None, arch: str, name: str) -> Start:
    """Decides where a run starts. Makes nothing.

    Args:
        args: the resolved settings; `--resume auto` becomes the file that was found, or None.
        given: options that the command line gave.
        checkpoint: the content of the file of --resume, None without one or for auto.
        arch: the network that is trained.
        name: of the run's folder in runs/ where no --save_path is given.

    Raises:
        UserError: the checkpoint is of another network, or the folder holds another run or cannot be written to.
    """
    if args.resume == "auto":
        found = _find_run(args, arch, name)
        if found is None and (args.evaluate or args.recipe == "finetune"):
            raise UserError(f"--resume auto finds no such run in '{args.save_path or RUNS}'; name the checkpoint")
        args.resume = str(found) if found else None
        checkpoint = checkpoints.read(found) if found else None
    if checkpoint is None:
        return Start(new_run_path(args.save_path, name))
    saved_arch = checkpoint.get("arch", arch)
    if saved_arch != arch:
        raise UserError(f"'{args.resume}' is a checkpoint of {saved_arch}, not of {arch}; use --arch {saved_arch}")
    if args.evaluate:
        return Start(None, checkpoint)
    saved = checkpoint.get("settings")
    if args.widths_of and (saved or {}).get("widths_of") != args.widths_of:
        raise UserError(
            f"--widths_of '{args.widths_of}' makes a new network, --resume '{args.resume}' takes one; leave one out"
        )
    if args.recipe == "finetune" and not saved:
        return Start(new_run_path(args.save_path, name), checkpoint)
    if not saved:
        return Start(new_run_path(args.save_path, name), checkpoint, continues=True)
    if not is_same_recipe(args, given, saved):
        return Start(new_run_path(args.save_path, name), checkpoint)
    notes = [f"note: other than in '{args.resume}': {change}" for change in changed_settings(args, checkpoint)]
    own = Path(args.resume).parent
    if args.save_path and Path(args.save_path).resolve() != own.resolve():
        return Start(new_run_path(args.save_path, name), checkpoint, continues=True, notes=notes)
    check_writable(own)
    latest = own / f"checkpoint.{arch}.pth.tar"
    if _epochs(latest) > checkpoint["epoch"]:
        raise UserError(f"'{latest}' is further on than '{args.resume}'; resume it, or choose another --save_path")
    return Start(own, checkpoint, continues=True, folder_is_its_own=True, notes=notes)


def changed_settings(args: argparse.Namespace, checkpoint: dict) -> list[str]:
    """Settings that differ from those a checkpoint was written with, "lr 0.01 -> 0.1"."""
    saved = checkpoint["settings"]
    return [f"{n} {saved[n]} -> {getattr(args, n)}" for n in SAME_RUN if n in saved and saved[n] != getattr(args, n)]


def _find_run(args: argparse.Namespace, arch: str, name: str) -> Path | None:
    """The newest checkpoint of a run with these settings that is no longer than this one."""
    folders = [Path(args.save_path)] if args.save_path else [RUNS / name, *RUNS.glob(f"{name}-*")]
    matching = []
    for folder in folders:
        file = folder / f"checkpoint.{arch}.pth.tar"
        if 0 <= _epochs(file) <= args.epochs:
            checkpoint = checkpoints.read(file)
            if "settings" in checkpoint and not changed_settings(args, checkpoint):
                matching.append((file.stat().st_mtime, file))
    return max(matching)[1] if matching else None


def _epochs(file: Path) -> int:
    """Epochs done of a checkpoint, -1 where there is none that can be read."""
    try:
        return checkpoints.read(file).get("epoch", 0)
    except UserError:
        return -1
