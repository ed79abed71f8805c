"""Command lines: a parser whose errors are one line, and the types of values that options take."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence

from utils.base.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """argparse whose error is one line, and which takes long options with hyphens or underscores."""

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_args([self._with_underscores(argument) for argument in args], namespace)

    def _with_underscores(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


def number(kind: Callable, accept: Callable[[float], bool], meaning: str):
    """An argparse type: a finite number of `kind` that `accept` takes; `meaning` completes the error message."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not accept(value):
            raise argparse.ArgumentTypeError(f"must be {meaning}, got '{text}'")
        return value

    return parse


def path_name(text: str) -> str:
    """An argparse type: a path; an empty one is a shell variable that was not set."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return text


def switch(text: str) -> bool:
    """An argparse type: on or off."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"must be on or off, got '{text}'")
    return text == "on"


COUNT = number(int, lambda n: n >= 1, "a whole number >= 1")
WHOLE = number(int, lambda n: n >= 0, "a whole number >= 0")
SEED = number(int, lambda n: 0 <= n < 2**32, "a whole number in 0..2^32-1")
POSITIVE = number(float, lambda x: x > 0, "a number > 0")
NOT_NEGATIVE = number(float, lambda x: x >= 0, "a number >= 0")
KEPT_RATE = number(float, lambda x: 0 < x <= 1, "the share of filters KEPT, in (0, 1]")
PRUNED_RATE = number(float, lambda x: 0 <= x < 1, "the share of filters REMOVED, in [0, 1)")
SHARE = number(float, lambda x: 0 <= x <= 1, "a share in 0..1")
IMAGE_SIZE = number(int, lambda n: 32 <= n <= 1024, "a whole number in 32..1024")
