"""From a command line to the settings of a run: the parser, what it gives, recipes and defaults, contradictions."""

import argparse
from collections.abc import Sequence

from utils.base.arguments import OneLineParser
from utils.base.errors import UserError
from utils.prune.gradual import check_options
from utils.train.losses import LOSSES, check_terms, parse_term
from utils.train.options import (
    ALL,
    CONCERNED,
    OPTIONS,
    RECIPE,
    RECIPE_OPTION,
    Option,
    alternatives,
    kd_term,
    recipe_settings,
    value_words,
)
from utils.train.recipes import fit_schedule, recipes_of


def make_parser(script: str, description: str, arch: str, archs: str) -> OneLineParser:
    """The parser of a training script; what it parses holds the options that the command line gives, and no others.

    Args:
        script: "cifar" or "imagenet".
        arch: the default network, for the help text.
        archs: the networks there are, for the help text.
    """
    parser = OneLineParser(
        usage="%(prog)s [DATA] [options]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("data_path", nargs="?", help="folder of the images (./data); absent CIFAR is downloaded")
    recipes = recipes_of("imagenet" if script == "imagenet" else "cifar10")
    parser.add_argument("--recipe", choices=recipes, help=RECIPE_OPTION.help)
    parser.add_argument("--arch", "-a", metavar="ARCH", help=f"network ({arch}): {archs}")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option in options:
            if option.scripts in ("", script):
                _add(group, option, recipes)
    return parser


def _add(group: argparse._ArgumentGroup, option: Option, recipes: dict[str, dict]) -> None:
    help, name = option.help, option.name
    if option.default is RECIPE:
        plain, pruning, ours = (recipes[recipe] for recipe in ("baseline", "prune", "prune_gradual"))
        trained = ours["trained"]
        labelled = [("", plain, option.only != "gradual"), ("prune ", pruning, pruning[name] != plain[name])]
        labelled += [("prune_gradual ", ours, ours[name] != plain[name])]
        labelled += [("from a trained network ", trained, name in trained)]
        texts = [f"{label}{' '.join(value_words(recipe[name]))}" for label, recipe, shown in labelled if shown]
        help += f" ({', '.join(texts)})"
    kind = dict(action="store_true") if option.type is None else dict(type=option.type, **option.settings)
    group.add_argument(f"--{name}", *option.flags, help=help.replace("%", "%%"), **kind)


def parse(parser: OneLineParser, argv: Sequence[str]) -> dict:
    """The options that a command line gives.

    Raises:
        UserError: an unknown option, a bad value, or two options that exclude each other.
    """
    given = vars(parser.parse_args(argv))
    for name in given:
        both = [other for other in alternatives(name) if given.get(other, False) is not False]
        if len(both) > 1:
            raise UserError(f"--{both[0]} and --{both[1]} exclude each other; give one")
    return given


def resolve(given: dict, adopted: dict, *, family: str, arch: str) -> argparse.Namespace:
    """All settings of a run.

    Args:
        given: options of the command line; see `parse`.
        adopted: settings of the checkpoint that is resumed, as far as this run takes them over.
        family: "imagenet", or "cifar" for every data set of the CIFAR script.
        arch: the network where neither names one.

    Raises:
        UserError: options that contradict each other.
    """
    chosen = {**adopted, **given}
    if "prune_rate" in given:
        # Rounded, as 1 - 0.9 is 0.09999999999999998.
        chosen["HTrate"] = round(1 - given["prune_rate"], 12)
    if "recipe" not in chosen:
        distils = chosen.get("arch_small") or chosen.get("teacher")
        chosen["recipe"] = "prune" if not distils else "distill" if chosen.get("HTrate") == 1 else "prune_distill"
    dataset = "imagenet" if family == "imagenet" else chosen.get("dataset", "cifar10")
    defaults = recipe_settings(chosen["recipe"], dataset)
    recipe = recipes_of(dataset)[chosen["recipe"]]
    if chosen.get("resume") not in (None, "auto") or chosen.get("use_pretrain") or chosen.get("started_from"):
        defaults.update(recipe.get("trained", {}))
    if given.get("loss"):
        on = "logits" if "feature" not in LOSSES[given["loss"]].compares else "feature"
        chosen["kd"] = [kd_term(f"{on}:{given['loss']}")]
    if given.get("no_amp") or given.get("tf32"):
        chosen["amp"] = False
    if given.get("fit_schedule"):
        chosen["schedule"] = fit_schedule(recipe["schedule"], chosen.get("epochs", recipe["epochs"]), recipe["epochs"])
    if "macs_cut" in given:
        chosen["HTrate"] = 1.0
    args = argparse.Namespace(**{"data_path": None, "arch": arch, **defaults, **chosen, "dataset": dataset})
    args.prune_rate = round(1 - args.HTrate, 12)
    # The network that is trained; --arch names the teacher when there is an --arch_small.
    args.student = args.arch_small or args.arch
    _check(args, given)
    return args


def _check(args: argparse.Namespace, given: dict) -> None:
    """Raises UserError where options contradict each other."""
    gradual = args.recipe == "prune_gradual"
    only = {kind: [name for name in given if name in ALL and ALL[name].only == kind] for kind in CONCERNED}
    papers = [*only["pruned"], *(name for name in given if name == "heavy_ball")]
    plain = args.recipe in ("baseline", "distill")
    with_teacher = {"baseline": "distill", "prune": "prune_distill"}
    rate, schedule = f"HTrate={args.HTrate:g}", " ".join(map(str, args.schedule))
    widths = f"--widths_of '{args.widths_of}'"
    rules = [
        (plain and args.HTrate != 1, f"recipe {args.recipe} keeps every filter, got {rate}; use --recipe "
         f"{'prune' if args.recipe == 'baseline' else 'prune_distill'}"),
        (plain and args.v, f"recipe {args.recipe} is plain SGD, got --v {args.v:g}; leave it out"),
        (args.teacher and args.recipe in with_teacher, f"recipe {args.recipe} has no teacher; use --recipe "
         f"{with_teacher.get(args.recipe)}, or leave --teacher out"),
        (only["taught"] and not args.teacher, f"--{''.join(only['taught'][:1])} needs a teacher; add --teacher FILE"),
        (only["gradual"] and not gradual,
         f"--{''.join(only['gradual'][:1])} is for --recipe prune_gradual; add that"),
        (gradual and papers, f"--{''.join(papers[:1])} is for the papers' recipes; leave it out, see --prune_score"),
        (args.heavy_ball == "released" and args.threshold_every == "epoch",
         "--heavy_ball released thresholds at every step, as the release; leave out --threshold_every epoch"),
        (len(args.schedule) != len(args.gammas), f"--schedule has {len(args.schedule)} epochs and --gammas "
         f"{len(args.gammas)} factors; give as many of each"),
        (sorted(args.schedule) != list(args.schedule), f"--schedule must ascend, got {schedule}"),
        (args.recipe == "finetune" and not args.resume,
         "recipe finetune starts from a pruned checkpoint; add --resume FILE"),
        (args.widths_of and args.evaluate, f"{widths} makes a new network to train; leave --evaluate out"),
        (args.widths_of and (args.HTrate < 1 or gradual),
         f"{widths} trains a small network as it is; add --recipe baseline"),
        (args.recalibrate and not args.evaluate,
         f"--recalibrate {args.recalibrate} is for a test alone; add --evaluate, or leave it out"),
        (args.evaluate and not args.resume and not args.use_pretrain,
         "--evaluate tests a trained network; add --resume FILE"),
    ]  # fmt: skip
    for broken, message in rules:
        if broken:
            raise UserError(message)
    terms = [parse_term(term) for term in args.kd]
    check_terms(terms)
    if args.teacher_cache and any(term.on == "stages" for term in terms):
        raise UserError("--teacher_cache keeps logits and features, not stages; compare those, or leave it out")
    wide = [term for term in terms if term.on != "logits"]
    if args.teacher and gradual and args.shrink and wide:
        raise UserError(f"--kd {wide[0]} compares widths, which the cuts change; compare logits, or add --shrink off")
    if gradual:
        names = ("prune_begin", "prune_end", "HTrate", "macs_cut", "prune_score", "allocation")
        check_options(*(getattr(args, name) for name in names))
