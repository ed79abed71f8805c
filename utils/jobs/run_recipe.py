"""What `run_cifar.sh` does once it has a Python: `python -m utils.jobs.run_recipe [recipe] [flags of cifar10_resnet_test.py]`.

Adds to the script what a newcomer expects of one command: data that is found, downloaded or (loudly) replaced, a short run on
a machine without a GPU, a run that continues where it was interrupted, and the teacher of a distilled run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import cifar10_resnet_test as script
import data
from utils.base.errors import UserError, run_main
from utils.base.signals import Stopped
from utils.train.device import choose_device
from utils.train.recipes import RECIPES
from utils.train.run_folder import RUNS

SHORT_EPOCHS = 5
TEACHER, STUDENT = "resnet56", "resnet20"
# Options that a run without a teacher has no use for, and how many values each takes.
DISTILLATION_OPTIONS = {
    "arch": 1,
    "arch_small": 1,
    "teacher": 1,
    "loss": 1,
    "kd_on": 1,
    "kd_weight": 1,
    "kd_T": 1,
    "share_classifier": 0,
}
# Options of the student that its teacher does not share.
STUDENT_OPTIONS = {
    "recipe": 1,
    "batch_size": 1,
    "k": 1,
    "HTrate": 1,
    "prune_rate": 1,
    "v": 1,
    "save_path": 1,
    "head_width": 1,
}


def main() -> None:
    if sys.argv[1:2] == ["table"]:
        from utils.jobs.table import main as fill_table

        fill_table(sys.argv[2:])
        return
    parser = script.parser()
    flags = parser.canonical(sys.argv[1:])
    recipe = flags.pop(0) if flags and not flags[0].startswith("-") else None
    if recipe is not None and recipe not in RECIPES:
        raise UserError(f"unknown recipe '{recipe}'; choose from {', '.join(RECIPES)}, or table")
    if "-h" in flags or "--help" in flags:
        parser.parse_args(["--help"])
    if recipe is None and not has(flags, "recipe"):
        recipe = "prune"
    if recipe is not None:
        flags = [*without(flags, {"recipe": 1}), "--recipe", recipe]
    args, _ = parser.parse_given(flags)
    distils = args.recipe in ("distill", "prune_distill")
    if distils and (args.resume or args.evaluate):
        raise UserError(
            f"{args.recipe} makes several runs here, which continue by themselves when the command is repeated; leave out --resume and --evaluate"
        )
    if distils:
        flags += [] if has(flags, "arch") else ["--arch", TEACHER]
        flags += [] if has(flags, "arch_small") else ["--arch_small", STUDENT]
    flags += choose_data(parser.parse_args(flags), flags)
    flags += short_run(parser.parse_args(flags), flags)
    if distils:
        try:
            distil_and_compare(flags)
        except Stopped as stopped:
            # Of the runs that make up the recipe those that are done are found again.
            raise Stopped(stopped.signum, stopped.saved, shlex.join(["bash", "run_cifar.sh", *sys.argv[1:]])) from None
    else:
        run(flags)


def run(flags: list[str]) -> Path | None:
    """Runs the script and returns the run's folder; an interrupted run with the same settings is continued."""
    if not has(flags, "resume"):
        flags = [*flags, "--resume", "auto"]
    print(f"== python cifar10_resnet_test.py {shlex.join(flags)}", flush=True)
    return script.main(flags)


def distil_and_compare(flags: list[str]) -> None:
    """The teacher (one that is there is used again), the student with it, and the same student without it."""
    if not has(flags, "teacher"):
        flags = [*flags, "--teacher", str(find_teacher(flags) or train_teacher(flags))]
    args = script.parse_args(flags)
    with_teacher = run(in_subfolder(flags, args.save_path, "with_teacher"))
    length = {"recipe": 1, "epochs": 1, "schedule": "+", "gammas": "+", "fit_schedule": 0}
    plain = in_subfolder(without(flags, DISTILLATION_OPTIONS | length), args.save_path, "without_teacher")
    plain += [
        "--arch",
        args.student,
        "--recipe",
        "prune" if args.recipe == "prune_distill" else "baseline",
        "--epochs",
        str(args.epochs),
    ]
    for name in ("schedule", "gammas"):
        plain += [f"--{name}", *map(str, getattr(args, name))]
    print("\n== the same student without a teacher, for comparison", flush=True)
    without_teacher = run(plain)
    for name, folder in (("with", with_teacher), ("without", without_teacher)):
        results = json.loads((folder / "results.json").read_text())
        print(
            f"{results['arch']} {name} teacher: last epoch {results['last_epoch_accuracy']:.2f} %, best epoch "
            f"{results['best_epoch_accuracy']:.2f} %, {results['epochs_done']} epochs, seed {results['seed']}, in {folder}"
        )


def teacher_flags(flags: list[str]) -> list[str]:
    """The command line of the teacher's own run."""
    arch = script.parser().parse_args(flags).arch
    return [*without(flags, DISTILLATION_OPTIONS | STUDENT_OPTIONS), "--arch", arch, "--recipe", "baseline"]


def find_teacher(flags: list[str]) -> Path | None:
    """The best baseline in runs/ on the same data that was trained as long or longer, or None."""
    wanted = script.parse_args(teacher_flags(flags))
    found = []
    for file in RUNS.glob(f"baseline-{wanted.dataset}-{wanted.arch}-*/results.json"):
        checkpoint = file.with_name(f"checkpoint.{wanted.arch}.pth.tar")
        try:
            results = json.loads(file.read_text())
            fits = (
                results["finished"]
                and results["settings"]["data_path"] == wanted.data_path
                and results["epochs_done"] >= wanted.epochs
            )
            if fits and checkpoint.is_file():
                found.append((results["last_epoch_accuracy"], results["epochs_done"], checkpoint))
        except (ValueError, KeyError, TypeError):
            print(f"note: '{file}' is damaged and passed over")
    if not found:
        return None
    accuracy, epochs, checkpoint = max(found)
    print(f"== teacher: {checkpoint}, {accuracy:.2f} % after {epochs} epochs, is there already", flush=True)
    return checkpoint


def train_teacher(flags: list[str]) -> Path:
    own = teacher_flags(flags)
    arch = script.parse_args(own).arch
    print(f"== no trained {arch} for this data in {RUNS}/: training the teacher first", flush=True)
    return run(own) / f"checkpoint.{arch}.pth.tar"


def in_subfolder(flags: list[str], save_path: str | None, name: str) -> list[str]:
    """The flags with --save_path, where there is one, moved to a subfolder: these recipes make several runs."""
    return [*without(flags, {"save_path": 1}), "--save_path", str(Path(save_path) / name)] if save_path else flags


def choose_data(args: argparse.Namespace, flags: list[str]) -> list[str]:
    """`--dataset synthetic` where nothing was said of data, none is found and none can be downloaded; else nothing."""
    if args.dataset not in ("cifar10", "cifar100") or has(flags, "resume"):
        return []
    try:
        data.find_or_download(args.dataset, args.data_path)
    except data.NoData as error:
        if has(flags, "dataset") or args.data_path != "./data":
            raise
        print(f"note: {error}")
        print(
            "NO CIFAR-10 HERE AND NO NETWORK TO DOWNLOAD IT: USING SYNTHETIC DATA. THE FIGURES SAY NOTHING ABOUT THE METHOD.",
            flush=True,
        )
        return ["--dataset", "synthetic"]
    return []


def short_run(args: argparse.Namespace, flags: list[str]) -> list[str]:
    """Flags that shorten the run on a machine without a GPU, where the command line leaves its length open."""
    if choose_device(args.ngpu).type != "cpu" or args.epochs or args.evaluate or args.resume:
        return []
    minutes = 3 if args.dataset == "synthetic" else 15
    full = RECIPES[args.recipe]["epochs"]
    print(
        f"note: NO GPU, SO THIS IS A SHORT RUN: {SHORT_EPOCHS} epochs, about {minutes} minutes per run of ResNet-20 on 2 CPU cores; "
        f"the full recipe takes {full} epochs, to get it add --epochs {full}",
        flush=True,
    )
    return ["--epochs", str(SHORT_EPOCHS), *([] if args.schedule else ["--fit_schedule"])]


def option_name(flag: str) -> str | None:
    """The option that a word of the command line names, or None for a value."""
    return flag.partition("=")[0].removeprefix("--").replace("-", "_") if flag.startswith("--") else None


def has(flags: list[str], name: str) -> bool:
    return any(option_name(flag) == name for flag in flags)


def without(flags: list[str], options: dict[str, int | str]) -> list[str]:
    """The flags less some options and their values; "+" takes all values up to the next option."""
    left, kept = list(flags), []
    while left:
        flag = left.pop(0)
        name = option_name(flag)
        if name not in options:
            kept.append(flag)
        elif "=" not in flag:
            values = options[name]
            while left and option_name(left[0]) is None and (values == "+" or values > 0):
                left.pop(0)
                values = values if values == "+" else values - 1
    return kept


if __name__ == "__main__":
    run_main(main)
