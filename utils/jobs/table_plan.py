"""The plan of a table: networks x rates x methods x seeds as runs of cifar10_resnet_test.py, and what each run needs first."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cifar10_resnet_test as script
from utils.base.errors import UserError
from utils.compare.own_runs import Damaged, read_run
from utils.jobs.run_recipe import without
from utils.train.recipes import RECIPES, fit_schedule
from utils.train.resume import SAME_RUN


@dataclass(frozen=True)
class Method:
    """A column of the table.

    Attributes:
        recipe: of the training script.
        flags: what it adds.
        pruned: it has a row per rate.
        teacher: it needs a trained teacher.
        small: it trains the small network of the `prune` row of the same rate and seed from scratch, with the mini-batches of that row.
        equal_cost: with as many epochs as cost the multiply-adds that `prune` cost; otherwise with as many epochs.
    """

    recipe: str
    flags: tuple[str, ...] = ()
    pruned: bool = True
    teacher: bool = False
    small: bool = False
    equal_cost: bool = False


METHODS = {
    "baseline": Method("baseline", pruned=False),
    "prune": Method("prune"),
    "prune_distill": Method("prune_distill", teacher=True),
    "distill": Method("distill", pruned=False, teacher=True),
    "scratch_epochs": Method("baseline", small=True),
    "scratch_cost": Method("baseline", small=True, equal_cost=True),
    "prune_per_epoch": Method("prune", ("--threshold_every", "epoch")),
    "prune_released": Method("prune", ("--heavy_ball", "released")),
    "prune_no_regrow": Method("prune", ("--no_regrow",)),
    "prune_fixed_batch": Method("prune", ("--k", "none")),
}
# Who teaches whom where --teacher_net does not say: the released recipes' pairs and their neighbours.
TEACHERS = {
    **{"resnet20": "resnet56", "resnet32": "resnet56", "resnet44": "resnet56", "resnet56": "resnet110"},
    **{"vgg11_bn": "vgg13_bn", "vgg13_bn": "vgg16_bn", "vgg16_bn": "vgg19_bn"},
}
# Flags that go to some of the rows only, with the number of their values.
GROWTH = {"k": 1, "growth": 1, "max_batch_size": 1, "no_restart": 0}
PRUNED_ONLY = {**GROWTH, "v": 1, "norm": 1}
DISTILLED_ONLY = {"loss": 1, "kd_on": 1, "kd_weight": 1, "kd_T": 1, "share_classifier": 0}


@dataclass(frozen=True)
class Row:
    """A run of the table.

    Attributes:
        folder: of the run.
        HTrate: share of the filters kept; of a small network trained from scratch that of the run it comes from.
        flags: its command line less --save_path and --resume.
        needs: folders of runs that must have ended well before.
        equal_cost: the cost of the run it needs decides the epochs and stretches the schedule, when that run has ended.
        epochs: planned; for equal cost those of the other run.
    """

    folder: Path
    method: str
    arch: str
    HTrate: float
    seed: int
    flags: tuple[str, ...]
    needs: tuple[Path, ...]
    epochs: int
    equal_cost: bool = False

    @property
    def name(self) -> str:
        return self.folder.name

    def command(self) -> list[str]:
        """The complete flags of the training script.

        Raises:
            UserError: the run whose small network is wanted has none, or no usable results.
        """
        flags = list(self.flags)
        if METHODS[self.method].small:
            (other,) = self.needs
            try:
                run = read_run(other / "results.json")
            except Damaged as error:
                raise UserError(f"'{other / 'results.json'}' is damaged: {error}") from None
            if not (other / f"small.{self.arch}.pth.tar").is_file():
                why = run.results.get("small", {}).get("error", "its file is gone")
                raise UserError(f"'{other}' has no small network: {why}")
            costs = run.costs
        if self.equal_cost:
            settings = self.settings()
            epochs = round(settings.epochs * costs.full_multiply_adds / costs.multiply_adds)
            schedule = fit_schedule(settings.schedule, epochs, settings.epochs)
            flags += ["--epochs", str(epochs), "--schedule", *map(str, schedule)]
            flags += ["--gammas", *(f"{gamma:g}" for gamma in settings.gammas)]
        return [*flags, "--save_path", str(self.folder), "--resume", "auto"]

    def settings(self) -> Namespace:
        """The resolved settings, as far as they are known before it runs."""
        return script.parse_args([*self.flags, "--save_path", str(self.folder)])


def length_flags(epochs: int, *, fitted: bool) -> list[str]:
    """--epochs, and where `fitted` the baseline's schedule scaled to them, which every row of a shortened table then shares."""
    if not fitted:
        return ["--epochs", str(epochs)]
    base = RECIPES["baseline"]
    schedule = fit_schedule(base["schedule"], epochs, base["epochs"])
    milestones = ["--schedule", *map(str, schedule), "--gammas", *(f"{gamma:g}" for gamma in base["gammas"])]
    return ["--epochs", str(epochs), *milestones]


def make_plan(
    nets: Sequence[str],
    rates: Sequence[float],
    methods: Sequence[str],
    seeds: Sequence[int],
    flags: list[str],
    folder: Path,
    *,
    teacher_net: str | None = None,
    teacher: str | None = None,
) -> list[Row]:
    """Every row, those that others need before them, seed by seed.

    Args:
        rates: shares of the filters REMOVED.
        methods: of METHODS.
        flags: for the training script, in canonical form (`--name`), without what the table sets itself.
        folder: the runs' folders are made in it.
        teacher_net: teaches every network; the first seed's baseline of it is trained where the plan does not have it.
        teacher: a checkpoint that teaches instead.

    Raises:
        UserError: a network has no usual teacher, or the training script refuses the flags.
    """
    rows: dict[Path, Row] = {}
    args = script.parser().parse_args(flags)
    fitted = args.fit_schedule
    common = without(flags, {"epochs": 1, "fit_schedule": 0}) if args.epochs else list(flags)
    length = f"-{args.epochs}-epochs" if args.epochs else ""
    own_teacher = script.models.load_with_name(teacher)[0] if teacher else None

    def add(method: str, arch: str, HTrate: float, seed: int) -> Path:
        kind = METHODS[method]
        rate = f"-HT{HTrate:g}" if kind.pruned else ""
        taught = own_teacher or teacher_net or TEACHERS.get(arch) if kind.teacher else None
        if kind.teacher and taught is None:
            raise UserError(f"no usual teacher for {arch}; name one with --teacher_net or --teacher")
        path = folder / f"{args.dataset}-{arch}-{method}{rate}{f'-from-{taught}' if taught else ''}{length}-seed{seed}"
        if path in rows:
            return path
        taken = {} if kind.pruned else dict(PRUNED_ONLY)
        taken |= {"v": 1, "norm": 1} if kind.small else {}
        taken |= {} if kind.teacher else DISTILLED_ONLY
        taken |= GROWTH if "--k" in kind.flags else {}
        own = [*without(common, taken), "--recipe", kind.recipe, *kind.flags]
        needs: list[Path] = []
        if kind.teacher:
            if teacher is None:
                needs.append(add("baseline", taught, 1.0, seeds[0]))
            file = teacher or str(needs[0] / f"checkpoint.{taught}.pth.tar")
            own += ["--arch", taught, "--arch_small", arch, "--teacher", file]
        else:
            own += ["--arch", arch]
        if kind.small:
            needs.append(add("prune", arch, HTrate, seed))
            own += ["--widths_of", str(needs[0] / f"small.{arch}.pth.tar")]
            for name in ("batch_size", "k"):
                given = getattr(args, name)
                own += [] if given else [f"--{name}", str(RECIPES["prune"][name])]
        elif kind.pruned:
            own += ["--HTrate", f"{HTrate:g}"]
        own += ["--manualSeed", str(seed)]
        epochs = args.epochs or RECIPES["baseline" if kind.small else kind.recipe]["epochs"]
        if args.epochs:
            own += length_flags(epochs, fitted=fitted)
        row = Row(path, method, arch, HTrate, seed, tuple(own), tuple(needs), epochs, kind.equal_cost)
        row.settings()
        rows[path] = row
        return path

    for seed in seeds:
        for arch in nets:
            for method in methods:
                for rate in rates if METHODS[method].pruned else (0.0,):
                    add(method, arch, round(1 - rate, 12), seed)
    return list(rows.values())


def state(row: Row) -> tuple[str, str]:
    """("done" | "begun" | "new" | "other", a remark): what the row's folder holds. "other" is a run with other settings."""
    file = row.folder / "results.json"
    try:
        results = json.loads(file.read_text())
        saved, finished = results["settings"], results["finished"] is True
        done, accuracy = int(results["epochs_done"]), float(results["last_epoch_accuracy"])
    except FileNotFoundError:
        return "new", ""
    except (OSError, ValueError, KeyError, TypeError):
        return "begun", "results.json is damaged"
    planned = vars(row.settings())
    names = [name for name in (*SAME_RUN, "student") if name in saved and name in planned]
    names += [] if row.equal_cost else ["epochs"]
    skipped = {"data_path", "teacher", *(("schedule", "gammas") if row.equal_cost else ())}
    changed = [name for name in names if name not in skipped and saved.get(name) != planned[name]]
    changed += [n for n in ("data_path", "teacher") if _place(saved.get(n)) != _place(planned.get(n))]
    if changed:
        differences = ", ".join(f"{name} {saved.get(name)} instead of {planned[name]}" for name in changed)
        return "other", f"'{row.folder}' holds a run with {differences}; choose another --save_path"
    return ("done", f"{accuracy:.2f} %") if finished else ("begun", f"{done} epochs done")


def _place(path: str | None) -> Path | None:
    return None if path is None else Path(path).resolve()
