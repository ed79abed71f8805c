"""Own results: every results.json under some folders, which method and recipe it is, and the runs that differ by their seed only.

What a run is follows from its settings, never from the names of folders.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from utils.compare.run_costs import Costs, mean_costs, run_costs
from utils.compare.statistics import Summary, summarise
from utils.train.options import OneLineParser, add_training_options
from utils.train.recipes import fit_schedule, recipes_of
from utils.train.resume import SAME_RUN

ROOT = Path(__file__).resolve().parents[2]
# Training and test images that the published figures stand on.
FULL_SIZES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "imagenet": (1_281_167, 50_000)}
# Settings that make two runs comparable in length, whatever their method.
LENGTH = ("epochs", "learning_rate", "momentum", "decay", "schedule", "gammas")
# Settings of a run that method, rate, seed and place say already, or that say nothing of the recipe.
TOLD_ELSEWHERE = {"recipe", "dataset", "data_path", "HTrate", "manualSeed", "teacher", "widths_of"} | {
    *("amp", "compile", "deterministic")
}
DISTILLATION = {"loss", "kd_on", "kd_weight", "kd_T", "share_classifier"}
PHRASES = {
    ("threshold_every", "epoch"): "threshold per epoch",
    ("heavy_ball", "released"): "heavy ball released",
    ("no_regrow", True): "no regrowth",
    ("k", None): "fixed mini-batch",
    ("no_restart", True): "growth goes on over epochs",
    ("v", 0): "no heavy ball",
    ("amp", True): "bfloat16",
    ("init", "pretrained"): "pretrained",
}
NEEDED = {
    **{"finished": bool, "recipe": str, "dataset": str, "arch": str, "seed": int, "epochs_done": int, "settings": dict},
    **{"last_epoch_accuracy": (int, float), "best_epoch_accuracy": (int, float)},
    **{"HTrate": (int, float), "prune_rate": (int, float)},
}


class Damaged(Exception):
    """A results.json that cannot be used, and why."""


@dataclass(frozen=True)
class OwnRun:
    """A finished or running run: its folder and the content of its results.json."""

    folder: Path
    results: dict

    @cached_property
    def costs(self) -> Costs:
        return run_costs(self.results)

    @property
    def command(self) -> str:
        return self.results.get("command", "not recorded")

    @property
    def log(self) -> str:
        path = self.folder / f"log_seed_{self.results['seed']}.txt"
        return show_path(path) if path.is_file() else "none"

    def speed_ups(self) -> dict[str, float]:
        """{"batch 128 on cpu": speed-up} of the latency file beside, largest mini-batch per device; {} without one."""
        found: dict[str, tuple[int, float]] = {}
        try:
            timings = json.loads((self.folder / f"latency.{self.results['arch']}.json").read_text())["timings"]
            for timing in timings:
                found[timing["device"]] = max(
                    found.get(timing["device"], (0, 0.0)), (int(timing["batch_size"]), float(timing["speed_up"]))
                )
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {f"batch {batch} on {device}": speed_up for device, (batch, speed_up) in found.items()}


def show_path(path: Path) -> str:
    """A path relative to the project where it is inside, else to the working folder where it is inside, else as it is."""
    absolute = path.resolve()
    for root in (ROOT, Path.cwd().resolve()):
        if absolute.is_relative_to(root):
            return absolute.relative_to(root).as_posix()
    return path.as_posix()


def read_run(file: Path) -> OwnRun:
    """One results.json, checked.

    Raises:
        Damaged: it is no JSON, lacks an entry, or has one that cannot be.
    """
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise Damaged(error.strerror or str(error)) from None
    except (ValueError, RecursionError):
        raise Damaged("no JSON") from None
    if not isinstance(results, dict):
        raise Damaged("no results of a run")
    for name, kind in NEEDED.items():
        value = results.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise Damaged(f"'{name}' is {value!r}" if name in results else f"'{name}' is missing")
    if not isinstance(results.get("command", ""), str):
        raise Damaged(f"'command' is {results['command']!r}")
    for name in ("last_epoch_accuracy", "best_epoch_accuracy"):
        if not 0 <= results[name] <= 100:
            raise Damaged(f"'{name}' is {results[name]}, no accuracy in %")
    if not (0 < results["HTrate"] <= 1 and math.isclose(results["HTrate"] + results["prune_rate"], 1)):
        raise Damaged(f"'HTrate' is {results['HTrate']} and 'prune_rate' {results['prune_rate']}")
    return OwnRun(file.parent, results)


def find_runs(folders: Iterable[Path]) -> tuple[list[OwnRun], list[str]]:
    """Finished runs under some folders, by path, each once; and a note per results.json that was passed over."""
    files: dict[Path, Path] = {}
    for folder in folders:
        for path, subfolders, names in os.walk(folder):
            subfolders.sort()
            if "results.json" in names:
                file = Path(path) / "results.json"
                files.setdefault(file.resolve(), file)
    runs, notes = [], []
    for file in files.values():
        try:
            run = read_run(file)
            _ = run.costs, recipe_text(run.results), not_comparable(run.results), run.log, run.speed_ups()
            hash(group_key(run.results))
        except Damaged as error:
            notes.append(f"'{show_path(file)}' is damaged and passed over: {error}")
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, OSError) as error:
            notes.append(
                f"'{show_path(file)}' is damaged and passed over: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
            )
        else:
            if run.results["finished"]:
                runs.append(run)
            else:
                notes.append(
                    f"'{show_path(file)}' is passed over: {run.results['epochs_done']} of {run.results['settings'].get('epochs')} epochs"
                )
    return runs, notes


@cache
def defaults(recipe: str, dataset: str) -> dict:
    """The settings of a recipe where a command line gives nothing else."""
    parser = OneLineParser()
    add_training_options(parser)
    options = vars(parser.parse_args([]))
    return {**options, **recipes_of(dataset).get(recipe, {}), "loss": "MSE", "kd_on": "feature"}


def method(results: dict) -> str:
    """What a run is, from its settings. AHSG-HT without its heavy ball (v = 0) is the paper's HSG-HT."""
    settings = results["settings"]
    if settings.get("widths_of"):
        name = "small from scratch"
    elif results["HTrate"] < 1:
        name = "AHSG-HT" if setting(results, "v") else "HSG-HT"
    elif setting(results, "v"):
        name = "heavy ball, unpruned"
    else:
        name = "" if settings.get("teacher") else "baseline"
    name = f"{name}+KD".removeprefix("+") if settings.get("teacher") else name
    return f"{name}, fine-tuned" if results["recipe"] == "finetune" else name


def init(results: dict) -> str:
    """scratch, or pretrained: the run began with the weights of another one."""
    settings = results["settings"]
    other = results["recipe"] == "finetune" or settings.get("started_from") or settings.get("use_pretrain")
    return "pretrained" if other else "scratch"


def setting(results: dict, name: str):
    """A setting of a run; the recipe's where results.json is older than the option."""
    settings = results["settings"]
    return settings[name] if name in settings else defaults(results["recipe"], results["dataset"]).get(name)


def recipe_key(results: dict) -> tuple:
    """Everything that makes a recipe, so that runs of equal keys, method and rate differ by their seed only."""
    known = {**defaults(results["recipe"], results["dataset"]), **results["settings"]}
    idle = set() if known.get("teacher") else set(DISTILLATION)
    idle |= {"threshold_every", "norm", "no_regrow"} if results["HTrate"] == 1 else set()
    idle |= {"heavy_ball"} if not known["v"] else set()
    idle |= {"growth", "max_batch_size"} if known["k"] is None or known["k"] >= 1 else set()
    idle |= {"no_restart"} if known["k"] is None else set()
    names = [name for name in (*SAME_RUN, "epochs", "head_width") if name not in TOLD_ELSEWHERE | idle]
    teacher = results.get("teacher", {})
    images = results.get("train_images"), results.get("test_images")
    values = {
        **{name: known.get(name) for name in names},
        **{"teacher": (teacher.get("arch"), teacher.get("sha256")), "images": images, "init": init(results)},
        "amp": results.get("arithmetic") == "bfloat16",
        "small_of": small_of(results) if known["widths_of"] else None,
    }
    return tuple((name, _hashable(value)) for name, value in sorted(values.items()))


def group_key(results: dict) -> tuple:
    """What the runs of a group share."""
    return results["dataset"], results["arch"], results["prune_rate"], method(results), recipe_key(results)


def recipe_text(results: dict) -> str:
    """The recipe in words: its epochs, and in what it differs from the recipe of its name."""
    usual = {**defaults(results["recipe"], results["dataset"]), "init": "scratch", "amp": False}
    given = dict(recipe_key(results))
    parts = [f"{given['epochs']} epoch{'s' if given['epochs'] > 1 else ''}"]
    # A shortened run may follow the schedule of its own recipe or, to be comparable with the others, the baseline's.
    for recipe in (usual, recipes_of(results["dataset"])["baseline"]):
        fitted = tuple(fit_schedule(recipe["schedule"], given["epochs"], recipe["epochs"]))
        if (given["schedule"], given["gammas"]) == (fitted, tuple(recipe["gammas"])):
            usual.update(schedule=fitted, gammas=recipe["gammas"])
    if (teacher := results.get("teacher")) and results["settings"].get("teacher"):
        parts.append(f"teacher {teacher['arch']} of {teacher['accuracy']:.2f} %")
    if given["small_of"]:
        parts.append(f"small network of {given['small_of']}")
    for name, value in given.items():
        if name in ("epochs", "teacher", "images", "small_of") or value == _hashable(usual.get(name)):
            continue
        text = " ".join(map(str, value)) if isinstance(value, tuple) else value
        parts.append(PHRASES.get((name, value), f"{name} {text}"))
    return ", ".join(parts)


def describe_source(small_file: str) -> str | None:
    """What the small network in a file was cut out of ("AHSG-HT 30 %"), from the results.json beside it; None where there is none."""
    for path in (Path(small_file), ROOT / small_file):
        try:
            source = read_run(path.parent / "results.json").results
            if source["settings"].get("widths_of"):
                return None
            special = recipe_text(source).split(", ", 1)[1:]
        except (Damaged, KeyError, TypeError, ValueError, AttributeError):
            continue
        return ", ".join([f"{method(source)} {100 * source['prune_rate']:g} %", *special])
    return None


def small_of(results: dict) -> str:
    """The pruned run whose small network another one trains from scratch: as it noted, else as is known of the file.

    Where nothing is: the narrowest layer, in which small networks of one rate agree; the residual stream differs from seed to seed.
    """
    noted = results.get("widths_from") or describe_source(results["settings"]["widths_of"])
    return noted or f"narrowest layer {min(layer['shape'][0] for layer in results['filters'])}"


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


def odd_data(results: dict) -> str:
    """Why a run's images are not those of published figures; "" where they are."""
    if results["synthetic_data"] if "synthetic_data" in results else results["dataset"] == "synthetic":
        return "SYNTHETIC DATA"
    sizes = results.get("train_images"), results.get("test_images")
    full_sizes = FULL_SIZES.get(results["dataset"])
    if full_sizes is None:
        return "own data"
    return f"{sizes[0]} training and {sizes[1]} test images" if None not in sizes and sizes != full_sizes else ""


def other_length(results: dict) -> str:
    """How many epochs a run has instead of its recipe's; "" for a full recipe."""
    recipes = recipes_of(results["dataset"])
    full = recipes.get(results["recipe"], recipes["baseline"])["epochs"]
    epochs = results["epochs_run_here"] if "epochs_run_here" in results else results["epochs_done"]
    return f"{epochs} epoch{'s' if epochs > 1 else ''} instead of {full}" if epochs != full else ""


def not_comparable(results: dict) -> str:
    """Why a run's accuracy must not be set beside published ones; "" where it may."""
    return "; ".join(reason for reason in (odd_data(results), other_length(results)) if reason)


@dataclass
class Group:
    """Runs that differ by their seed only."""

    runs: list[OwnRun] = field(default_factory=list)

    @property
    def first(self) -> dict:
        return self.runs[0].results

    @property
    def method(self) -> str:
        return method(self.first)

    @property
    def recipe(self) -> str:
        return recipe_text(self.first)

    @property
    def marks(self) -> str:
        return not_comparable(self.first)

    @property
    def costs(self) -> Costs:
        """Means over the seeds, whose small networks may differ by some dead channels of the stream."""
        return mean_costs([run.costs for run in self.runs])

    @property
    def kind(self) -> tuple:
        """What two groups must share before their accuracies are compared at all."""
        r = self.first
        images = r.get("train_images"), r.get("test_images")
        return r["dataset"], r["arch"], setting(r, "head_width"), images, init(r)

    @property
    def epochs(self) -> int:
        return setting(self.first, "epochs") or self.first["epochs_done"]

    @property
    def is_small(self) -> bool:
        """A small network that was trained from scratch."""
        return bool(self.first["settings"].get("widths_of"))

    @property
    def arithmetic(self) -> str:
        return "bfloat16" if self.first.get("arithmetic") == "bfloat16" else "float32"

    @property
    def schedule(self) -> tuple:
        """The mini-batches of an epoch."""
        return tuple(
            setting(self.first, name) for name in ("batch_size", "k", "growth", "max_batch_size", "no_restart")
        )

    @property
    def length(self) -> tuple:
        return tuple(_hashable(setting(self.first, name)) for name in LENGTH)

    def last(self) -> list[float]:
        return [run.results["last_epoch_accuracy"] for run in self.runs]

    def best(self) -> list[float]:
        return [run.results["best_epoch_accuracy"] for run in self.runs]

    @property
    def summary(self) -> Summary:
        return summarise(self.last())


def group_runs(runs: list[OwnRun]) -> tuple[list[Group], list[str]]:
    """Groups of runs that differ by their seed only, by data set, network, rate and method; a note per run that repeats a seed."""
    groups: dict[tuple, Group] = {}
    notes = []
    for run in runs:
        r = run.results
        key = group_key(r)
        group = groups.setdefault(key, Group())
        twin = next((other for other in group.runs if other.results["seed"] == r["seed"]), None)
        if twin:
            notes.append(
                f"'{show_path(run.folder)}' ({r['last_epoch_accuracy']:.2f} %) repeats seed {r['seed']} of '{show_path(twin.folder)}' "
                f"({twin.results['last_epoch_accuracy']:.2f} %), which alone is counted"
            )
        else:
            group.runs.append(run)
    for group in groups.values():
        group.runs.sort(key=lambda run: run.results["seed"])
    order = sorted(groups, key=lambda key: (*key[:3], "baseline" not in key[3], key[3], str(key[4])))
    return [groups[key] for key in order], notes
