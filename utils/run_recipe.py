"""What `run_cifar.sh` does once it has a Python: `python -m utils.run_recipe [recipe] [flags of cifar10_resnet_test.py]`.

Adds to the script what a newcomer expects of one command: data that is found, downloaded or (loudly) replaced, a short run on
a machine without a GPU, a run that continues where it was interrupted, and the teacher of a distilled run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import cifar10_resnet_test as script
import data
from utils.errors import UserError, run_main
from utils.recipes import RECIPES
from utils.run_folder import RUNS

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


def main() -> None:
    recipe, flags = "prune", sys.argv[1:]
    if flags and not flags[0].startswith("-"):
        recipe, *flags = flags
        if recipe not in RECIPES:
            raise UserError(f"unknown recipe '{recipe}'; choose from {', '.join(RECIPES)}")
    if "-h" in flags or "--help" in flags:
        script.parse_args(["--help"])
    flags += ["--recipe", recipe]
    distils = recipe in ("distill", "prune_distill")
    if distils:
        flags += [] if has(flags, "arch") else ["--arch", TEACHER]
        flags += [] if has(flags, "arch_small") else ["--arch_small", STUDENT]
    flags += choose_data(flags)
    flags += short_run(flags)
    if distils:
        distil_and_compare(recipe, flags)
    else:
        run(flags)


def run(flags: list[str]) -> Path | None:
    """Runs the script and returns the run's folder; an interrupted run with the same settings is continued."""
    if not has(flags, "resume"):
        flags = [*flags, "--resume", "auto"]
    print(f"== python cifar10_resnet_test.py {' '.join(flags)}", flush=True)
    return script.main(flags)


def distil_and_compare(recipe: str, flags: list[str]) -> None:
    """The teacher (one that is there is used again), the student with it, and the same student without it."""
    args = script.parse_args(flags)
    if not args.teacher:
        flags += ["--teacher", str(find_teacher(args.dataset, args.arch) or train_teacher(args, flags))]
    with_teacher = run(in_subfolder(flags, "with_teacher"))
    plain = in_subfolder(
        without(
            flags, {**DISTILLATION_OPTIONS, "recipe": 1, "epochs": 1, "schedule": "+", "gammas": "+", "fit_schedule": 0}
        ),
        "without_teacher",
    )
    plain += [
        "--arch",
        args.student,
        "--recipe",
        "prune" if recipe == "prune_distill" else "baseline",
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


def find_teacher(dataset: str, arch: str) -> Path | None:
    """The best finished baseline of runs/ for a data set, or None."""
    found = []
    for file in RUNS.glob(f"baseline-{dataset}-{arch}-seed*/results.json"):
        results = json.loads(file.read_text())
        checkpoint = file.with_name(f"checkpoint.{arch}.pth.tar")
        if results["finished"] and checkpoint.is_file():
            found.append((results["last_epoch_accuracy"], checkpoint))
    return max(found)[1] if found else None


def train_teacher(args, flags: list[str]) -> Path:
    print(f"== no trained {args.arch} on {args.dataset} in {RUNS}/: training the teacher first", flush=True)
    keep = without(
        flags,
        {
            **DISTILLATION_OPTIONS,
            "recipe": 1,
            "batch_size": 1,
            "k": 1,
            "HTrate": 1,
            "prune_rate": 1,
            "v": 1,
            "save_path": 1,
        },
    )
    folder = run([*keep, "--arch", args.arch, "--recipe", "baseline"])
    return folder / f"checkpoint.{args.arch}.pth.tar"


def in_subfolder(flags: list[str], name: str) -> list[str]:
    """The flags with --save_path, where there is one, moved to a subfolder: these recipes make several runs."""
    args = script.parse_args(flags)
    return (
        [*without(flags, {"save_path": 1}), "--save_path", str(Path(args.save_path) / name)]
        if args.save_path
        else flags
    )


def choose_data(flags: list[str]) -> list[str]:
    """`--dataset synthetic` where nothing was said of data, none is found and none can be downloaded; else nothing."""
    args = script.parse_args(flags)
    if args.dataset not in ("cifar10", "cifar100"):
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


def short_run(flags: list[str]) -> list[str]:
    """Flags that shorten the run on a machine without a GPU, where the command line leaves its length open."""
    if torch.cuda.is_available() or has(flags, "epochs") or has(flags, "evaluate") or has(flags, "resume"):
        return []
    args = script.parse_args(flags)
    minutes = 3 if args.dataset == "synthetic" else 15
    print(
        f"note: NO GPU, SO THIS IS A SHORT RUN: {SHORT_EPOCHS} epochs, about {minutes} minutes for ResNet-20 on 2 CPU cores; "
        f"the full recipe takes {args.epochs} epochs, to get it add --epochs {args.epochs}",
        flush=True,
    )
    return ["--epochs", str(SHORT_EPOCHS), *([] if has(flags, "schedule") else ["--fit_schedule"])]


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
