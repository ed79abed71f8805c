"""Fills a whole table, networks x rates x methods x seeds: `bash run_cifar.sh table`.

    bash run_cifar.sh table --nets resnet20 --rates 0.3 --methods baseline prune prune_distill --seeds 1 2 3
    bash run_cifar.sh table DATA --epochs 10 --seeds 1 --methods prune scratch_epochs scratch_cost --dry_run

Teachers, and the networks that controls need, are trained first. --epochs scales the learning-rate schedule, which all
rows then share. Repeat the command to continue: what is done is skipped, what was begun continues. Other flags are
those of cifar10_resnet_test.py and hold for every row that they concern. Every run has its own folder in --save_path.
Their comparison ends the table.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import models
from utils.base.errors import UserError
from utils.tables.command_line import CommandLine
from utils.tables.report import make_report
from utils.tables.runs import find_runs
from utils.tables.side_by_side import Row, run_rows
from utils.train.options import OneLineParser, recipe_settings
from utils.train.recipes import fit_schedule
from utils.train.run_folder import RUNS

# The flags of each. {small}: the small network of the `prune` row of the same rate and seed, with its mini-batches;
# {cost}: in as many epochs as cost the multiply-adds that that row cost.
METHODS = {
    "baseline": "--recipe baseline",
    "prune": "--recipe prune {rate}",
    "prune_gradual": "--recipe prune_gradual {rate}",
    "prune_distill": "--recipe prune_distill {rate} {teacher}",
    "distill": "--recipe distill {teacher}",
    "scratch_epochs": "--recipe baseline {small}",
    "scratch_cost": "--recipe baseline {small} {cost}",
    "prune_per_epoch": "--recipe prune {rate} --threshold_every epoch",
    "prune_released": "--recipe prune {rate} --heavy_ball released",
    "prune_no_regrow": "--recipe prune {rate} --no_regrow",
    "prune_fixed_batch": "--recipe prune {rate} --k none",
}
# Who teaches whom where --teacher_net does not say: the released recipes' pairs and their neighbours.
TEACHERS = {"resnet20": "resnet56", "resnet32": "resnet56", "resnet44": "resnet56", "resnet56": "resnet110"}
TEACHERS |= {"vgg11_bn": "vgg13_bn", "vgg13_bn": "vgg16_bn", "vgg16_bn": "vgg19_bn"}
SET_HERE = {"arch", "arch_small", "recipe", "HTrate", "prune_rate", "manualSeed", "resume", "evaluate", "widths_of"}
# Flags that go to some of the rows only.
GROWTH = ("k", "growth", "max_batch_size", "no_restart")
OF_PRUNED, OF_TAUGHT = ("v", "norm"), ("kd", "loss", "ce_weight", "share_classifier")
LENGTH = ("epochs", "schedule", "gammas", "fit_schedule")


def parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, usual = parser.add_argument, ["baseline", "prune", "prune_distill"]
    add("--nets", nargs="+", default=["resnet20"], metavar="ARCH", help="networks (resnet20)")
    add("--rates", nargs="+", type=float, default=[0.3], metavar="RATE", help="shares of the filters REMOVED (0.3)")
    add("--methods", nargs="+", choices=METHODS, default=usual, help=f"rows of the table ({' '.join(usual)})")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED", help="seeds (1 2 3)")
    add("--teacher_net", metavar="ARCH", help="teaches every network (resnet20 from resnet56, ...)")
    add("--teacher", metavar="FILE", help="a checkpoint that teaches every network instead")
    add("--jobs", type=int, default=1, help="runs at a time, each on a GPU of its own or its share of CPU threads (1)")
    add("--save_path", type=Path, default=RUNS / "table", help="the runs' folders are made here (runs/table)")
    add("--dry_run", action="store_true", help="only prints the rows")
    return parser


def fill(line: CommandLine) -> None:
    """The command `table`."""
    own = CommandLine([])
    for name in line.keys() & {"help", *vars(parser().parse_args([]))}:
        own[name] = line.pop(name)
    args = parser().parse_args(own.flags())
    for name in sorted(SET_HERE & line.keys()):
        raise UserError(f"the table sets --{name} itself; use --nets, --rates, --methods and --seeds")
    if args.jobs < 1 or not all(0 < rate < 1 for rate in args.rates):
        raise UserError(f"--jobs must be >= 1, got {args.jobs}, and --rates (REMOVED) in (0, 1), got {args.rates}")
    rows = make_plan(line, args, length_of="baseline" if "epochs" in line else None)
    if args.dry_run:
        print("\n".join(f"{row.folder.name}: {'done' if row.is_done() else shlex.join(row.flags)}" for row in rows))
    else:
        run_and_compare(rows, args.jobs)


def distil_and_compare(line: CommandLine, recipe: str) -> None:
    """The recipes with a teacher: its run, the student with it, and the same student in as many epochs without it."""
    if line.keys() & {"resume", "evaluate"}:
        raise UserError(f"{recipe} makes several runs, which continue when the command is repeated; leave out --resume")
    kept = line.number("HTrate", recipe_settings("prune_distill", "cifar10")["HTrate"])
    flags = ["--methods", recipe, "prune" if recipe == "prune_distill" else "baseline"]
    flags += ["--nets", line.value("arch_small", "resnet20"), "--rates", f"{line.number('prune_rate', 1 - kept):.12g}"]
    flags += ["--seeds", line.value("manualSeed", "1"), "--save_path", line.value("save_path", str(RUNS / "distill"))]
    file, arch = line.value("teacher"), line.value("arch", "resnet56")
    args = parser().parse_args([*flags, *(["--teacher", file] if file else ["--teacher_net", arch])])
    for name in line.keys() & {*SET_HERE, "save_path", "teacher"}:
        del line[name]
    run_and_compare(make_plan(line, args, length_of=recipe), jobs=1)


def run_and_compare(rows: list[Row], jobs: int) -> None:
    """Raises UserError when some runs failed, after the others and the comparison."""
    failed = run_rows(rows, jobs)
    print(f"\n{make_report(*find_runs([row.folder for row in rows]), base=Path.cwd())}")
    if failed:
        reasons = "; ".join(f"{folder.name}: {why}" for folder, why in failed.items())
        raise UserError(f"{len(failed)} of {len(rows)} runs failed, the others are done: {reasons}")


def make_plan(line: CommandLine, args: argparse.Namespace, length_of: str | None) -> list[Row]:
    """Every row, those that others need before them, seed by seed.

    Args:
        line: for the training script, less what the table sets itself.
        args: of the table's parser.
        length_of: the recipe whose epochs and schedule all rows of args.nets have where `line` does not give them.

    Raises:
        UserError: a network is not known, or has no usual teacher.
    """
    rows: dict[Path, Row] = {}
    dataset = line.value("dataset", "cifar10")
    given_teacher = models.load_with_name(args.teacher)[0] if args.teacher else None
    for arch in [*args.nets, *([args.teacher_net] if args.teacher_net else [])]:
        models.check_arch(arch)

    def add(name: str, arch: str, rate: float, seed: int) -> Path:
        words, needs = METHODS[name].split(), ()
        taught, pruned, small = (part in words for part in ("{teacher}", "{rate}", "{small}"))
        teaches = given_teacher or args.teacher_net or TEACHERS.get(arch)
        if taught and teaches is None:
            raise UserError(f"no usual teacher for {arch}; name one with --teacher_net or --teacher")
        length = line.only(*LENGTH)
        if length_of:
            length = length_flags(line, words[1], length_of if arch in args.nets else "baseline")
        epochs = CommandLine(length).value("epochs")
        parts = [dataset, arch, name, f"HT{1 - rate:g}" if rate else "", f"from-{teaches}" if taught else ""]
        folder = args.save_path / "-".join(filter(None, [*parts, f"{epochs}-epochs" if epochs else "", f"seed{seed}"]))
        if folder in rows:
            return folder
        special = {"{rate}": ["--HTrate", f"{1 - rate:g}"], "{cost}": []}
        if taught:
            needs = () if args.teacher else (add("baseline", teaches, 0.0, args.seeds[0]),)
            file = args.teacher or str(needs[0] / f"checkpoint.{teaches}.pth.tar")
            special["{teacher}"] = ["--arch", teaches, "--arch_small", arch, "--teacher", file]
        if small:
            needs, usual = (add("prune", arch, rate, seed),), recipe_settings("prune", dataset)
            sizes = [word for n in ("batch_size", "k") if n not in line for word in (f"--{n}", str(usual[n]))]
            special["{small}"] = ["--widths_of", str(needs[0] / f"small.{arch}.pth.tar"), *sizes]
        left_out = {*LENGTH, *(() if pruned else OF_PRUNED), *(() if pruned or small else GROWTH)}
        flags = [*line.words, *line.flags(*left_out, *(() if taught else OF_TAUGHT)), *length]
        flags += ["--manualSeed", str(seed), *([] if taught else ["--arch", arch])]
        flags += [flag for word in words for flag in special.get(word, [word])]
        more_flags = (lambda: equal_cost_flags(needs[0])) if "{cost}" in words else tuple
        rows[folder] = Row(folder, tuple(flags), needs, more_flags)
        return folder

    for seed in dict.fromkeys(args.seeds):
        for arch in dict.fromkeys(args.nets):
            for name in dict.fromkeys(args.methods):
                for rate in dict.fromkeys(args.rates if {"{rate}", "{small}"} & {*METHODS[name].split()} else [0.0]):
                    add(name, arch, rate, seed)
    return list(rows.values())


def length_flags(line: CommandLine, recipe: str, length_of: str) -> list[str]:
    """Epochs and milestones of a row: the command line's, for the rest those of a recipe, scaled to the epochs."""
    usual = recipe_settings(length_of, line.value("dataset", "cifar10"))
    epochs = line.number("epochs", usual["epochs"])
    if recipe_settings(recipe, "cifar10")["lr_schedule"] == "cosine":
        return ["--epochs", str(epochs)]
    flags = scaled(usual["schedule"], usual["gammas"], usual["epochs"], epochs)
    return [*flags, *line.only("schedule", "gammas")]


def equal_cost_flags(pruned: Path) -> list[str]:
    """Epochs, and milestones scaled to them, in which the small network costs what a finished pruned run cost.

    Raises:
        UserError: the run has no small network.
    """
    results = json.loads((pruned / "results.json").read_text())
    small, settings = results["small"], results["settings"]
    if "after" not in small:
        raise UserError(f"'{pruned}' has no small network: {small['error']}")
    epochs = round(settings["epochs"] * small["before"]["multiply_adds"] / small["after"]["multiply_adds"])
    return scaled(settings["schedule"], settings["gammas"], settings["epochs"], epochs)


def scaled(schedule: list[int], gammas: list[float], full: int, epochs: int) -> list[str]:
    """A schedule of `full` epochs scaled to others, as flags."""
    milestones = map(str, fit_schedule(schedule, epochs, full))
    return ["--epochs", str(epochs), "--schedule", *milestones, "--gammas", *(f"{gamma:g}" for gamma in gammas)]
