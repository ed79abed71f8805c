"""What `--resume` means: which checkpoint a run starts from, whether it continues that run, and in which folder.

A checkpoint of this project carries its settings. Resumed, a run takes them over where the command line is silent, so that
`--resume FILE` alone is the same run. With another --recipe than its own (finetune above all) the file is a starting point
instead: weights and momentum, a new folder, epoch 0. Files of others have no settings; they continue at their epoch in a new folder.

A folder has up to three checkpoints of a run: checkpoint (the latest), previous (the one before) and best. Of these `--resume auto`
takes the one that is furthest on among those that can be read, and names those that cannot.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.train.options import is_setting
from utils.train.run_folder import RUNS, check_writable, file_stamp, holds_a_run, new_run_path
from utils.train.run_lock import check_free

# Settings that two runs share when they are the same run.
SAME_RUN = (
    *("recipe", "dataset", "data_path", "batch_size", "k", "growth", "max_batch_size", "no_restart", "learning_rate"),
    *(
        "momentum",
        "decay",
        "schedule",
        "gammas",
        "HTrate",
        "v",
        "heavy_ball",
        "norm",
        "threshold_every",
        "no_regrow",
        "manualSeed",
    ),
    *("teacher", "loss", "kd_on", "kd_weight", "kd_T", "share_classifier", "widths_of"),
    *("amp", "compile", "deterministic"),
    *("nesterov", "max_images_per_step", "sync_bn", "image_size", "use_pretrain"),
)
# Those that decide which images make up a mini-batch, and so what a position in the middle of an epoch means.
SAME_BATCHES = ("dataset", "batch_size", "k", "growth", "max_batch_size", "no_restart", "manualSeed")
KINDS = ("checkpoint", "previous", "best")
# Of these a new run that starts from a checkpoint keeps what describes the network.
SAME_NETWORK = ("dataset", "HTrate", "norm", "image_size")


@dataclass
class Start:
    """Where a run starts.

    Attributes:
        folder: the run's folder; None with --evaluate.
        checkpoint: its content, None for a new network.
        continues: epochs, metrics and random states go on; otherwise only weights and momentum are taken.
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
        """The file of another run that gave this one its weights, also when this run is continued later; None for new weights."""
        if self.checkpoint is None:
            return None
        saved = self.checkpoint.get("settings")
        return saved.get("started_from") if self.continues and saved else resumed


def adopt_settings(args: argparse.Namespace, given: set[str], checkpoint: dict | None) -> None:
    """Fills options that the command line does not give from the settings of the checkpoint that is resumed."""
    saved = (checkpoint or {}).get("settings")
    if not saved:
        return
    if args.evaluate:
        names = ("dataset", "image_size")
    elif is_same_recipe(args, given, saved):
        names = (*SAME_RUN, "epochs")
    else:
        names = SAME_NETWORK
    if not given & {"arch", "arch_small"}:
        if not args.evaluate and is_same_recipe(args, given, saved):
            # --arch may be the teacher's.
            names = (*names, "arch", "arch_small")
        else:
            args.arch = checkpoint["arch"] if isinstance(checkpoint.get("arch"), str) else args.arch
    taken = given | ({"HTrate"} if "prune_rate" in given else set()) | ({"schedule"} if args.fit_schedule else set())
    for name in names:
        if name in saved and name not in taken:
            if not is_setting(name, saved[name]):
                raise UserError(
                    f"'{args.resume}' was saved with {name}={saved[name]!r}, which is no such setting; give --{name}"
                )
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
    if checkpoint is None and args.evaluate:
        return Start(None)
    if checkpoint is None and again is not None:
        check_writable(again)
        return Start(again, begins_again=True, notes=damaged)
    if checkpoint is None:
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
    if args.recipe == "finetune" and not saved:
        return Start(new_run_path(args.save_path, name), checkpoint)
    if not saved:
        return Start(new_run_path(args.save_path, name), checkpoint, continues=True)
    if not is_same_recipe(args, given, saved):
        return Start(new_run_path(args.save_path, name), checkpoint)
    notes = damaged + [
        f"note: other than in '{args.resume}': {change}" for change in changed_settings(args, checkpoint)
    ]
    _check_position(args, checkpoint)
    own = Path(args.resume).parent
    if args.save_path and Path(args.save_path).resolve() != own.resolve():
        return Start(new_run_path(args.save_path, name), checkpoint, continues=True, notes=notes)
    check_writable(own)
    check_free(own)
    latest = own / f"checkpoint.{arch}.pth.tar"
    if not _same_file(latest, args.resume) and _progress(latest) > checkpoints.progress(checkpoint):
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
    if changed:
        raise UserError(
            f"'{args.resume}' is {position} mini-batches into an epoch, which another --{changed[0]} ({getattr(args, changed[0])}) would "
            "cut differently; leave it out, or resume a checkpoint from the end of an epoch"
        )
    if epoch >= args.epochs:
        raise UserError(
            f"'{args.resume}' is {position} mini-batches into epoch {epoch + 1}, --epochs {args.epochs} ends before; use a larger --epochs"
        )


def changed_settings(args: argparse.Namespace, checkpoint: dict) -> list[str]:
    """Settings that differ from those a checkpoint was written with, "lr 0.01 -> 0.1"."""
    saved = checkpoint["settings"]
    return [f"{n} {saved[n]} -> {getattr(args, n)}" for n in SAME_RUN if n in saved and saved[n] != getattr(args, n)]


def _find_run(args: argparse.Namespace, arch: str, name: str, damaged: list[str]) -> tuple[Path | None, dict | None]:
    """The newest run with these settings that is no longer than this one: its furthest good checkpoint, and the content.

    Args:
        damaged: gets a line for every checkpoint that is passed over because it cannot be read.

    Raises:
        UserError: --save_path has checkpoints, and none can be read.
    """
    folders = [Path(args.save_path)] if args.save_path else [RUNS / name, *RUNS.glob(f"{name}-*")]
    matching = []
    for folder in folders:
        file, checkpoint = _furthest(folder, arch, damaged)
        if checkpoint is None:
            continue
        is_same = "settings" in checkpoint and not changed_settings(args, checkpoint)
        if is_same and checkpoints.progress(checkpoint) <= (args.epochs, 0):
            matching.append((file.stat().st_mtime, file, checkpoint))
    if not matching:
        if damaged and args.save_path and all(not _readable(folders[0], arch, kind) for kind in KINDS):
            raise UserError(
                f"{damaged[0].removeprefix('note: ')}; none in '{folders[0]}' can be read: choose another --save_path"
            )
        return None, None
    _, file, checkpoint = max(matching, key=lambda entry: entry[:2])
    return file, checkpoint


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
    """The checkpoint of a folder that is furthest on: the latest, or where it is missing or damaged the better of the others."""
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
    if not found:
        return None, None
    _, file, checkpoint = max(found, key=lambda entry: entry[0])
    return file, checkpoint


def _readable(folder: Path, arch: str, kind: str) -> bool:
    return _progress(folder / f"{kind}.{arch}.pth.tar") >= (0, 0)


def _progress(file: Path) -> tuple[int, int]:
    """How far a checkpoint is, (-1, 0) where there is none that can be read."""
    try:
        return checkpoints.progress(checkpoints.read(file))
    except UserError:
        return -1, 0


def _same_file(a: Path, b: str | Path) -> bool:
    return a.exists() and a.samefile(b)


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
