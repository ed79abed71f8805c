"""A command line of the training script that is passed on: options removed and added, whatever they mean."""

from __future__ import annotations

import argparse
import re

from utils.base.errors import UserError
from utils.train.options import ALL

NAMES = {flag.lstrip("-"): option.name for option in ALL.values() for flag in option.flags} | {"a": "arch", "h": "help"}


class CommandLine(dict):
    """{option: its words}, and `words` before the first option. `-b 8` and `--batch-size=8` are {"batch_size": ["8"]}.

    Raises:
        UserError: a word among the options is no value of one. It may be DATA, which is recognised before them only.
    """

    def __init__(self, words: list[str]):
        super().__init__()
        self.words: list[str] = []
        values = self.words
        for word in words:
            if re.match(r"--?[A-Za-z]", word):
                name, equals, value = word.partition("=")
                name = name.lstrip("-").replace("-", "_")
                values = self[NAMES.get(name, name)] = [value] if equals else []
            else:
                values.append(word)
        for option in [ALL[name] for name in self if name in ALL]:
            most = None if option.many else 0 if option.type is None else 1
            for word in self[option.name][most:] if most is not None else []:
                raise UserError(f"'{word}' after --{option.name} is no value of it; DATA stands before the flags")

    def value(self, name: str, default: str = "") -> str:
        return next(iter(self.get(name, [])), default)

    def number(self, name: str, default: float) -> float:
        """The number that an option gives.

        Raises:
            UserError: its value is none that the training script takes.
        """
        try:
            return ALL[name].type(self.value(name)) if name in self else default
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--{name} {error}") from None

    def flags(self, *left_out: str) -> list[str]:
        """The options as words again, less some."""
        return [w for name, values in self.items() if name not in left_out for w in (f"--{name}", *values)]

    def only(self, *names: str) -> list[str]:
        return self.flags(*self.keys() - {*names})
