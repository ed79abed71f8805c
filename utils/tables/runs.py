"""Own results: every results.json under some folders, what kind of run it is, and groups that differ by seed only.

What a run is follows from its settings, never from the names of folders.
"""

import json
import shlex
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from utils.base.errors import UserError
from utils.tables.costs import run_costs
from utils.tables.statistics import half_width
from utils.train.options import ALL, CONCERNED, command_words, identity, phrase, recipe_settings
from utils.train.recipes import fit_schedule, recipes_of
from utils.train.report import unpack_hits

ROOT = Path(__file__).resolve().parents[2]
# Training and test images that the published figures stand on.
FULL_SIZES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "imagenet": (1_281_167, 50_000)}
# Epochs from which on a run that began with a trained network may stand beside published ones that did.
EPOCHS_FROM_TRAINED = 40


class Run:
    """A run: its folder, the content of its results.json, and what that means for the tables.

    Attributes:
        settings: options that are newer than its results.json have the value of its recipe.
        epochs: those that were run here; a resumed checkpoint of others may have more behind it.
        images: numbers of training and test images.
        arithmetic: number format, and number of processes where there are several, of all its pieces.
        teacher: network and accuracy of the teacher, "" without one.
        started_from: random weights, or the file of another network; init: scratch or pretrained, as in published rows.
        is_small: it trained a small network from scratch.
        is_gradual: pruned by the recipe prune_gradual.
        pruned: share of the filters removed from every layer in %; None where there is no one share.
        data_remark: why the images are not those of published figures, "" where they are.
        remark: why the accuracy must not be set beside published ones, "" where it may.
        method: how filters go, with a teacher or without.
        asked: the share that was to go, in words, "" for none.
        name: method and rate, and in what the recipe differs from that of its name.
        is_usual: it differs in nothing.
        key: what runs share that differ by their seed only.
        command: what makes it with today's recipes.
    """

    def __init__(self, folder: Path, results: dict):
        self.folder, self.results = folder, results
        self.dataset, self.arch, recipe = (results[name] for name in ("dataset", "arch", "recipe"))
        usual = recipe_settings(recipe, self.dataset)
        self.settings = settings = {**usual, **results["settings"]}
        self.epochs, self.seed = results["epochs_run_here"], results["seed"]
        self.accuracy = results["last_epoch_accuracy"]
        self.images = results["train_images"], results["test_images"]
        self.test_set, self.hits = None, None
        if results.get("test_hits"):
            self.test_set, self.hits = unpack_hits(results["test_hits"], self.images[1])
            if abs(self.hits.mean() - self.accuracy / 100) * self.images[1] > 0.5:
                raise ValueError(f"test_hits has {100 * self.hits.mean():.2f} %, the last epoch {self.accuracy:.2f}")
        self.arithmetic = results.get("arithmetic", "float32")
        teacher = results["teacher"] if settings.get("teacher") else {}
        self.teacher = f"{teacher['arch']} of {teacher['accuracy']:.2f} %" if teacher else ""
        file = settings.get("started_from") or settings.get("use_pretrain")
        self.init = "pretrained" if file or recipe == "finetune" else "scratch"
        trained = "trained weights"
        if isinstance(file, str):
            # Checkpoints of own runs have the same names in all folders.
            trained = f"trained {'/'.join(Path(file).parts[-2 if file.endswith('.pth.tar') else -1 :])}"
        self.started_from = trained if self.init == "pretrained" else "random weights"
        self._usual = {**usual, **(recipes_of(self.dataset)[recipe].get("trained", {}) if file else {})}
        self._usual |= {"image_size": 224} if self.dataset == "imagenet" else {}
        self.is_small, self.is_gradual = bool(settings.get("widths_of")), recipe == "prune_gradual"
        rate = 100 * (results.get("prune_rate") or 0.0)
        began_cut = results.get("began_cut", False)
        self.pruned = None if self.is_small or self.is_gradual or began_cut else rate
        self.costs = run_costs(results, pruned=self.pruned, small=self.is_small)
        self.data_remark = self._data_remark()
        full = max(usual["epochs"], recipe_settings("baseline", self.dataset)["epochs"])
        full = min(full, EPOCHS_FROM_TRAINED) if self.init == "pretrained" else full
        self.remark = self.data_remark or (f"{self.epochs} epochs instead of {full}" if self.epochs < full else "")
        cut = f" {100 * settings['macs_cut']:g} % of multiply-adds" if settings.get("macs_cut") else ""
        small_of = [f"of {results.get('widths_from') or 'unknown'}"] if self.is_small else []
        self.method, special = self._method(), self._special()
        full_name = self.method + ("+KD" if self.teacher else "") + (", fine-tuned" if recipe == "finetune" else "")
        self.asked = cut or (f" {rate:g} %" if rate else "")
        self.asked += " of a cut network" if began_cut and self.asked else ""
        full_name += self.asked
        self.name, self.is_usual = ", ".join([full_name, *small_of, *special]), not special
        own = [self.dataset, recipe, self.arch, teacher.get("arch"), teacher.get("sha256"), small_of, self.epochs]
        own += [self.costs.left] if began_cut else []
        own += [self.test_set] if self.dataset == "folder" else []
        self.key = json.dumps(
            [identity(settings), own, self.started_from, self.images, self.arithmetic], sort_keys=True
        )
        self.speed_up, self.machine, self.command = self._speed_up(), self._machine(), self._command()

    def _data_remark(self) -> str:
        if self.results["synthetic_data"]:
            return "SYNTHETIC DATA"
        sizes = FULL_SIZES.get(self.dataset)
        other = "{} training, {} test images".format(*self.images) if sizes else "own data"
        return "" if self.images == sizes else other

    def _method(self) -> str:
        """AHSG-HT without its heavy ball (v = 0) is the paper's HSG-HT."""
        if self.is_small:
            name = "small network from scratch"
        elif self.is_gradual:
            name = "gradual" if self.settings["prune_end"] else "one-shot"
        elif self.results.get("prune_rate"):
            name = "AHSG-HT" if self.settings["v"] else "HSG-HT"
        elif self.pruned is None:
            name = "cut network"
        else:
            name = "heavy ball, unpruned" if self.settings["v"] else "unpruned" if self.teacher else "baseline"
        return name

    def _special(self) -> list[str]:
        """In what the run differs from the usual settings of its recipe, in words."""
        settings, usual, baseline = self.settings, self._usual, recipe_settings("baseline", self.dataset)
        for recipe in (usual, baseline):
            # A shortened run follows the milestones of its own recipe or, in a table of several, the baseline's.
            fitted = fit_schedule(recipe["schedule"], settings["epochs"], recipe["epochs"])
            if (settings["schedule"], settings["gammas"]) == (fitted, recipe["gammas"]):
                usual = {**usual, "schedule": fitted, "gammas": recipe["gammas"]}
        special = {n: v for n, v in identity(settings).items() if not ALL[n].column and v != usual.get(n)}
        words = [phrase(name, value) for name, value in special.items()]
        return list(filter(None, words)) + ([] if self.arithmetic == "float32" else [self.arithmetic])

    def _command(self) -> str:
        """The command line that makes the run with today's recipes, however it was started and continued."""
        s = self.settings
        names = [n for n, o in ALL.items() if o.same_run and CONCERNED[o.only](s)]
        changed = {n: s[n] for n in [*names, "epochs"] if s[n] != self._usual[n] and (s[n] or ALL[n].type)}
        for name in ("teacher_sha256", *(["HTrate"] if s.get("macs_cut") else [])):
            changed.pop(name, None)
        named = {n: s[n] for n in ("arch", "arch_small", "teacher") if s.get(n)}
        named |= {"no_amp": True} if s["amp"] is False and not s["tf32"] else {}
        named |= {} if self.dataset in ("cifar10", "imagenet") else {"dataset": self.dataset}
        given = {"data_path": "DATA", "recipe": s["recipe"], **named, **changed}
        given |= {"resume": s["started_from"]} if s.get("started_from") else {}
        script = f"{'imagenet' if self.dataset == 'imagenet' else 'cifar10'}_resnet_test.py"
        launcher = self.results.get("command", "").partition(script)[0] or "python "
        return f"{launcher}{script} {shlex.join(command_words(given))}"

    def _speed_up(self) -> str:
        """Speed of the small network over the unpruned one, by mini-batch, from the latency files beside."""
        rows = []
        for file in self.folder.glob("latency.*.json"):
            try:
                timings = json.loads(file.read_text(encoding="utf-8"))["timings"]
                rows += [(str(row["device"]), int(row["batch_size"]), float(row["speed_up"])) for row in timings]
            except (OSError, ValueError, LookupError, TypeError):
                return f"'{file.name}' is damaged"
        rows.sort()
        texts = []
        for device, timings in groupby(rows, lambda row: row[0]):
            _, batches, times = zip(*timings, strict=True)
            texts.append(f"{' / '.join(f'{t:.2f}' for t in times)} (batch {' / '.join(map(str, batches))}, {device})")
        return ", ".join(texts)

    def _machine(self) -> str:
        """Where the run was made; of several pieces results.json knows the last one's machine."""
        machine, pieces = self.results.get("machine", {}), self.results.get("pieces", 1)
        where = machine.get("gpu") or f"{machine.get('threads', '?')} of {machine.get('cpu_cores', '?')} CPU cores"
        return f"in {pieces} pieces, the last on {where}" if pieces > 1 else where


class SeedGroup:
    """Runs that differ by their seed only.

    Attributes:
        runs: ascending by seed; first: its first run, which stands for what they share.
        last, mean, half_width: {seed: last epoch's accuracy in %}, their mean, half its 95 % interval (None: one seed).
        test_set, hits: the test images' fingerprint, and the share of the runs that were right on each; None where
            not all runs know.
        title: what groups share whose accuracies may be compared with each other.
        is_comparable: may stand beside published rows.
    """

    def __init__(self, runs: list[Run]):
        self.runs = sorted(runs, key=lambda run: run.seed)
        run = self.first = self.runs[0]
        self.last = {run.seed: run.accuracy for run in self.runs}
        self.mean = sum(self.last.values()) / len(self.runs)
        same = len({run.test_set for run in self.runs}) == 1
        self.test_set = run.test_set if same else None
        self.hits = sum(r.hits for r in self.runs) / len(self.runs) if self.test_set else None
        self.half_width = half_width(list(self.last.values()), run.images[1])
        remark = f", {run.data_remark}" if run.data_remark else ""
        self.title = f"{run.arch} on {run.dataset}, {run.epochs} epochs from {run.started_from}{remark}"
        self.is_comparable = not run.remark and not run.is_small

    def accuracy(self) -> str:
        """Mean of the last epochs, with its interval where there are several seeds; in brackets of the best epochs."""
        best = sum(run.results["best_epoch_accuracy"] for run in self.runs) / len(self.runs)
        return f"{self.mean:.2f}{f' ± {self.half_width:.2f}' if len(self.runs) > 1 else ''} ({best:.2f})"


def show_path(path: Path) -> str:
    """A path relative to the project where it is inside, else as it is."""
    absolute = path.resolve()
    return absolute.relative_to(ROOT).as_posix() if absolute.is_relative_to(ROOT) else path.as_posix()


def read_run(file: Path) -> Run:
    """One results.json, checked.

    Raises:
        UserError: it cannot be used.
    """
    try:
        run = Run(file.parent, json.loads(file.read_text(encoding="utf-8")))
        if not (0 <= run.accuracy <= 100 and run.results["finished"] in (True, False) and SeedGroup([run]).accuracy()):
            raise ValueError(f"accuracy {run.accuracy} %, finished {run.results['finished']}")
        if not (run.results["seconds"] >= 0 and run.seed == int(run.seed) and min(run.images) > 0):
            raise ValueError(f"{run.results['seconds']} s, seed {run.seed}, {run.images} images")
    except Exception as error:  # a damaged file may hold anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise UserError(f"{show_path(file.parent)} is damaged and passed over: {reason}") from None
    return run


def find_runs(folders: Iterable[Path]) -> tuple[list[SeedGroup], list[str]]:
    """Groups of the finished runs under some folders; and a note per results.json that is not among them."""
    members: dict[str, list[Run]] = {}
    notes = []
    for file in sorted({file.resolve() for folder in folders for file in folder.rglob("results.json")}):
        try:
            run = read_run(file)
        except UserError as error:
            notes.append(str(error))
            continue
        where, same = show_path(file.parent), members.get(run.key, [])
        if not run.results["finished"]:
            done = f"{run.results['epochs_done']} of {run.settings['epochs']} epochs"
            notes.append(f"{where}: {run.arch} {run.name} is not finished, {done}")
        elif run.seed in [other.seed for other in same]:
            notes.append(f"{where} repeats seed {run.seed} ({run.accuracy:.2f} %), passed over")
        else:
            members[run.key] = [*same, run]

    def order(group: SeedGroup) -> tuple:
        run = group.first
        network = run.dataset, len(run.arch), run.arch
        return *network, run.pruned != 0, run.is_gradual, run.epochs, run.pruned or 0, run.name

    return sorted(map(SeedGroup, members.values()), key=order), notes


def describe_source(small_file: str) -> str | None:
    """What the small network in a file was cut out of ("AHSG-HT 30 %"), by the results.json beside it, or None."""
    try:
        return read_run(Path(small_file).with_name("results.json")).name
    except UserError:
        return None
