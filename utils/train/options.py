"""The command line of the training scripts: flags, their checks, and the settings that come of flags and recipe."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence

from utils.base.errors import UserError
from utils.train.distillation import KD_ON, LOSSES
from utils.train.recipes import RECIPES, fit_schedule

# Options a recipe fills in where the command line is silent.
RECIPE_KEYS = (
    "epochs",
    "learning_rate",
    "momentum",
    "nesterov",
    "decay",
    "schedule",
    "gammas",
    "batch_size",
    "k",
    "HTrate",
    "v",
)


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaint is one line, and which takes long options with hyphens or underscores."""

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        return super().parse_args(self.canonical(sys.argv[1:] if args is None else args), namespace)

    def parse_given(self, args: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
        """The options, and the names of those that the command line gives."""
        missing = object()
        names = [action.dest for action in self._actions if action.dest != "help"]
        # argparse sets an optional positional to its default where it is not given, whatever the namespace holds.
        defaults = {action: action.default for action in self._actions if not action.option_strings}
        for action in defaults:
            action.default = missing
        try:
            marked = self.parse_args(args, argparse.Namespace(**dict.fromkeys(names, missing)))
        finally:
            for action, default in defaults.items():
                action.default = default
        given = {name for name in names if getattr(marked, name) is not missing}
        return self.parse_args(args), given

    def canonical(self, args: Sequence[str]) -> list[str]:
        """A command line with every option under its first long name, `-b 8` and `--batch-size 8` as `--batch_size 8`."""
        return [self._canonical(argument) for argument in args]

    def _canonical(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = f"--{name[2:].replace('-', '_')}"
        action = self._option_string_actions.get(name)
        if action is None or action.dest == "help":
            return argument if not argument.startswith("--") else f"{name}{equals}{value}"
        return f"--{action.dest}{equals}{value}"


def path_name(text: str) -> str:
    """An argparse type: a path; an empty one is a shell variable that was not set."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return text


def number(kind: Callable, accept: Callable[[float], bool], meaning: str):
    """An argparse type: a finite number of `kind` that `accept` takes; `meaning` says which in the complaint."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not accept(value):
            raise argparse.ArgumentTypeError(f"must be {meaning}, got '{text}'")
        return value

    return parse


def k_number(text: str) -> float | int | str:
    """--k: "none", a step size, or a cap; its range depends on the batch size and is checked with it."""
    if text.lower() == "none":
        return "none"
    value = number(float, lambda x: True, "a number or none")(text)
    return int(value) if value == math.floor(value) else value


count = number(int, lambda n: n >= 1, "a whole number >= 1")
whole = number(int, lambda n: n >= 0, "a whole number >= 0")
seed_number = number(int, lambda n: 0 <= n < 2**32, "a whole number in 0..2^32-1")
positive = number(float, lambda x: x > 0, "a number > 0")
not_negative = number(float, lambda x: x >= 0, "a number >= 0")
kept_rate = number(float, lambda x: 0 < x <= 1, "the share of filters KEPT, in (0, 1]")
pruned_rate = number(float, lambda x: 0 <= x < 1, "the share of filters REMOVED, in [0, 1)")


def switch(text: str) -> bool:
    """An argparse type: on or off."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"must be on or off, got '{text}'")
    return text == "on"


def add_training_options(parser: argparse.ArgumentParser, recipes: dict[str, dict] = RECIPES) -> None:
    """Adds what every training script takes, in titled groups; the help names the recipes' numbers."""
    plain, prune = recipes["baseline"], recipes["prune"]
    group = parser.add_argument_group("recipe and training")
    group.add_argument(
        "--recipe", choices=recipes, help="numbers for everything below that is not given (default: prune)"
    )
    group.add_argument("--epochs", type=count, help=f"passes over the data (recipe: {plain['epochs']})")
    group.add_argument(
        "--batch_size",
        "-b",
        type=count,
        help=f"images in the first mini-batch, over all processes ({plain['batch_size']}, pruning {prune['batch_size']})",
    )
    group.add_argument(
        "--learning_rate",
        "--lr",
        type=positive,
        help=f"learning rate of epoch 0 ({plain['learning_rate']:g}, finetune {recipes['finetune']['learning_rate']:g})",
    )
    group.add_argument("--momentum", type=not_negative, help=f"momentum of SGD ({plain['momentum']:g})")
    group.add_argument(
        "--nesterov",
        type=switch,
        metavar="on|off",
        help=f"Nesterov's momentum ({'on' if plain['nesterov'] else 'off'})",
    )
    group.add_argument(
        "--decay", "--weight_decay", "--wd", type=not_negative, help=f"weight decay ({plain['decay']:g})"
    )
    group.add_argument(
        "--schedule",
        type=whole,
        nargs="+",
        metavar="EPOCH",
        help=f"epochs at which the learning rate changes ({' '.join(map(str, plain['schedule']))})",
    )
    group.add_argument(
        "--gammas",
        type=positive,
        nargs="+",
        metavar="G",
        help=f"factors at these epochs ({' '.join(f'{gamma:g}' for gamma in plain['gammas'])})",
    )
    group.add_argument("--fit_schedule", action="store_true", help="scale the recipe's milestones to --epochs")

    group = parser.add_argument_group("pruning")
    rates = group.add_mutually_exclusive_group()
    rates.add_argument("--HTrate", type=kept_rate, help="share of filters KEPT in every convolution (0.7)")
    rates.add_argument("--prune_rate", type=pruned_rate, help="share of filters REMOVED: 0.3 is --HTrate 0.7")
    group.add_argument(
        "--k",
        type=k_number,
        help=f"growing mini-batch: step size in (0, 1), cap >= batch size, or none (pruning: {prune['k'] or 'none'})",
    )
    group.add_argument(
        "--growth", choices=("linear", "exponential"), default="linear", help="growth for a step size (linear)"
    )
    group.add_argument("--max_batch_size", type=count, help="bound for a step size (2 x batch size)")
    group.add_argument("--no_restart", action="store_true", help="continue the growth over epochs, as in the paper")
    group.add_argument("--v", type=not_negative, help="weight of the heavy ball (0.1)")
    group.add_argument(
        "--heavy_ball",
        choices=("paper", "released"),
        default="paper",
        help="true heavy ball, or the release's, which is zero",
    )
    group.add_argument("--norm", type=int, choices=(2, 1), default=2, help="norm that ranks filters (2)")
    group.add_argument(
        "--no_regrow", action="store_true", help="a removed filter stays removed (as in the paper, it may come back)"
    )
    group.add_argument(
        "--threshold_every", choices=("step", "epoch"), default="step", help="when filters are thresholded (step)"
    )
    group.add_argument(
        "--widths_of",
        type=path_name,
        metavar="FILE",
        help="a new network as narrow as this small network's file: the small network trained from scratch",
    )

    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--arch_small", metavar="ARCH", help="the student; --arch is then the teacher, as in the release"
    )
    group.add_argument("--teacher", type=path_name, metavar="FILE", help="checkpoint of the trained teacher")
    group.add_argument("--loss", choices=LOSSES, help="distance between student and teacher (MSE; KL on logits)")
    group.add_argument("--kd_on", choices=KD_ON, help="what is compared (feature: penultimate features; for KL logits)")
    group.add_argument("--kd_weight", type=not_negative, default=1.0, help="weight of the distance (1)")
    group.add_argument("--kd_T", type=positive, default=4.0, help="temperature of KL (4)")
    group.add_argument("--share_classifier", action="store_true", help="start from the teacher's last layer")
    group.add_argument(
        "--head_width", type=count, help="two-layer head of this width for a CIFAR ResNet (released checkpoint: 20)"
    )

    group = parser.add_argument_group("speed")
    formats = group.add_mutually_exclusive_group()
    formats.add_argument(
        "--amp", action="store_true", default=None, help="bfloat16 autocast (default: on GPUs whose hardware has it)"
    )
    formats.add_argument("--no_amp", dest="amp", action="store_false", help="float32 throughout")
    group.add_argument("--compile", action="store_true", help="compile the network first: a minute, then faster steps")
    group.add_argument(
        "--deterministic", action="store_true", help="the same bits in every run on a GPU, slower (a CPU always does)"
    )

    group = parser.add_argument_group("several processes (torchrun), memory")
    group.add_argument(
        "--max_images_per_step",
        type=count,
        metavar="N",
        help="images that a process takes through the network at once; larger shares of a mini-batch are added up (no bound)",
    )
    group.add_argument(
        "--sync_bn",
        action="store_true",
        help="BatchNorm statistics over all processes (GPUs; default: over each process's share)",
    )
    group.add_argument(
        "--dist_timeout", type=positive, default=600, metavar="S", help="give a silent process up after S seconds (600)"
    )

    group = parser.add_argument_group("run")
    group.add_argument(
        "--save_path",
        "--save_dir",
        type=path_name,
        help="folder for log, checkpoints and results (runs/<recipe>-<dataset>-<network>-...)",
    )
    group.add_argument(
        "--resume",
        type=path_name,
        metavar="FILE",
        help="checkpoint to continue, or to start from (finetune, evaluate); auto: the one in --save_path, if any",
    )
    group.add_argument(
        "--save_every",
        type=count,
        metavar="N",
        help="mini-batches between two checkpoints within an epoch (none: at the end of every epoch)",
    )
    group.add_argument("--evaluate", "-e", action="store_true", help="only test the network of --resume")
    group.add_argument(
        "--recalibrate",
        type=count,
        metavar="N",
        help="with --evaluate: take BatchNorm's statistics anew, over N mini-batches of training images",
    )
    group.add_argument("--manualSeed", "--seed", type=seed_number, default=1, help="seed of everything random (1)")
    group.add_argument("--workers", "-j", type=whole, default=0, help="processes that make mini-batches (0: this one)")
    group.add_argument(
        "--prefetch_factor",
        type=count,
        default=2,
        metavar="N",
        help="mini-batches that each worker makes in advance (2)",
    )
    group.add_argument(
        "--print_freq", "--print_frequency", "-p", type=count, default=200, help="mini-batches between log lines (200)"
    )
    group.add_argument("--ngpu", type=whole, help="0: CPU; 1: one GPU per process (default: a GPU where there is one)")
    group.add_argument(
        "--use_state_dict", action="store_true", help="taken for the release's command lines; always so here"
    )


def is_setting(name: str, value) -> bool:
    """Whether a value from a checkpoint's settings is one that the command line could have given."""
    parser = OneLineParser()
    add_training_options(parser)
    action = next((action for action in parser._actions if action.dest == name), None)
    if action is None:
        # An option of one script alone (data path, data set): the script looks at it.
        return value is None or type(value) in (str, int, bool)
    if action.nargs == 0 or action.type is switch:
        return isinstance(value, bool) or value is action.default is None
    if value is None:
        return True
    if isinstance(value, list) != (action.nargs == "+"):
        return False
    try:
        for entry in value if isinstance(value, list) else [value]:
            if parser._get_value(action, str(entry)) != entry:
                return False
            parser._check_value(action, entry)
    except argparse.ArgumentError:
        return False
    return True


def resolve_recipe(args: argparse.Namespace, given: set[str], recipes: dict[str, dict] = RECIPES) -> argparse.Namespace:
    """Fills in the recipe's numbers, makes HTrate and prune_rate agree, and checks what single flags cannot.

    Args:
        args: options of a command line, completed here.
        given: names of those it gives.
        recipes: numbers for what they leave open.

    Raises:
        UserError: flags that contradict each other.
    """
    if args.prune_rate is not None:
        # Rounded, as 1 - 0.9 is 0.09999999999999998.
        args.HTrate = round(1 - args.prune_rate, 12)
    if args.recipe is None:
        args.recipe = (
            "prune" if not args.arch_small and not args.teacher else "distill" if args.HTrate == 1 else "prune_distill"
        )
    recipe = recipes[args.recipe]
    if args.recipe in ("baseline", "distill") and args.HTrate not in (None, 1):
        instead = "prune" if args.recipe == "baseline" else "prune_distill"
        raise UserError(f"recipe {args.recipe} keeps every filter, got HTrate={args.HTrate:g}; use --recipe {instead}")
    if args.recipe in ("baseline", "distill") and args.v:
        raise UserError(f"recipe {args.recipe} is plain SGD, got --v {args.v:g}; leave it out")
    if args.teacher and args.recipe in ("baseline", "prune"):
        instead = "distill" if args.recipe == "baseline" else "prune_distill"
        raise UserError(f"recipe {args.recipe} has no teacher; use --recipe {instead}, or leave --teacher out")
    idle = sorted(given & {"kd_on", "kd_weight", "kd_T", "share_classifier"})
    if idle and not args.teacher:
        raise UserError(f"--{idle[0]} needs a teacher; add --teacher FILE")
    if args.heavy_ball == "released" and args.threshold_every == "epoch":
        raise UserError(
            "--heavy_ball released thresholds at every step, as the release; leave out --threshold_every epoch"
        )
    args.kd_on = args.kd_on or ("logits" if args.loss == "KL" else "feature")
    args.loss = args.loss or "MSE"
    if args.loss == "KL" and args.kd_on != "logits":
        raise UserError(
            f"--loss KL compares logits, got --kd_on {args.kd_on}; use --kd_on logits, or --loss MSE, L1 or SmoothL1"
        )
    if args.fit_schedule and args.schedule is not None:
        raise UserError("--fit_schedule scales the recipe's milestones; give it or --schedule, not both")
    if args.fit_schedule:
        args.schedule = fit_schedule(recipe["schedule"], args.epochs or recipe["epochs"], recipe["epochs"])
    for key in RECIPE_KEYS:
        if getattr(args, key) is None:
            setattr(args, key, recipe[key])
    args.k = None if args.k == "none" else args.k
    args.prune_rate = round(1 - args.HTrate, 12)
    if len(args.schedule) != len(args.gammas):
        raise UserError(
            f"--schedule has {len(args.schedule)} epochs and --gammas {len(args.gammas)} factors; give as many of each"
        )
    if sorted(args.schedule) != args.schedule:
        raise UserError(f"--schedule must ascend, got {' '.join(map(str, args.schedule))}")
    if args.recipe == "finetune" and not args.resume:
        raise UserError("recipe finetune starts from a pruned checkpoint; add --resume FILE")
    if args.widths_of and args.evaluate:
        raise UserError(
            f"--widths_of '{args.widths_of}' makes a new network, there is nothing to evaluate; leave one out"
        )
    if args.widths_of and args.HTrate < 1:
        raise UserError(
            f"--widths_of '{args.widths_of}' trains a small network as it is, HTrate {args.HTrate:g} would prune it again; add --recipe baseline"
        )
    if args.recalibrate and not args.evaluate:
        raise UserError(f"--recalibrate {args.recalibrate} is for a test alone; add --evaluate, or leave it out")
    if args.evaluate and not args.resume and not getattr(args, "use_pretrain", None):
        raise UserError("--evaluate tests a trained network; add --resume FILE")
    return args
