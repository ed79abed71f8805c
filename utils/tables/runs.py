"""Own results: every results.json under some folders, what kind of run it is, and groups that differ by seed only.

What a run is follows from its settings, never from the names of folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from utils.tables.costs import Costs, run_costs
from utils.tables.statistics import half_width
from utils.train.options import identity, phrase, recipe_settings
from utils.train.recipes import fit_schedule, recipes_of

ROOT = Path(__file__).resolve().parents[2]
# Training and test images that the published figures stand on.
FULL_SIZES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "imagenet": (1_281_167, 50_000)}
# Epochs from which on a run that began with a trained network may stand beside published ones that did.
EPOCHS_FROM_TRAINED = 40
# Options with a column of their own, or part of the method's name; files, of which the content counts.
OWN_COLUMN = {"recipe", "dataset", "arch", "arch_small", "student", "epochs", "HTrate", "prune_rate", "macs_cut", "v"}
FILES = {"teacher", "widths_of", "started_from", "resume", "use_pretrain"}


class Damaged(Exception):
    """A results.json that cannot be used, and why."""


@dataclass(frozen=True)
class Run:
    """A finished or running run: its folder and the content of its results.json."""

    folder: Path
    results: dict

    @cached_property
    def settings(self) -> dict:
        """Its settings; options that are newer than its results.json have the value of its recipe."""
        return {**recipe_settings(self.results["recipe"], self.results["dataset"]), **self.results["settings"]}

    @property
    def epochs(self) -> int:
        """Epochs that were run here: a resumed checkpoint of others may have more behind it."""
        return self.results.get("epochs_run_here", self.results["epochs_done"])

    @property
    def is_small(self) -> bool:
        """A small network that was trained from scratch."""
        return bool(self.settings.get("widths_of"))

    @property
    def is_gradual(self) -> bool:
        return self.results["recipe"] == "prune_gradual"

    @property
    def pruned(self) -> float | None:
        """Share of the filters removed from every layer in %; None where there is no one share."""
        return None if self.is_small or self.is_gradual else 100 * (self.results.get("prune_rate") or 0.0)

    @property
    def started_from(self) -> str:
        """random weights, or the file of another network."""
        file = self.settings.get("started_from") or self.settings.get("use_pretrain")
        if isinstance(file, str):
            return f"trained {Path(file).name}"
        return "trained weights" if file or self.results["recipe"] == "finetune" else "random weights"

    @property
    def init(self) -> str:
        """scratch or pretrained, as published rows have it."""
        return "scratch" if self.started_from == "random weights" else "pretrained"

    @property
    def teacher(self) -> str:
        """Network and accuracy of the teacher, "" without one."""
        teacher = self.results.get("teacher") if self.settings.get("teacher") else None
        return f"{teacher['arch']} of {teacher['accuracy']:.2f} %" if teacher else ""

    @property
    def arithmetic(self) -> str:
        """Number format, and the number of processes where there are several."""
        processes = self.results.get("processes", 1)
        return self.results.get("arithmetic", "float32") + (f", {processes} processes" if processes > 1 else "")

    @property
    def images(self) -> tuple:
        return self.results.get("train_images"), self.results.get("test_images")

    @property
    def data_remark(self) -> str:
        """Why a run's images are not those of published figures; "" where they are."""
        dataset = self.results["dataset"]
        if self.results.get("synthetic_data", dataset == "synthetic"):
            return "SYNTHETIC DATA"
        usual = None in self.images or self.images == FULL_SIZES.get(dataset, self.images)
        return (
            "own data"
            if dataset not in FULL_SIZES
            else ""
            if usual
            else "{} training, {} test images".format(*self.images)
        )

    @property
    def remark(self) -> str:
        """Why a run's accuracy must not be set beside published ones; "" where it may."""
        full = max(recipe_settings(r, self.results["dataset"])["epochs"] for r in (self.results["recipe"], "baseline"))
        full = full if self.init == "scratch" else min(full, EPOCHS_FROM_TRAINED)
        return self.data_remark or (f"{self.epochs} epochs instead of {full}" if self.epochs < full else "")

    @property
    def method(self) -> str:
        """AHSG-HT without its heavy ball (v = 0) is the paper's HSG-HT."""
        if self.is_small or self.is_gradual:
            name = "small network from scratch" if self.is_small else "gradual"
        elif self.pruned:
            name = "AHSG-HT" if self.settings["v"] else "HSG-HT"
        else:
            name = "" if self.teacher else "baseline"
        name = f"{name}+KD".removeprefix("+") if self.teacher else name
        return f"{name}, fine-tuned" if self.results["recipe"] == "finetune" else name

    @cached_property
    def small_of(self) -> str:
        """The pruned run whose small network this one trains: as it noted, else as its results.json says; or ""."""
        file = self.settings.get("widths_of")
        return (self.results.get("widths_from") or describe_source(file) or "unknown") if file else ""

    @cached_property
    def name(self) -> str:
        """Network, method, rate, in what the recipe differs from that of its name, number format and processes."""
        dataset, recipe = self.results["dataset"], self.results["recipe"]
        usual = recipe_settings(recipe, dataset)
        usual |= recipes_of(dataset)[recipe].get("trained", {}) if self.init == "pretrained" else {}
        for recipe in (usual, recipe_settings("baseline", dataset)):
            # A shortened run follows the milestones of its own recipe or, in a table of several, the baseline's.
            fitted = fit_schedule(recipe["schedule"], self.settings["epochs"], recipe["epochs"])
            if (self.settings["schedule"], self.settings["gammas"]) == (fitted, recipe["gammas"]):
                usual = {**usual, "schedule": fitted, "gammas": recipe["gammas"]}
        special = {
            n: v for n, v in identity(self.settings).items() if n not in OWN_COLUMN | FILES and v != usual.get(n)
        }
        parts = [f"{self.results['arch']} {self.method}{f' {self.pruned:g} %' if self.pruned else ''}"]
        parts += [f"of {self.small_of}"] if self.small_of else []
        parts += [phrase(name, value) for name, value in special.items()]
        return ", ".join([*parts, *([] if self.arithmetic == "float32" else [self.arithmetic])])

    @cached_property
    def key(self) -> str:
        """What runs share that differ by their seed only."""
        results, teacher = self.results, self.results.get("teacher", {})
        options = {name: value for name, value in identity(self.settings).items() if name not in FILES}
        own = [results["dataset"], results["arch"], results["recipe"], teacher.get("arch"), teacher.get("sha256")]
        own += [self.small_of, self.epochs, self.started_from, self.images, self.arithmetic]
        return json.dumps([options, own], sort_keys=True)

    @cached_property
    def costs(self) -> Costs:
        return run_costs(self.folder, self.results, pruned=self.pruned, small=self.is_small)

    @property
    def speed_up(self) -> str:
        """Speed of the small network over the full one in the largest mini-batch, from the latency files beside."""
        found: dict[str, tuple[int, float]] = {}
        for file in self.folder.glob("latency.*.json"):
            for timing in json.loads(file.read_text())["timings"]:
                entry = int(timing["batch_size"]), float(timing["speed_up"])
                found[timing["device"]] = max(found.get(timing["device"], entry), entry)
        return ", ".join(f"{times:.2f} (batch {batch}, {device})" for device, (batch, times) in found.items())

    @property
    def minutes(self) -> str:
        """Time and machine."""
        machine = self.results.get("machine", {})
        where = machine.get("gpu") or f"{machine.get('threads', '?')} of {machine.get('cpu_cores', '?')} CPU cores"
        where += f", in {self.results['pieces']} pieces" if self.results.get("pieces", 1) > 1 else ""
        return f"{self.results['seconds'] / 60:.0f}, {where}" if "seconds" in self.results else ""


class Group(list):
    """Runs that differ by their seed only, ascending; not empty."""

    @property
    def first(self) -> Run:
        return self[0]

    @property
    def last(self) -> dict[int, float]:
        """{seed: last epoch's accuracy in %}."""
        return {run.results["seed"]: run.results["last_epoch_accuracy"] for run in self}

    @property
    def mean(self) -> float:
        return sum(self.last.values()) / len(self)

    @property
    def test_images(self) -> int:
        return self.first.images[1] or FULL_SIZES["cifar10"][1]

    @property
    def half_width(self) -> float | None:
        return half_width(list(self.last.values()), self.test_images)

    @property
    def kind(self) -> dict:
        """What two groups share whose accuracies may be compared."""
        run, shared = self.first, ("dataset", "arch")
        return {n: run.results[n] for n in shared} | {n: getattr(run, n) for n in ("images", "init", "epochs")}

    @property
    def title(self) -> str:
        """The same in words."""
        return "{arch} on {dataset}, {epochs} epochs, {init}".format(**self.kind) + self.first.data_remark

    @property
    def may_stand_beside_published(self) -> bool:
        return not self.first.remark and not self.first.is_small

    def accuracy(self) -> str:
        """Mean of the last epochs, with interval and seeds; in brackets that of the best epochs."""
        best = sum(run.results["best_epoch_accuracy"] for run in self) / len(self)
        seeds = "one seed" if len(self) == 1 else f"± {self.half_width:.2f}, {len(self)} seeds"
        return f"{self.mean:.2f} {seeds} ({best:.2f})"


def show_path(path: Path) -> str:
    """A path relative to the project where it is inside, else as it is."""
    absolute = path.resolve()
    return absolute.relative_to(ROOT).as_posix() if absolute.is_relative_to(ROOT) else path.as_posix()


def read_run(file: Path) -> Run:
    """One results.json, checked.

    Raises:
        Damaged: it is no JSON, lacks an entry, or has one that cannot be.
    """
    try:
        run = Run(file.parent, json.loads(file.read_text(encoding="utf-8")))
        _ = run.key, run.name, run.costs, run.remark, run.speed_up, run.minutes, Group([run]).accuracy()
        if not (0 <= run.results["last_epoch_accuracy"] <= 100 and run.results["finished"] in (True, False)):
            raise ValueError(f"accuracy {run.results['last_epoch_accuracy']} %, finished {run.results['finished']}")
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError, OSError) as error:
        raise Damaged(f"{type(error).__name__}: {' '.join(str(error).split())[:100]}") from None
    return run


def find_runs(folders: Iterable[Path]) -> tuple[list[Group], list[str]]:
    """Groups of the finished runs under some folders; and a note per results.json that is not among them."""
    groups, notes = {}, []
    for file in sorted({file.resolve() for folder in folders for file in folder.rglob("results.json")}):
        where = show_path(file.parent)
        try:
            run = read_run(file)
        except Damaged as error:
            notes.append(f"{where} is damaged and passed over: {error}")
            continue
        results, group = run.results, groups.get(run.key, Group())
        if not results["finished"]:
            notes.append(
                f"{where}: {run.name} is not finished, {results['epochs_done']} of {run.settings['epochs']} epochs"
            )
        elif results["seed"] in group.last:
            notes.append(
                f"{where} repeats seed {results['seed']} ({results['last_epoch_accuracy']:.2f} %), passed over"
            )
        else:
            groups[run.key] = Group(sorted([*group, run], key=lambda run: run.results["seed"]))

    def order(group: Group) -> tuple:
        run, arch = group.first, group.first.results["arch"]
        return run.results["dataset"], len(arch), arch, run.epochs, run.method != "baseline", run.pruned or 0, run.name

    return sorted(groups.values(), key=order), notes


def describe_source(small_file: str) -> str | None:
    """What the small network in a file was cut out of ("AHSG-HT 30 %"), by the results.json beside it, or None."""
    for path in (Path(small_file), ROOT / small_file):
        try:
            run = read_run(path.parent / "results.json")
        except Damaged:
            continue
        return None if run.is_small else run.name.removeprefix(f"{run.results['arch']} ")
    return None
