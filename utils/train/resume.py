"""What `--resume` means: which checkpoint a run starts from, whether it continues that run, and in which folder.

A checkpoint of this project carries its settings. Resumed, a run takes them over where the command line gives none, so
`--resume FILE` alone is the same run. With another --recipe than its own (finetune above all) the file is a starting
point instead: weights and momentum, a new folder, epoch 0. Files of other projects have no settings; with a recipe that
starts from trained weights they are a starting point, else the run continues at their epoch in a new folder.

A folder has up to three checkpoints of a run: checkpoint (the latest), previous (the one before) and best. `--resume
auto` takes the one that is furthest on among those that can be read, and names those that cannot.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import models
from utils.base import checkpoint as checkpoints
from utils.base.arguments import OneLineParser
from utils.base.errors import UserError
from utils.train.distillation import checksum
from utils.train.options import ALL, check_saved
from utils.train.run_folder import RUNS, check_writable, file_stamp, holds_a_run, new_run_path
from utils.train.run_lock import check_free

SAME_RUN = [name for name, option in ALL.items() if option.same_run]
SAME_BATCHES = [name for name, option in ALL.items() if option.batches]
SAME_NETWORK = [name for name, option in ALL.items() if option.network]
KINDS = ("checkpoint", "previous", "best")
# Recipes that start from trained weights: a file without settings is their starting point.
START_FROM_WEIGHTS = ("finetune", "prune_gradual")


@dataclass
class Start:
    """Where a run starts.

    Attributes:
        folder: the run's folder; None with --evaluate.
        checkpoint: its content, None for a new network.
        continues: epochs, metrics and random states continue; otherwise only weights and momentum are taken.
        folder_is_its_own: the folder is that of the checkpoint.
        begins_again: the folder holds no more than the log of a run that ended before its first checkpoint.
        file: the checkpoint's.
        stamp: of that file just before it was read; see file_stamp.
        notes: lines for the log.
    """

    folder: Path | None
    checkpoint: dict | None = None
    continues: bool = False
    folder_is_its_own: bool = False
    begins_again: bool = False
    file: Path | None = None
    stamp: tuple | None = None
    notes: list[str] = field(default_factory=list)

    def origin(self, resumed: str | None) -> str | None:
        """The file of another run that gave this one its weights; None for new weights."""
        if self.checkpoint is None:
            return None
        saved = self.checkpoint.get("settings")
        return saved.get("started_from") if self.continues and saved else resumed


def choose_start(
    given: dict, parser: OneLineParser, settings: Callable[[dict, dict], argparse.Namespace], arch: str
) -> tuple[argparse.Namespace, Start]:
    """The settings, and where the run starts. Writes nothing.

    Args:
        given: options of the command line.
        parser: the script's, for settings that come from a checkpoint.
        settings: the script's function from (given, adopted) to the settings of the run.
        arch: the network of a file that does not name its own, where the command line names none.

    Raises:
        UserError: the checkpoint is of another network, or the folder holds another run or cannot be written to.
    """
    resume = given.get("resume")
    # With auto the checkpoint is looked for once the settings are known.
    arch = given.get("arch_small") or given.get("arch", arch)
    checkpoint = models.load_checkpoint(resume, arch) if resume not in (None, "auto") else None
    args = settings(given, adopted_settings(given, parser, checkpoint))
    has_teacher = args.teacher and os.path.isfile(args.teacher) and not args.evaluate
    args.teacher_sha256 = checksum(args.teacher) if has_teacher else None
    return args, find_start(args, given, checkpoint)


def adopted_settings(given: dict, parser: OneLineParser, checkpoint: dict | None) -> dict:
    """Settings that a run takes over from the checkpoint that it resumes; the command line's come before them."""
    checkpoint = checkpoint or {}
    saved = checkpoint.get("settings", {})
    recipe = given.get("recipe", saved.get("recipe"))
    if given.get("evaluate"):
        names = [name for name in SAME_NETWORK if name != "HTrate"]
    elif saved and recipe == saved["recipe"]:
        names = [*SAME_RUN, "epochs", "data_path", "teacher", "arch", "arch_small"]
    else:
        names = [name for name in SAME_NETWORK if name != "HTrate"] + (["HTrate"] if recipe == "finetune" else [])
    # A rate excludes the other way to give one, --arch the student's name, --fit_schedule a schedule.
    excluded = {"arch", "arch_small"} if {"arch", "arch_small"} & given.keys() else set()
    excluded |= {"HTrate", "macs_cut"} if {"HTrate", "prune_rate", "macs_cut"} & given.keys() else set()
    excluded |= {"kd"} if "loss" in given else set()
    excluded |= {"schedule"} if "fit_schedule" in given else set()
    known = {action.dest for action in parser._actions} - excluded - given.keys()
    adopted = {name: saved[name] for name in names if name in saved and name in known}
    for name, value in adopted.items():
        check_saved(parser, name, value, given["resume"])
    if "arch" not in adopted and not excluded & {"arch"} and "arch" in checkpoint:
        adopted["arch"] = checkpoint["arch"]
    if recipe == "finetune" and (checkpoint.get("small") or saved.get("recipe") == "prune_gradual"):
        adopted["HTrate"] = 1.0  # it is narrow already
    return adopted


def run_name(args: argparse.Namespace) -> str:
    """The folder in runs/ of a run without --save_path."""
    rate = f"-cut{args.macs_cut:g}" if args.macs_cut else "" if args.HTrate == 1 else f"-HT{args.HTrate:g}"
    rate += "-small" if args.widths_of else ""
    return f"{args.recipe}-{args.dataset}-{args.student}{rate}-seed{args.manualSeed}"


def find_start(args: argparse.Namespace, given: dict, checkpoint: dict | None) -> Start:
    """Decides where a run starts; `--resume auto` in args becomes the file that was found, or None. See
    choose_start.
    """
    arch, name = args.student, run_name(args)
    damaged: list[str] = []
    again = None
    if args.resume == "auto":
        again = _abandoned(args, name)
        found, checkpoint = _find_run(args, arch, name, damaged)
        if found is None and (args.evaluate or args.recipe == "finetune"):
            raise UserError(f"--resume auto finds no such run in '{args.save_path or RUNS}'; name the checkpoint")
        for line in damaged:
            print(line, flush=True)
        args.resume = str(found) if found else None
    stamp = file_stamp(Path(args.resume)) if args.resume else None
    if checkpoint is None:
        if args.evaluate:
            return Start(None)
        if again is not None:
            check_writable(again)
            return Start(again, begins_again=True, notes=damaged)
        return Start(new_run_path(args.save_path, name), notes=damaged)
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
    if (saved and args.recipe != saved["recipe"]) or (not saved and args.recipe in START_FROM_WEIGHTS):
        return Start(new_run_path(args.save_path, name), checkpoint)
    if not saved:
        return Start(new_run_path(args.save_path, name), checkpoint, continues=True)
    changes = changed_settings(args, checkpoint)
    notes = damaged + [f"note: other than in '{args.resume}': {change}" for change in changes]
    _check_position(args, checkpoint)
    own = Path(args.resume).parent
    if args.save_path and Path(args.save_path).resolve() != own.resolve():
        return Start(new_run_path(args.save_path, name), checkpoint, continues=True, notes=notes)
    check_writable(own)
    check_free(own)
    latest = own / f"checkpoint.{arch}.pth.tar"
    is_latest = latest.exists() and latest.samefile(args.resume)
    if not is_latest and _progress(latest) > checkpoints.progress(checkpoint):
        raise UserError(f"'{latest}' is further on than '{args.resume}'; resume it, or choose another --save_path")
    return Start(
        own, checkpoint, continues=True, folder_is_its_own=True, file=Path(args.resume), stamp=stamp, notes=notes
    )


def _check_position(args: argparse.Namespace, checkpoint: dict) -> None:
    """Raises UserError when a checkpoint from the middle of an epoch cannot be continued with these settings."""
    epoch, position = checkpoints.progress(checkpoint)
    if not position:
        return
    changed = [n for n in SAME_BATCHES if n in checkpoint["settings"] and checkpoint["settings"][n] != getattr(args, n)]
    where = f"'{args.resume}' is {position} mini-batches into epoch {epoch}"
    if changed:
        raise UserError(
            f"{where}, which another --{changed[0]} ({getattr(args, changed[0])}) would cut differently; leave it out, "
            "or resume a checkpoint from the end of an epoch"
        )
    if epoch >= args.epochs:
        raise UserError(f"{where}, --epochs {args.epochs} ends before; use a larger --epochs")


def changed_settings(args: argparse.Namespace, checkpoint: dict) -> list[str]:
    """Settings of one run that differ from those a checkpoint was written with, "learning_rate 0.01 -> 0.1"."""
    saved = checkpoint["settings"]
    return [f"{n} {saved[n]} -> {getattr(args, n)}" for n in SAME_RUN if n in saved and saved[n] != getattr(args, n)]


def _find_run(args: argparse.Namespace, arch: str, name: str, damaged: list[str]) -> tuple[Path | None, dict | None]:
    """The newest run with these settings that is no longer than this one: its furthest good checkpoint, and the
    content.

    Args:
        damaged: gets a line for every checkpoint that is passed over because it cannot be read.

    Raises:
        UserError: --save_path holds checkpoints of another run, or none that can be read.
    """
    folders = [Path(args.save_path)] if args.save_path else [RUNS / name, *RUNS.glob(f"{name}-*")]
    matching, reason = [], None
    for folder in folders:
        file, checkpoint = _furthest(folder, arch, damaged)
        if checkpoint is None:
            continue
        changes = changed_settings(args, checkpoint) if "settings" in checkpoint else ["it has no settings"]
        if checkpoints.progress(checkpoint) > (args.epochs, 0):
            changes.append(f"it has {checkpoint['epoch']} epochs, more than --epochs {args.epochs}")
        if not changes:
            matching.append((file.stat().st_mtime, file, checkpoint))
        reason = f"holds another run ({', '.join(changes)})"
    if matching:
        return max(matching, key=lambda entry: entry[:2])[1:]
    if args.save_path and (damaged or reason):
        reason = reason or f"has no checkpoint that can be read ({damaged[0].removeprefix('note: ')})"
        raise UserError(f"--resume auto: '{args.save_path}' {reason}; choose another --save_path")
    return None, None


def _abandoned(args: argparse.Namespace, name: str) -> Path | None:
    """The folder of a run that was killed before its first checkpoint, None where there is none."""
    folder = Path(args.save_path) if args.save_path else RUNS / name
    if not holds_a_run(folder) or any(n.endswith(".pth.tar") or n == "results.json" for n in os.listdir(folder)):
        return None
    try:
        check_free(folder)
    except UserError:
        if args.save_path:
            raise
        return None
    return folder


def _furthest(folder: Path, arch: str, damaged: list[str]) -> tuple[Path | None, dict | None]:
    """The checkpoint of a folder that is furthest on: the latest, or where it is missing or damaged the better of the
    others.
    """
    found: list[tuple[tuple[int, int], Path, dict]] = []
    for kind in KINDS:
        file = folder / f"{kind}.{arch}.pth.tar"
        if not file.is_file() or (found and found[0][1].name.startswith("checkpoint.")):
            continue
        try:
            checkpoint = checkpoints.read(file)
        except UserError as error:
            damaged.append(f"note: {error}")
            continue
        found.append((checkpoints.progress(checkpoint), file, checkpoint))
    return max(found, key=lambda entry: entry[0])[1:] if found else (None, None)


def _progress(file: Path) -> tuple[int, int]:
    """How far a checkpoint is, (-1, 0) where there is none that can be read."""
    try:
        return checkpoints.progress(checkpoints.read(file))
    except UserError:
        return -1, 0


def resume_command(script: str, argv: list[str], file: str, launcher: list[str]) -> str:
    """The command line of a run that continues from `file`: that of the run itself, with this --resume.

    Args:
        script: file name of the training script.
        argv: its arguments.
        file: a checkpoint of the run.
        launcher: the words before the script.
    """
    kept, left = [], list(argv)
    while left:
        word = left.pop(0)
        if word == "--resume":
            left[:1] = []
        elif not word.startswith("--resume="):
            kept.append(word)
    if launcher == ["python"]:
        # Outside of an activated environment `python` may be another one, or none.
        found = shutil.which("python")
        launcher = launcher if found and os.path.samefile(found, sys.executable) else [sys.executable]
    elif launcher[0] == "torchrun":
        found = shutil.which("torchrun")
        own = found and os.path.samefile(os.path.dirname(found), os.path.dirname(sys.executable))
        launcher = launcher if own else [sys.executable, "-m", "torch.distributed.run", *launcher[1:]]
    program = sys.argv[0] if os.path.basename(sys.argv[0]) == script else script
    return shlex.join([*launcher, program, *kept, "--resume", file])
