"""Own results: every results.json under some folders, what kind of run it is, and groups that differ by seed only.

What a run is follows from its settings, never from the names of folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from utils.base.errors import UserError
from utils.tables.costs import run_costs
from utils.tables.statistics import half_width
from utils.train.options import identity, phrase, recipe_settings
from utils.train.recipes import fit_schedule, recipes_of

ROOT = Path(__file__).resolve().parents[2]
# Training and test images that the published figures stand on.
FULL_SIZES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "imagenet": (1_281_167, 50_000)}
# Epochs from which on a run that began with a trained network may stand beside published ones that did.
EPOCHS_FROM_TRAINED = 40
# Options with a column of their own, or part of the method's name; files, of which the content counts.
OWN_COLUMN = {"recipe", "dataset", "arch", "arch_small", "student", "epochs", "HTrate", "prune_rate", "macs_cut"}
FILES = {"teacher", "widths_of", "started_from", "resume", "use_pretrain"}


class Damaged(Exception):
    """A results.json that cannot be used, and why."""


class Run:
    """A run: its folder, the content of its results.json, and what that means for the tables.

    Attributes:
        settings: options that are newer than its results.json have the value of its recipe.
        epochs: those that were run here; a resumed checkpoint of others may have more behind it.
        images: numbers of training and test images.
        arithmetic: number format, and number of processes where there are several.
        teacher: network and accuracy of the teacher, "" without one.
        started_from: random weights, or the file of another network; init: scratch or pretrained, as in published rows.
        is_small: it trained a small network from scratch; small_of: what that was cut out of, "" for other runs.
        is_gradual: pruned by the recipe prune_gradual.
        pruned: share of the filters removed from every layer in %; None where there is no one share.
        data_remark: why the images are not those of published figures, "" where they are.
        remark: why the accuracy must not be set beside published ones, "" where it may.
        name: network, method, rate, and in what the recipe differs from that of its name.
        key: what runs share that differ by their seed only.
    """

    def __init__(self, folder: Path, results: dict):
        self.folder, self.results = folder, results
        dataset, recipe, arch = (results[name] for name in ("dataset", "recipe", "arch"))
        usual, baseline = recipe_settings(recipe, dataset), recipe_settings("baseline", dataset)
        self.settings = settings = {**usual, **results["settings"]}
        self.epochs = results.get("epochs_run_here", results["epochs_done"])
        self.images = results.get("train_images"), results.get("test_images")
        processes = results.get("processes", 1)
        self.arithmetic = results.get("arithmetic", "float32") + (f", {processes} processes" if processes > 1 else "")
        teacher = results.get("teacher", {}) if settings.get("teacher") else {}
        self.teacher = f"{teacher['arch']} of {teacher['accuracy']:.2f} %" if teacher else ""
        file = settings.get("started_from") or settings.get("use_pretrain")
        trained = f"trained {Path(file).name}" if isinstance(file, str) else "trained weights"
        self.init = "pretrained" if file or recipe == "finetune" else "scratch"
        self.started_from = trained if self.init == "pretrained" else "random weights"
        file = settings.get("widths_of")
        self.is_small, self.is_gradual = bool(file), recipe == "prune_gradual"
        self.small_of = (results.get("widths_from") or describe_source(file) or "unknown") if file else ""
        one_share = not self.is_small and not self.is_gradual
        self.pruned = 100 * (results.get("prune_rate") or 0.0) if one_share else None
        self.costs = run_costs(folder, results, pruned=self.pruned, small=self.is_small)
        self.data_remark = self._data_remark()
        full = max(usual["epochs"], baseline["epochs"])
        full = min(full, EPOCHS_FROM_TRAINED) if self.init == "pretrained" else full
        self.remark = self.data_remark or (f"{self.epochs} epochs instead of {full}" if self.epochs < full else "")
        self.method = self._method()
        of_trained = recipes_of(dataset)[recipe].get("trained", {}) if self.init == "pretrained" else {}
        special = self._special({**usual, **of_trained}, baseline)
        rate = 0.0 if self.is_small else 100 * (settings.get("macs_cut") or results.get("prune_rate") or 0.0)
        rate = f" {rate:g} %{' of multiply-adds' if settings.get('macs_cut') else ''}" if rate else ""
        self.name = ", ".join([f"{arch} {self.method}{rate}", *special])
        options = {name: value for name, value in identity(settings).items() if name not in FILES}
        own = [dataset, recipe, arch, teacher.get("arch"), teacher.get("sha256"), self.small_of, self.epochs]
        self.key = json.dumps([options, own, self.started_from, self.images, self.arithmetic], sort_keys=True)
        self.speed_up, self.minutes = self._speed_up(), self._minutes()

    def _data_remark(self) -> str:
        dataset = self.results["dataset"]
        if self.results.get("synthetic_data", dataset == "synthetic"):
            return "SYNTHETIC DATA"
        usual = None in self.images or self.images == FULL_SIZES.get(dataset, self.images)
        remark = "" if usual else "{} training, {} test images".format(*self.images)
        return remark if dataset in FULL_SIZES else "own data"

    def _method(self) -> str:
        """AHSG-HT without its heavy ball (v = 0) is the paper's HSG-HT."""
        if self.is_small or self.is_gradual:
            name = "small network from scratch" if self.is_small else "gradual"
        elif self.settings["v"]:
            name = "AHSG-HT" if self.pruned else "heavy ball, unpruned"
        else:
            name = "HSG-HT" if self.pruned else "" if self.teacher else "baseline"
        name = f"{name}+KD".removeprefix("+") if self.teacher else name
        return f"{name}, fine-tuned" if self.results["recipe"] == "finetune" else name

    def _special(self, usual: dict, baseline: dict) -> list[str]:
        """In what the run differs from the usual settings of its recipe, in words."""
        settings = self.settings
        for recipe in (usual, baseline):
            # A shortened run follows the milestones of its own recipe or, in a table of several, the baseline's.
            fitted = fit_schedule(recipe["schedule"], settings["epochs"], recipe["epochs"])
            if (settings["schedule"], settings["gammas"]) == (fitted, recipe["gammas"]):
                usual = {**usual, "schedule": fitted, "gammas": recipe["gammas"]}
        special = {n: v for n, v in identity(settings).items() if n not in OWN_COLUMN | FILES and v != usual.get(n)}
        words = [f"of {self.small_of}"] if self.is_small else []
        words += [phrase(name, value) for name, value in special.items()]
        return words + ([] if self.arithmetic == "float32" else [self.arithmetic])

    def _speed_up(self) -> str:
        """Speed of the small network over the full one in the largest mini-batch, from the latency files beside."""
        found: dict[str, tuple[int, float]] = {}
        for file in self.folder.glob("latency.*.json"):
            for timing in json.loads(file.read_text())["timings"]:
                entry = int(timing["batch_size"]), float(timing["speed_up"])
                found[timing["device"]] = max(found.get(timing["device"], entry), entry)
        return ", ".join(f"{times:.2f} (batch {batch}, {device})" for device, (batch, times) in found.items())

    def _minutes(self) -> str:
        """Time, machine, and in how many pieces."""
        machine, pieces = self.results.get("machine", {}), self.results.get("pieces", 1)
        where = machine.get("gpu") or f"{machine.get('threads', '?')} of {machine.get('cpu_cores', '?')} CPU cores"
        where += f", in {pieces} pieces" if pieces > 1 else ""
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
        remark = f", {self.first.data_remark}" if self.first.data_remark else ""
        return "{arch} on {dataset}, {epochs} epochs, {init}".format(**self.kind) + remark

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
        accuracy, finished = run.results["last_epoch_accuracy"], run.results["finished"]
        if not (0 <= accuracy <= 100 and finished in (True, False) and Group([run]).accuracy()):
            raise ValueError(f"accuracy {accuracy} %, finished {finished}")
    except (
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
        OSError,
        UserError,
    ) as error:
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
