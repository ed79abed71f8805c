"""What `--resume` means: which checkpoint a run starts from, whether it continues that run, and in which folder.

A checkpoint of this project carries its settings. Resumed, a run takes them over where the command line gives none, so
`--resume FILE` alone is the same run. With another --recipe than its own (finetune above all) the file is a starting
point instead: weights and momentum, a new folder, epoch 0. Files of other projects have no settings; with a recipe that
starts from trained weights they are a starting point, else the run continues at their epoch in a new folder.

A folder has up to three checkpoints of a run: checkpoint (the latest), previous (the one before) and best. `--resume
auto` takes the one that is furthest on among those that can be read, and names those that cannot.
"""

import argparse
import hashlib
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import models
from utils.base import checkpoint as checkpoints
from utils.base.arguments import path_name
from utils.base.errors import UserError
from utils.train.options import ALL, CONCERNED, alternatives
from utils.train.recipes import START_TRAINED
from utils.train.run_folder import RUNS, check_free, check_writable, new_run_path

SAME_RUN = [name for name, option in ALL.items() if option.same_run]
SAME_BATCHES = [name for name, option in ALL.items() if option.batches]
SAME_NETWORK = [name for name, option in ALL.items() if option.network and name != "HTrate"]
# What the plan of gradual pruning is made from, at the start of a run.
TARGET = ("macs_cut", "HTrate", "tied", "round_to", "allocation")
KINDS = ("checkpoint", "previous", "best")


@dataclass
class Start:
    """Where a run starts.

    Attributes:
        folder: the run's folder; None with --evaluate.
        checkpoint: its content, None for a new network.
        continues: epochs, metrics and random states continue; otherwise only weights and momentum are taken.
        resumed: where the folder is that of the checkpoint, its file and modification time in ns before it was read.
        notes: lines for the log.
    """

    folder: Path | None
    checkpoint: dict | None = None
    continues: bool = False
    resumed: tuple[Path, int] | None = None
    notes: list[str] = field(default_factory=list)


def choose_start(
    given: dict, settings: Callable[[dict, dict], argparse.Namespace], arch: str
) -> tuple[argparse.Namespace, Start]:
    """The settings, and where the run starts. Writes nothing.

    Args:
        given: options of the command line.
        settings: the script's function from (given, adopted) to the settings of the run.
        arch: the network of a file that does not name its own, where the command line names none.

    Raises:
        UserError: the checkpoint is of another network, or the folder holds another run or cannot be written to.
    """
    resume = given.get("resume")
    # With auto the checkpoint is looked for once the settings are known.
    arch = given.get("arch_small") or given.get("arch", arch)
    read = resume not in (None, "auto")
    modified = os.stat(resume).st_mtime_ns if read and os.path.isfile(resume) else None
    checkpoint = models.load_checkpoint(resume, arch) if read else None
    adopted = adopted_settings(given, checkpoint)
    if resume == "auto" and "save_path" in given:
        # Where the run in a folder that is named began with a trained network, its recipe has other numbers.
        found = _furthest(Path(given["save_path"]), arch, [])
        adopted["started_from"] = found and found[1].get("settings", {}).get("started_from")
    args = settings(given, adopted)
    has_teacher = args.teacher and os.path.isfile(args.teacher) and not args.evaluate
    args.teacher_sha256 = hashlib.sha256(Path(args.teacher).read_bytes()).hexdigest() if has_teacher else None
    notes: list[str] = []
    if resume == "auto":
        file, checkpoint, modified = _find_run(args, notes) or (None, None, None)
        args.resume = str(file) if file else None
    start = _place(args, checkpoint, modified)
    saved = (start.checkpoint or {}).get("settings")
    # The file of another run that gave this one its weights.
    args.started_from = saved.get("started_from") if start.continues and saved else args.resume
    return args, replace(start, notes=notes + start.notes)


def adopted_settings(given: dict, checkpoint: dict | None) -> dict:
    """Settings that a run takes over from the checkpoint that it resumes; the command line's come before them."""
    checkpoint = checkpoint or {}
    saved = checkpoint.get("settings", {})
    recipe = given.get("recipe", saved.get("recipe"))
    names = SAME_NETWORK
    if not given.get("evaluate") and saved and recipe == saved["recipe"]:
        names = [*SAME_RUN, "epochs", "data_path", "teacher", "teacher_cache", "arch", "arch_small"]
    elif not given.get("evaluate") and recipe == "finetune":
        names = [*SAME_NETWORK, "HTrate"]
    excluded = set(given).union(*map(alternatives, given))
    if {"arch", "arch_small"} & given.keys():
        excluded |= {"arch", "arch_small"}
    adopted = {name: saved[name] for name in names if name in saved and name not in excluded}
    if "arch" not in excluded and "arch" in checkpoint:
        adopted.setdefault("arch", checkpoint["arch"])
    if recipe == "finetune" and (checkpoint.get("small") or saved.get("recipe") == "prune_gradual"):
        adopted["HTrate"] = 1.0  # it is narrow already
    return adopted


def run_name(args: argparse.Namespace) -> str:
    """The folder in runs/ of a run without --save_path."""
    tags = (option.tag(getattr(args, name)) for name, option in ALL.items())
    return f"{args.recipe}-{args.dataset}-{args.student}{''.join(tags)}"


def _place(args: argparse.Namespace, checkpoint: dict | None, modified: int | None) -> Start:
    """Where a run starts, and in which folder; see choose_start."""
    arch = args.student
    saved_arch = (checkpoint or {}).get("arch", arch)
    if saved_arch != arch:
        flag = "arch_small" if args.arch_small else "arch"
        raise UserError(f"'{args.resume}' is a checkpoint of {saved_arch}, not of {arch}; use --{flag} {saved_arch}")
    if args.evaluate:
        return Start(None, checkpoint)
    saved = (checkpoint or {}).get("settings")
    if checkpoint and args.widths_of and not _equal("widths_of", (saved or {}).get("widths_of"), args.widths_of):
        raise UserError(
            f"--widths_of '{args.widths_of}' makes a new network, --resume '{args.resume}' takes one; leave one out"
        )
    # With another recipe, and without settings by one that starts from weights, the file is only a starting point.
    continues = args.recipe == saved["recipe"] if saved else args.recipe not in START_TRAINED
    if not saved or not continues:
        return Start(new_run_path(args.save_path, run_name(args)), checkpoint, continues and checkpoint is not None)
    notes = [f"note: other than in '{args.resume}': {change}" for change in changed_settings(args, checkpoint)]
    _check_position(args, checkpoint)
    _check_target(args, checkpoint)
    own = Path(args.resume).parent
    if args.save_path and Path(args.save_path).resolve() != own.resolve():
        return Start(new_run_path(args.save_path, ""), checkpoint, True, notes=notes)
    check_writable(own)
    check_free(own)
    is_latest = Path(args.resume).name == f"checkpoint.{arch}.pth.tar"
    latest = None if is_latest else _furthest(own, arch, [])
    if latest and checkpoints.progress(latest[1]) > checkpoints.progress(checkpoint):
        raise UserError(f"'{latest[0]}' is further on than '{args.resume}'; resume it, or choose another --save_path")
    return Start(own, checkpoint, True, (Path(args.resume), modified), notes)


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


def _check_target(args: argparse.Namespace, checkpoint: dict) -> None:
    """Raises UserError where a run of gradual pruning is continued with another amount, which its plan would ignore."""
    saved = checkpoint["settings"]
    for name in TARGET if checkpoint.get("pruning") else ():
        if name in saved and saved[name] != getattr(args, name):
            raise UserError(
                f"'{args.resume}' goes on with the plan that it began with, --{name} {saved[name]}, and cannot take "
                f"{getattr(args, name)}; leave that out, or begin a new run with its small network's file"
            )


def changed_settings(args: argparse.Namespace, checkpoint: dict) -> list[str]:
    """Settings of one run that differ from those a checkpoint was written with, "learning_rate 0.01 -> 0.1"; those that
    have no effect in either, as a loss without a teacher, are left out."""
    saved = checkpoint["settings"]
    # Cosine and gradual pruning are schedules over the whole run.
    names = [*SAME_RUN, "epochs"] if "cosine" in (args.lr_schedule, saved.get("lr_schedule")) else SAME_RUN
    now = vars(args)
    names = [n for n in names if any(CONCERNED[ALL[n].only](s) for s in (now, {**now, **saved}))]
    return [f"{n} {saved[n]} -> {now[n]}" for n in names if n in saved and not _equal(n, saved[n], now[n])]


def _equal(name: str, a: object, b: object) -> bool:
    """Whether two values of an option are one: of a file, two paths to it."""
    is_path = ALL[name].type is path_name and None not in (a, b)
    return a == b or (is_path and os.path.realpath(a) == os.path.realpath(b))


def _find_run(args: argparse.Namespace, notes: list[str]) -> tuple[Path, dict, int] | None:
    """The newest run with these settings that is no longer than this one: its furthest good checkpoint, the content and
    the modification time. None where there is none.

    Args:
        notes: gets a line for every checkpoint that is passed over because it cannot be read.

    Raises:
        UserError: --save_path holds checkpoints of another run, or none that can be read; or a run that needs a
            checkpoint finds none.
    """
    name = run_name(args)
    folders = [Path(args.save_path)] if args.save_path else [RUNS / name, *RUNS.glob(f"{name}-*")]
    matching, reason = [], None
    for folder in folders:
        found = _furthest(folder, args.student, notes)
        if found is None:
            continue
        checkpoint = found[1]
        changes = changed_settings(args, checkpoint) if "settings" in checkpoint else ["it has no settings"]
        if checkpoints.progress(checkpoint) > (args.epochs, 0):
            changes.append(f"it has {checkpoint['epoch']} epochs, more than --epochs {args.epochs}")
        file = checkpoint.get("settings", {}).get("started_from")
        if file and not args.save_path and args.recipe != "finetune":
            changes.append(f"it began with '{file}'")
        matching += [] if changes else [found]
        reason = f"holds another run ({', '.join(changes)})"
    if args.evaluate or not matching:  # otherwise the run's log has them
        print(*notes, sep="\n", end="\n" if notes else "", flush=True)
    if matching:
        return max(matching, key=lambda entry: entry[2])
    if args.save_path and (notes or reason):
        reason = reason or f"has no checkpoint that can be read ({notes[0].removeprefix('note: ')})"
        raise UserError(f"--resume auto: '{args.save_path}' {reason}; choose another --save_path")
    if args.evaluate or args.recipe == "finetune":
        raise UserError(f"--resume auto finds no such run in '{args.save_path or RUNS}'; name the checkpoint")
    return None


def _furthest(folder: Path, arch: str, notes: list[str]) -> tuple[Path, dict, int] | None:
    """The latest checkpoint of a folder, or where it is missing or damaged the one of the others that is further on."""
    found: list[tuple[Path, dict, int]] = []
    for file in (folder / f"{kind}.{arch}.pth.tar" for kind in KINDS):
        if file.is_file() and not (found and found[0][0].name.startswith("checkpoint.")):
            modified = file.stat().st_mtime_ns
            try:
                found.append((file, checkpoints.read(file), modified))
            except UserError as error:
                notes.append(f"note: {error}")
    return max(found, key=lambda entry: checkpoints.progress(entry[1]), default=None)


def resume_command(script: str, argv: list[str], file: str, launcher: list[str]) -> str:
    """The command line of a run that continues from `file`: that of the run itself, with this --resume.

    Args:
        script: file name of the training script.
        argv: its arguments.
        file: a checkpoint of the run.
        launcher: the words before the script.
    """
    old = {i for i, word in enumerate(argv) if word == "--resume" or argv[i - 1 : i] == ["--resume"]}
    kept = [word for i, word in enumerate(argv) if i not in old and not word.startswith("--resume=")]
    # Outside of an activated environment `python` and `torchrun` may be others, or none.
    torchrun = ["-m", "torch.distributed.run"] if launcher[0] == "torchrun" else []
    program = sys.argv[0] if os.path.basename(sys.argv[0]) == script else script
    return shlex.join([sys.executable, *torchrun, *launcher[1:], program, *kept, "--resume", file])
