"""The options of the training scripts. One option is one record of OPTIONS.

The parser (utils.train.command_line), what `--resume` takes over, what makes two runs the same and how the tables tell
runs apart are derived from these records.

To add an option, add a record here and use `args.<name>`. Recipes (utils.train.recipes) give numbers to options whose
default is RECIPE.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from AHSG_HT import NORMS
from data import DATASETS
from utils.base.arguments import (
    COUNT,
    IMAGE_SIZE,
    KEPT_RATE,
    NOT_NEGATIVE,
    POSITIVE,
    PRUNED_RATE,
    SEED,
    SHARE,
    WHOLE,
    number,
    path_name,
    switch,
)
from utils.base.errors import UserError
from utils.prune.gradual import ALLOCATIONS
from utils.prune.scores import SCORES
from utils.train.distributed import DIST_TIMEOUT
from utils.train.losses import LOSSES, parse_term
from utils.train.recipes import recipes_of

# Default of an option whose number is the recipe's.
RECIPE = "recipe"


def k_number(text: str) -> float | int | None:
    """--k: none, a step size, or a cap; its range depends on the batch size and is checked with it."""
    if text.lower() == "none":
        return None
    value = number(float, lambda x: True, "a number or none")(text)
    return int(value) if value == math.floor(value) else value


def score_name(text: str) -> int | str:
    """An argparse type: a key of NORMS."""
    return int(text) if text.isdigit() else text


def kd_term(text: str) -> str:
    """An argparse type: a distillation term in its canonical form; see utils.train.losses."""
    try:
        return str(parse_term(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--kd ")) from None


@dataclass(frozen=True)
class Option:
    """One option of the training scripts.

    Attributes:
        name: `--name` on the command line, `args.name`, and its name in checkpoints and results.json.
        help: its text in --help.
        type: argparse type of one value; None for a flag without a value.
        default: where neither command line nor checkpoint gives it; RECIPE for the recipe's number.
        flags: further spellings.
        settings: further arguments of argparse (choices, metavar, nargs, const).
        same_run: runs that differ in it are different runs: `--resume` takes it over and reports a change, `--resume
            auto` passes over runs with another value.
        batches: it decides which images make a mini-batch, so a position within an epoch is lost with a change.
        network: it describes network or images: a new run that starts from a checkpoint takes it over too.
        recipe: results that differ in it are not seeds of one recipe.
        phrases: its values in the words of the tables; other values read "name value".
        column: it has a column of its own in the tables, or is part of a method's name.
        tag: its part in the name of a run's folder, "" where the name leaves it out.
        only: the runs that it is for, a key of CONCERNED.
        instead: what it is one of several ways to give. They exclude each other, and one that is given keeps `--resume`
            from taking over another.
        idle: whether it has no effect beside the other settings.
        scripts: "cifar", "imagenet", or "" for both.
    """

    name: str
    help: str
    type: Callable | None = None
    default: object = None
    flags: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)
    same_run: bool = False
    batches: bool = False
    network: bool = False
    recipe: bool = False
    phrases: dict = field(default_factory=dict)
    column: bool = False
    tag: Callable[[object], str] = lambda value: ""
    only: str = ""
    instead: str = ""
    idle: Callable[[dict], bool] = lambda settings: False
    scripts: str = ""


def _recipe_option(name: str, *args, **more) -> Option:
    """An option that is part of what a result is: of the run and of its recipe."""
    return Option(name, *args, same_run=True, recipe=True, **more)


# Option.only: whether a run with these settings is one of them.
CONCERNED: dict[str, Callable[[dict], bool]] = {
    "": lambda s: True,
    "pruned": lambda s: s["HTrate"] < 1 and s["recipe"] != "prune_gradual",
    "gradual": lambda s: s["recipe"] == "prune_gradual",
    "taught": lambda s: bool(s["teacher"]),
}


OPTIONS: dict[str, list[Option]] = {
    "data and network": [
        Option("dataset", "data set; folder: an image tree of your own (cifar10)", str, "cifar10",
               settings=dict(choices=DATASETS), same_run=True, batches=True, network=True, scripts="cifar"),
        Option("image_size", "height and width that images are scaled to (folder: 32; ImageNet: 224)", IMAGE_SIZE,
               settings=dict(metavar="PIXELS"), same_run=True, network=True, recipe=True),
        Option("use_pretrain", "start from the weights in FILE, or without FILE from torchvision's, downloaded",
               path_name, settings=dict(nargs="?", const="torchvision", metavar="FILE"), same_run=True,
               scripts="imagenet"),
        Option("on_bad_image", "what an image file that cannot be read does (skip)", str, "skip",
               settings=dict(choices=("skip", "stop")), scripts="imagenet"),
    ],
    "recipe and training": [
        Option("epochs", "passes over the data", COUNT, RECIPE, recipe=True, column=True),
        _recipe_option("batch_size", "images in the first mini-batch, over all processes", COUNT, RECIPE, flags=("-b",),
                       batches=True),
        _recipe_option("learning_rate", "learning rate of epoch 0; for cosine the highest", POSITIVE, RECIPE,
                       flags=("--lr",)),
        _recipe_option("momentum", "momentum of SGD", NOT_NEGATIVE, RECIPE),
        _recipe_option("nesterov", "Nesterov's momentum", switch, RECIPE, settings=dict(metavar="on|off")),
        _recipe_option("decay", "weight decay", NOT_NEGATIVE, RECIPE, flags=("--weight_decay", "--wd")),
        _recipe_option("lr_schedule", "steps: --schedule and --gammas; cosine: from --learning_rate to 0", str, RECIPE,
                       settings=dict(choices=("steps", "cosine"))),
        _recipe_option("warmup", "epochs in which the learning rate of cosine rises from 0", NOT_NEGATIVE, RECIPE,
                       settings=dict(metavar="EPOCHS"), idle=lambda s: s["lr_schedule"] == "steps"),
        _recipe_option("schedule", "epochs at which the learning rate changes", WHOLE, RECIPE, instead="schedule",
                       settings=dict(nargs="+", metavar="EPOCH"), idle=lambda s: s["lr_schedule"] == "cosine"),
        _recipe_option("gammas", "factors at these epochs", POSITIVE, RECIPE, settings=dict(nargs="+", metavar="G"),
                       idle=lambda s: s["lr_schedule"] == "cosine"),
        Option("fit_schedule", "scale the recipe's milestones to --epochs", default=False, instead="schedule"),
    ],
    "pruning": [
        _recipe_option("HTrate", "share of filters KEPT in every convolution", KEPT_RATE, RECIPE, network=True,
                       column=True, tag=lambda rate: f"-HT{rate:g}" if rate < 1 else "", instead="rate"),
        Option("prune_rate", "share of filters REMOVED: 0.3 is --HTrate 0.7", PRUNED_RATE, instead="rate"),
        _recipe_option("k", "growing mini-batch: step size in (0, 1), cap >= batch size, or none", k_number, RECIPE,
                       batches=True, phrases={None: "fixed mini-batch"}),
        _recipe_option("growth", "growth for a step size (linear)", str, "linear",
                       settings=dict(choices=("linear", "exponential")), batches=True,
                       idle=lambda s: s["k"] is None or s["k"] >= 1),
        _recipe_option("max_batch_size", "bound for a step size (2 x batch size)", COUNT, batches=True,
                       idle=lambda s: s["k"] is None or s["k"] >= 1),
        _recipe_option("no_restart", "continue the growth over epochs, as in the paper", default=False, batches=True,
                       phrases={True: "growth continues over epochs"}, idle=lambda s: s["k"] is None),
        _recipe_option("v", "weight of the heavy ball", NOT_NEGATIVE, RECIPE, phrases={0: "no heavy ball"}),
        _recipe_option("heavy_ball", "true heavy ball, or the release's, which is zero (paper)", str, "paper",
                       settings=dict(choices=("paper", "released")), phrases={"released": "heavy ball released"},
                       idle=lambda s: not s["v"]),
        _recipe_option("norm", "what ranks filters, a key of NORMS in AHSG-HT.py: their l2 or l1 norm (2)", score_name,
                       2, settings=dict(choices=NORMS), network=True, only="pruned"),
        _recipe_option("no_regrow", "a removed filter stays removed (in the paper it may come back)", default=False,
                       phrases={True: "no regrowth"}, only="pruned"),
        _recipe_option("threshold_every", "when filters are thresholded (step)", str, "step",
                       settings=dict(choices=("step", "epoch")), phrases={"epoch": "threshold per epoch"},
                       only="pruned"),
        Option("widths_of", "a new network as narrow as this small network's file: the small network from scratch",
               path_name, settings=dict(metavar="FILE"), same_run=True, scripts="cifar",
               tag=lambda file: "-small" if file else ""),
    ],
    "gradual pruning (--recipe prune_gradual)": [
        _recipe_option("macs_cut", "share of the multiply-adds to remove at least, instead of a rate of filters",
                       number(float, lambda x: 0 < x < 1, "a share of the multiply-adds in (0, 1)"), only="gradual",
                       column=True, tag=lambda cut: f"-cut{cut:g}" if cut else "", instead="rate"),
        _recipe_option("prune_begin", "share of the steps before the first removal", SHARE, RECIPE,
                       only="gradual", idle=lambda s: not s["prune_end"]),
        _recipe_option("prune_end", "share of the steps after which nothing more is removed", SHARE, RECIPE,
                       phrases={0: ""}, only="gradual"),
        _recipe_option("prune_score", "score of a filter: its norm, |gamma| of its BatchNorm, or Taylor (norm)", str,
                       "norm", settings=dict(choices=SCORES), only="gradual"),
        _recipe_option("tied", "remove channels that are added together, together (on)", switch, True,
                       settings=dict(metavar="on|off"), phrases={False: "untied"}, only="gradual"),
        _recipe_option("allocation", "the same rate in all layers, or chosen over the whole network (uniform)", str,
                       "uniform", settings=dict(choices=ALLOCATIONS), only="gradual"),
        _recipe_option("round_to", "make widths multiples of N, the nearest ones (1)", COUNT, 1,
                       settings=dict(metavar="N"), only="gradual"),
        Option("shrink", "cut removed filters out of the network while it trains (on)", switch, True, same_run=True,
               settings=dict(metavar="on|off"), only="gradual"),
    ],
    "distillation": [
        Option("arch_small", "the student; --arch is then the teacher, as in the release", str,
               settings=dict(metavar="ARCH")),
        Option("teacher", "checkpoint of the trained teacher", path_name, settings=dict(metavar="FILE")),
        Option("teacher_cache", "file that keeps the teacher's logits and features: a second run that trains on the "
               "same mini-batches reads them; logits of 10 classes for 50,000 images are 2 MB an epoch", path_name,
               settings=dict(metavar="FILE"), only="taught"),
        _recipe_option("kd", "what is compared, by which loss, how weighted: ON:LOSS[:WEIGHT[:NAME=VALUE,...]] with ON "
                       f"feature, stages or logits and LOSS {', '.join(LOSSES)}",
                       kd_term, RECIPE, settings=dict(nargs="+", action="extend", metavar="TERM"), only="taught",
                       instead="loss"),
        Option("loss", "the release's flag: --loss X is --kd feature:X, for losses between logits logits:X", str,
               settings=dict(choices=LOSSES), instead="loss"),
        _recipe_option("ce_weight", "weight of the cross-entropy beside the terms", NOT_NEGATIVE, RECIPE,
                       only="taught"),
        _recipe_option("head_width", "two-layer head of this width for a CIFAR ResNet (released checkpoint: 20)", COUNT,
                       network=True, scripts="cifar"),
    ],
    "speed": [
        Option("amp", "bfloat16 autocast (default: on GPUs whose hardware has it)", same_run=True, instead="precision"),
        Option("no_amp", "float32 throughout, on a GPU without TF32", default=False, instead="precision"),
        Option("tf32", "TF32 in convolutions and matrix products of a GPU, outside evaluation", default=False,
               same_run=True, instead="precision"),
        Option("compile", "compile the network first: a minute, then faster steps", default=False, same_run=True),
        Option("deterministic", "the same bits in every run on a GPU, slower (a CPU always does)", default=False,
               same_run=True),
    ],
    "several processes (torchrun), memory": [
        _recipe_option("max_images_per_step", "images that a process takes through the network at once; the gradients "
                       "of a larger share are accumulated (no bound)", COUNT, settings=dict(metavar="N")),
        _recipe_option("sync_bn", "BatchNorm statistics over all processes (GPUs; default: over each one's share)",
                       default=False),
        Option("dist_timeout", "seconds after which a silent process is given up (600)", POSITIVE, DIST_TIMEOUT,
               settings=dict(metavar="S")),
    ],
    "run": [
        Option("save_path", "folder for log, checkpoints and results (runs/<recipe>-<dataset>-<network>-...)",
               path_name, flags=("--save_dir",)),
        Option("resume", "checkpoint to continue, or to start from (finetune, prune_gradual, evaluate); auto: the one "
               "in --save_path or, without it, of the same run in runs/, if any", path_name,
               settings=dict(metavar="FILE")),
        Option("save_every", "mini-batches between two checkpoints within an epoch (none: at its end)", COUNT,
               settings=dict(metavar="N")),
        Option("evaluate", "only test the network of --resume", default=False, flags=("-e",)),
        Option("recalibrate", "with --evaluate: recompute BatchNorm's statistics over N training mini-batches",
               COUNT, settings=dict(metavar="N")),
        Option("manualSeed", "seed of everything random (1)", SEED, 1, flags=("--seed",), same_run=True, batches=True,
               tag=lambda seed: f"-seed{seed}"),
        Option("workers", "processes that make mini-batches (0: this one; ImageNet: the cores)", WHOLE, None,
               flags=("-j",)),
        Option("prefetch_factor", "mini-batches that each worker makes in advance (2)", COUNT, 2,
               settings=dict(metavar="N")),
        Option("print_freq", "mini-batches between log lines (200)", COUNT, 200, flags=("--print_frequency", "-p")),
        Option("ngpu", "0: CPU; 1: one GPU per process (default: a GPU where there is one)", WHOLE),
        Option("use_state_dict", "accepted for the release's command lines; always so here", default=False),
    ],
}  # fmt: skip
# Options that each script describes in its own words. A teacher is identified by its content (teacher_sha256).
RECIPE_OPTION = Option(
    "recipe", "defaults of the options below (prune; with a teacher prune_distill)", str, None, same_run=True
)
ALL: dict[str, Option] = {
    option.name: option
    for options in ([RECIPE_OPTION, Option("teacher_sha256", "", same_run=True)], *OPTIONS.values())
    for option in options
}


def alternatives(name: str) -> list[str]:
    """The options that say in other ways what this one says, itself included; [] where there are no others."""
    what = ALL[name].instead if name in ALL else ""
    return [other for other, option in ALL.items() if what and option.instead == what]


def recipe_settings(recipe: str, dataset: str) -> dict:
    """The value of every option where a command line gives nothing but --recipe."""
    numbers = recipes_of(dataset).get(recipe, {})
    values = {name: numbers.get(name) if o.default is RECIPE else o.default for name, o in ALL.items()}
    return {**values, "recipe": recipe, "dataset": dataset}


def identity(settings: dict) -> dict:
    """The options that make a recipe, with their values, less those that have no effect beside the others.

    Args:
        settings: of a run; options that are missing get the recipe's value.
    """
    known = {**recipe_settings(settings["recipe"], settings["dataset"]), **settings}
    works = [o for o in ALL.values() if o.recipe and CONCERNED[o.only](known) and not o.idle(known)]
    return {option.name: known[option.name] for option in works}


def phrase(name: str, value) -> str:
    """An option's value in words, for tables: "no regrowth", "decay 0.001"."""
    option = ALL.get(name)
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    known = option.phrases.items() if option else ()
    return next((words for key, words in known if key == value), f"{name} {text}")


def value_words(value: object) -> list[str]:
    """A value as the command line takes it."""
    texts = {True: "on", False: "off", None: "none"}
    values = value if isinstance(value, list) else [value]
    return [texts[v] if v is None or isinstance(v, bool) else str(v) for v in values]


def command_words(options: dict) -> list[str]:
    """The command line of a training script that gives these options; data_path comes first."""
    words = [str(options["data_path"])] if "data_path" in options else []
    for name, value in options.items():
        is_flag = name in ALL and ALL[name].type is None
        words += [f"--{name}", *([] if is_flag else value_words(value))] if name != "data_path" else []
    return words
