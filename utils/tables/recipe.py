"""What run_cifar.sh does: `python -m utils.tables.recipe [RECIPE] [DATA] [flags of cifar10_resnet_test.py]`.

Adds to the training script what a newcomer expects of one command: data that is found, downloaded or (loudly) replaced,
a short run on a machine without a GPU, a run that continues where it was interrupted, and the runs that a distilled one
is compared with.
"""

from __future__ import annotations

import os
import shlex
import sys

import torch

import data
from utils.base.errors import UserError, run_main
from utils.tables.command_line import CommandLine
from utils.tables.grid import distil_and_compare, fill
from utils.tables.side_by_side import TRAIN
from utils.train.options import recipe_settings
from utils.train.recipes import RECIPES

SHORT_EPOCHS = 5


def main(argv: list[str] | None = None) -> None:
    line = CommandLine(sys.argv[1:] if argv is None else argv)
    recipe = line.words.pop(0) if line.words else line.value("recipe", "prune")
    if recipe not in (*RECIPES, "table"):
        raise UserError(f"unknown recipe '{recipe}'; choose from {', '.join(RECIPES)}, or table")
    if "help" in line and recipe != "table":
        os.execv(TRAIN[0], [*TRAIN, "--help"])
    if not line.keys() & {"help", "dry_run"}:
        choose_data(line)
        shorten(line, "baseline" if recipe == "table" else recipe)
    if recipe == "table":
        fill(line)
    elif recipe in ("distill", "prune_distill"):
        distil_and_compare(line, recipe)
    else:
        flags = [*line.words, *line.flags("recipe"), "--recipe", recipe]
        flags += [] if "resume" in line else ["--resume", "auto"]
        print(f"== python cifar10_resnet_test.py {shlex.join(flags)}", flush=True)
        os.execv(TRAIN[0], [*TRAIN, *flags])


def choose_data(line: CommandLine) -> None:
    """Adds `--dataset synthetic` where nothing was said of data, none is found and none can be downloaded."""
    dataset = line.value("dataset", "cifar10")
    if dataset not in ("cifar10", "cifar100") or "resume" in line:
        return
    try:
        data.find_or_download(dataset, line.words[0] if line.words else "./data")
    except data.NoData as error:
        if line.words or "dataset" in line:
            raise
        print(f"note: {error}")
        print("NO CIFAR-10 HERE AND NO NETWORK TO DOWNLOAD IT: USING SYNTHETIC DATA.")
        print("THE FIGURES SAY NOTHING ABOUT THE METHOD.", flush=True)
        line["dataset"] = ["synthetic"]


def shorten(line: CommandLine, recipe: str) -> None:
    """Shortens the run on a machine without a GPU, where the command line leaves its length open."""
    on_gpu = torch.cuda.is_available() and line.value("ngpu") != "0"
    if on_gpu or line.keys() & {"epochs", "evaluate", "resume"}:
        return
    usual = recipe_settings(recipe, "cifar10")
    print(
        f"note: NO GPU, SO THIS IS A SHORT RUN of {SHORT_EPOCHS} epochs, some 15 minutes for ResNet-20 on 2 CPU cores;"
    )
    print(f"the full recipe takes {usual['epochs']} epochs, to get it add --epochs {usual['epochs']}", flush=True)
    line["epochs"] = [str(SHORT_EPOCHS)]
    if usual["lr_schedule"] == "steps" and "schedule" not in line:
        line["fit_schedule"] = []


if __name__ == "__main__":
    run_main(main)
