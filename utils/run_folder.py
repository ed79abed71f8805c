"""The folder of one run: log, metrics.csv, results.json, curves.png and checkpoints."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
from pathlib import Path

from utils import checkpoint as checkpoints
from utils.errors import UserError

RUNS = Path("runs")
METRICS = ("epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "images_per_s", "seconds")


class RunFolder:
    """Writes what a run leaves behind. Made by `new_run` or `continue_run`.

    Attributes:
        path: the folder.
        log_path: log_seed_<n>.txt, appended to.
    """

    def __init__(self, path: Path, seed: int):
        self.path = path
        self.log_path = path / f"log_seed_{seed}.txt"
        try:
            path.mkdir(parents=True, exist_ok=True)
            with open(self.log_path, "a"):
                pass
        except OSError as error:
            raise UserError(
                f"cannot write to save path '{path}' ({error.strerror}); choose another --save_path"
            ) from None

    def log(self, text: str, *, show: bool = True) -> None:
        """Appends a line to the log file and prints it."""
        if show:
            print(text, flush=True)
        try:
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write '{self.log_path}' ({error.strerror}); the last checkpoint is intact"
            ) from None

    def checkpoint_path(self, arch: str, kind: str = "checkpoint") -> Path:
        """checkpoint.<arch>.pth.tar or best.<arch>.pth.tar."""
        return self.path / f"{kind}.{arch}.pth.tar"

    def save_checkpoint(self, checkpoint: dict, is_best: bool) -> None:
        arch = checkpoint["arch"]
        paths = [self.checkpoint_path(arch, "best")] if is_best else []
        checkpoints.write(checkpoint, *paths, self.checkpoint_path(arch))

    def write_metrics(self, history: list[dict]) -> None:
        """metrics.csv, a row per epoch; as a whole, so that it always agrees with the checkpoint beside it."""
        text = io.StringIO()
        writer = csv.DictWriter(text, METRICS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{row[name]:.6g}" for name in METRICS} for row in history)
        checkpoints.replace_file(self.path / "metrics.csv", text.getvalue().encode())

    def write_results(self, results: dict) -> None:
        checkpoints.replace_file(self.path / "results.json", (json.dumps(results, indent=1) + "\n").encode())


def holds_a_run(path: Path) -> bool:
    return path.is_dir() and any(
        (path / "results.json").is_file() or file.name.endswith(".pth.tar") for file in path.iterdir()
    )


# Settings that a continued run must share with its checkpoint to be the same run.
SAME_RUN = (
    "recipe",
    "dataset",
    "batch_size",
    "k",
    "growth",
    "max_batch_size",
    "no_restart",
    "learning_rate",
    "momentum",
    "decay",
)
SAME_RUN += (
    "schedule",
    "gammas",
    "HTrate",
    "v",
    "heavy_ball",
    "norm",
    "threshold_every",
    "manualSeed",
    "teacher",
    "loss",
    "kd_on",
)
SAME_RUN += ("kd_weight", "kd_T")


def choose_folder(args: argparse.Namespace, arch: str, default_name: str) -> tuple[Path | None, dict | None]:
    """The folder that a run writes to (None for --evaluate), and the checkpoint that it starts from (None for a new run).

    A run that is continued stays in the folder of its checkpoint unless --save_path names another. `--resume auto` continues
    the run in --save_path (or in the default folder) if it is there and has the same settings, and starts a new one otherwise;
    args.resume is then the checkpoint's path or None.

    Raises:
        UserError: the checkpoint cannot be used, or the folder holds another run or cannot be written to.
    """
    if args.resume == "auto":
        folder = Path(args.save_path) if args.save_path else RUNS / default_name
        found = folder / f"checkpoint.{arch}.pth.tar"
        args.resume = str(found) if found.is_file() and not changed_settings(args, checkpoints.read(found)) else None
        if args.resume is None and args.evaluate:
            raise UserError(f"--resume auto finds no checkpoint of this run in '{folder}'; name the file")
    if not args.resume:
        return new_run_path(args.save_path, default_name), None
    checkpoint = checkpoints.read(args.resume)
    saved_arch = checkpoint.get("arch", arch)
    if saved_arch != arch:
        raise UserError(f"'{args.resume}' is a checkpoint of {saved_arch}, not of {arch}; use --arch {saved_arch}")
    if args.evaluate:
        return None, checkpoint
    if args.recipe == "finetune":
        return new_run_path(args.save_path, default_name), checkpoint
    for change in changed_settings(args, checkpoint):
        print(f"note: other than in '{args.resume}': {change}")
    own = Path(args.resume).parent
    if "settings" not in checkpoint or (args.save_path and Path(args.save_path).resolve() != own.resolve()):
        # Files of others stay alone in their folder.
        return new_run_path(args.save_path, default_name), checkpoint
    check_writable(own)
    latest = own / f"checkpoint.{arch}.pth.tar"
    if (
        latest.is_file()
        and not latest.samefile(args.resume)
        and checkpoints.read(latest)["epoch"] > checkpoint["epoch"]
    ):
        raise UserError(f"'{latest}' is further on than '{args.resume}'; resume it, or choose another --save_path")
    return own, checkpoint


def changed_settings(args: argparse.Namespace, checkpoint: dict) -> list[str]:
    """Settings that differ from those a checkpoint was written with, "lr 0.01 -> 0.1"; files of others have none."""
    saved = checkpoint.get("settings", {})
    return [f"{n} {saved[n]} -> {getattr(args, n)}" for n in SAME_RUN if n in saved and saved[n] != getattr(args, n)]


def new_run_path(save_path: str | None, default_name: str) -> Path:
    """Where a new run goes: the path that was given, or the first free of runs/<default_name>, runs/<default_name>-2, ...

    Raises:
        UserError: the path given holds a run already, is no folder, or cannot be written to.
    """
    if save_path is None:
        number, path = 1, RUNS / default_name
        while holds_a_run(path):
            number += 1
            path = RUNS / f"{default_name}-{number}"
    else:
        path = Path(save_path)
        if holds_a_run(path):
            raise UserError(
                f"save path '{path}' holds a run already; continue it with --resume, or choose another --save_path"
            )
    check_writable(path)
    return path


def check_writable(path: Path) -> None:
    """Raises UserError when a folder at `path` could not be made or written to. Makes nothing."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write to save path '{path}' ('{existing}' is not a folder that can be written to); choose another --save_path"
        )
