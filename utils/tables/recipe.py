"""What run_cifar.sh does: `python -m utils.tables.recipe [RECIPE] [DATA] [flags of cifar10_resnet_test.py]`.

Adds to the training script what a newcomer expects of one command: data that is found, downloaded or replaced (which it
says in capitals), a short run on a machine without a GPU, a run that continues where it was interrupted, and the runs
that a distilled one is compared with. `table --help` explains tables of several runs.
"""

import os
import shlex
import sys

import torch

import data
from utils.base.errors import UserError, run_main
from utils.tables import grid
from utils.tables.side_by_side import TRAIN
from utils.train.command_line import parse
from utils.train.options import command_words, recipe_settings
from utils.train.recipes import RECIPES

SHORT_EPOCHS = 5


def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    recipe = words.pop(0) if words and not words[0].startswith("-") else None
    if recipe not in (None, "table", *RECIPES):
        raise UserError(f"unknown recipe '{recipe}'; choose from {', '.join(RECIPES)}, or table")
    is_table, named = recipe == "table", recipe is not None
    given = parse(grid.table_parser() if is_table else grid.script_parser(__doc__, "run_cifar.sh [RECIPE]"), words)
    recipe = recipe or given.get("recipe", "prune")
    if not given.get("dry_run"):
        choose_data(given)
        shorten(given, "baseline" if is_table else recipe)
    if is_table:
        grid.fill(given)
    elif recipe in grid.TAUGHT:
        given.pop("recipe", None)
        grid.distil_and_compare(recipe, given)
    else:
        if named or given.get("resume", "auto") == "auto":
            given["recipe"] = recipe
        command = command_words({"resume": "auto", **given})
        print(f"== python cifar10_resnet_test.py {shlex.join(command)}", flush=True)
        os.execv(TRAIN[0], [*TRAIN, *command])


def choose_data(given: dict) -> None:
    """Adds `--dataset synthetic` where no data is named, none is found and none can be downloaded."""
    dataset = given.get("dataset", "cifar10")
    if dataset not in ("cifar10", "cifar100") or "resume" in given:
        return
    try:
        data.find_or_download(dataset, given.get("data_path", "./data"))
    except data.NoData as error:
        if given.keys() & {"data_path", "dataset"}:
            raise
        print(f"note: {error}")
        print("NO CIFAR-10 HERE AND NO NETWORK TO DOWNLOAD IT: USING SYNTHETIC DATA.")
        print("THE FIGURES SAY NOTHING ABOUT THE METHOD.", flush=True)
        given["dataset"] = "synthetic"


def shorten(given: dict, recipe: str) -> None:
    """Shortens the run on a machine without a GPU, where the command line leaves its length open."""
    on_gpu = torch.cuda.is_available() and given.get("ngpu") != 0
    if on_gpu or given.keys() & {"epochs", "resume"}:
        return
    usual = recipe_settings(recipe, "cifar10")
    minutes = "some 15 minutes for ResNet-20 on 2 CPU cores"
    print(f"note: NO GPU, SO THIS IS A SHORT RUN of {SHORT_EPOCHS} epochs, {minutes};")
    print(f"the full recipe takes {usual['epochs']} epochs, to get it add --epochs {usual['epochs']}", flush=True)
    given["epochs"] = SHORT_EPOCHS
    if usual["lr_schedule"] == "steps" and "schedule" not in given:
        given["fit_schedule"] = True


if __name__ == "__main__":
    run_main(main)
