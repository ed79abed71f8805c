"""Fills a whole table, networks x rates x methods x seeds: `bash run_cifar.sh table`.

    bash run_cifar.sh table --nets resnet20 --rates 0.3 --methods baseline prune prune_distill --seeds 1 2 3
    bash run_cifar.sh table DATA --epochs 10 --seeds 1 --methods prune "prune --no_regrow" --dry_run

A method is a recipe, in quotes with flags of its own. Other flags are those of cifar10_resnet_test.py and hold for all
rows that they concern. Teachers are trained first. --epochs scales the learning-rate schedule, which all rows then
share. Repeat the command to continue: what is done is skipped, what was begun continues. Every run has its own folder
in --save_path. Their comparison ends the table.
"""

import re
import shlex
from itertools import product
from pathlib import Path

import models
from utils.base.arguments import COUNT, SEED, OneLineParser, number
from utils.base.errors import UserError
from utils.tables.markdown import make_report
from utils.tables.runs import find_runs
from utils.tables.side_by_side import Row, run_rows
from utils.train.command_line import make_parser, parse
from utils.train.options import ALL, OPTIONS, alternatives, command_words, recipe_settings
from utils.train.recipes import fit_schedule
from utils.train.run_folder import RUNS

TAUGHT, WHOLE, GRADUAL = ("distill", "prune_distill"), ("baseline", "distill"), ("prune_gradual",)
METHODS = ("baseline", "prune", *GRADUAL, *TAUGHT)
# Options that a table sets itself; options of rows that prune, that prune gradually, and that have a teacher.
SET_HERE = {"arch", "arch_small", "recipe", "HTrate", "prune_rate", "manualSeed", "resume", "evaluate", "widths_of"}
USE = "use --nets, --rates, --methods and --seeds"
OF_PRUNED = {option.name for option in OPTIONS["pruning"]}
OF_GRADUAL = {option.name for option in ALL.values() if option.only == "gradual"}
OF_TAUGHT = {
    name for option in ALL.values() if option.only == "taught" for name in (option.name, *alternatives(option.name))
}


def script_parser(text: str | None, name: str) -> OneLineParser:
    """The training script's parser under another name and description."""
    parser = make_parser("cifar", text, "resnet20", ", ".join(models.REGISTRY))
    parser.prog = name
    return parser


def table_parser() -> OneLineParser:
    parser = script_parser(__doc__, "run_cifar.sh table")
    add, usual = parser.add_argument_group("table").add_argument, ["baseline", "prune", "prune_distill"]
    rate = number(float, lambda x: 0 < x < 1, "a share of the filters REMOVED, in (0, 1)")
    add("--nets", nargs="+", default=["resnet20"], metavar="ARCH", help="networks (resnet20)")
    add("--rates", nargs="+", type=rate, default=[0.3], metavar="RATE", help="shares of the filters REMOVED (0.3)")
    add("--methods", nargs="+", default=usual, metavar="METHOD", help=f"{', '.join(METHODS)} ({' '.join(usual)})")
    add("--seeds", nargs="+", type=SEED, default=[1, 2, 3], metavar="SEED", help="seeds (1 2 3)")
    add(
        "--teacher_net", default=None, metavar="ARCH", help="trained as teacher (resnet56), or the network of --teacher"
    )
    add("--jobs", type=COUNT, default=1, help="runs at a time, each with a GPU or its share of CPU threads (1)")
    add("--dry_run", action="store_true", default=False, help="only prints the rows")
    return parser


def fill(given: dict) -> None:
    """The command `table`; `given` are the options of its command line. UserError where runs failed, after the rest."""
    jobs, dry_run = given.pop("jobs"), given.pop("dry_run")
    rows = plan_rows(given)
    if dry_run:
        print("\n".join(f"{row.folder.name}: {shlex.join(command_words(row.options))}" for row in rows))
        return
    failed = run_rows(rows, jobs)
    print(f"\n{make_report(*find_runs([row.folder for row in rows]), base=Path.cwd())}")
    if failed:
        reasons = "; ".join(f"{folder.name}: {why}" for folder, why in failed.items())
        raise UserError(f"{len(failed)} of {len(rows)} runs failed, the others are done: {reasons}")


def distil_and_compare(recipe: str, given: dict) -> None:
    """A recipe with a teacher, as a table: the teacher, the student with it, the student as long without it."""
    if given.keys() & {"resume", "evaluate", "widths_of"}:
        raise UserError(f"{recipe} makes several runs; to continue, repeat the command and leave out --resume")
    given = {"save_path": RUNS / "distill", **fitted(recipe, given)}
    rate = given.pop("prune_rate", round(1 - given.pop("HTrate", recipe_settings("prune", "cifar10")["HTrate"]), 12))
    given |= dict(nets=[given.pop("arch_small", "resnet20")], rates=[rate], seeds=[given.pop("manualSeed", 1)])
    given |= dict(methods=[recipe, "prune" if recipe == "prune_distill" else "baseline"], jobs=1, dry_run=False)
    given["teacher_net"] = given.pop("arch", None)
    fill(given)


def plan_rows(given: dict) -> list[Row]:
    """Every row of a table, seed by seed; a teacher before the first row that needs it.

    Args:
        given: nets, rates, methods, seeds and teacher_net of the table; the training script's options for all rows that
            they concern.

    Raises:
        UserError: an unknown network or method, or an option that the table sets itself.
    """
    given = dict(given)
    nets, methods, rates, seeds = (given.pop(name) for name in ("nets", "methods", "rates", "seeds"))
    teacher_net, file = given.pop("teacher_net"), given.pop("teacher", None)
    folder = Path(given.pop("save_path", RUNS / "table"))
    for name in SET_HERE & given.keys():
        raise UserError(f"the table sets --{name} itself; {USE}")
    for arch in (*nets, teacher_net or "resnet56"):
        models.check_arch(arch)
    given = fitted("baseline", given) if "epochs" in given else given
    rows: dict[Path, Row] = {}

    def add(method: str, arch: str, seed: int, rate: float) -> Path:
        try:
            recipe, *flags = shlex.split(method)
        except ValueError:
            recipe = None  # empty, or an open quote
        if recipe not in METHODS:
            raise UserError(f"unknown method '{method}'; choose from {', '.join(METHODS)}, flags in quotes with it")
        others = OF_PRUNED if recipe in WHOLE else set()
        others = others | (set() if recipe in TAUGHT else OF_TAUGHT) | (set() if recipe in GRADUAL else OF_GRADUAL)
        options = {name: value for name, value in given.items() if name not in others}
        own = parse(script_parser(None, recipe), flags)
        for name in (SET_HERE | {"teacher", "save_path"}) & own.keys():
            remedy = USE if name in SET_HERE else "give it outside of the quotes"
            raise UserError(f"method '{method}': the table sets --{name} itself; {remedy}")
        options |= own | dict(recipe=recipe, arch=arch, manualSeed=seed)
        needs = None
        if recipe not in WHOLE and "macs_cut" not in options:
            options["HTrate"] = round(1 - rate, 12)
        if recipe in TAUGHT and file:
            # The file may not name its network.
            options |= {"teacher": file, **({"arch": teacher_net, "arch_small": arch} if teacher_net else {})}
        elif recipe in TAUGHT:
            net = teacher_net or "resnet56"
            needs = add("baseline", net, seeds[0], rate)
            options["teacher"] = str(needs / f"checkpoint.{net}.pth.tar")
        parts = [options.get("dataset", "cifar10"), arch, re.sub(r"[^\w.]+", "-", method)]
        parts += [f"HT{options['HTrate']:g}"] if "HTrate" in options else []
        parts += [f"{options['epochs']}-epochs"] if "epochs" in options else []
        row = Row(folder / "-".join([*parts, f"seed{seed}"]), options, needs)
        return rows.setdefault(row.folder, row).folder

    for seed, arch, method, rate in product(seeds, nets, methods, rates):
        add(method, arch, seed, rate)
    return list(rows.values())


def fitted(recipe: str, given: dict) -> dict:
    """The options given and, where they lack them, epochs and milestones of a recipe, scaled to the epochs given."""
    usual = recipe_settings(recipe, given.get("dataset", "cifar10"))
    epochs = given.get("epochs", usual["epochs"])
    milestones = fit_schedule(usual["schedule"], epochs, usual["epochs"])
    length = {"epochs": epochs, "schedule": milestones, "gammas": usual["gammas"]}
    return {**length, **{name: value for name, value in given.items() if name != "fit_schedule"}}
