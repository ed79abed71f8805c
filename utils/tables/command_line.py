"""A command line of the training script that is passed on: options removed and added, whatever they mean."""

from __future__ import annotations

import re
from fnmatch import fnmatch

from utils.base.errors import UserError
from utils.train.options import recipe_settings

NAMES = {
    "-a": "arch",
    "-b": "batch_size",
    "-e": "evaluate",
    "-h": "help",
    "seed": "manualSeed",
    "save_dir": "save_path",
}


class CommandLine(dict):
    """{option: its words}, and `words` before the first option. Names are long: `-b 8` is {"batch_size": ["8"]}.

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
                name = name[2:].replace("-", "_") if name.startswith("--") else name
                values = self[NAMES.get(name, name)] = [value] if equals else []
            else:
                values.append(word)
        usual = recipe_settings("prune", "cifar10")
        for name in self.keys() & usual.keys():
            most = 0 if usual[name] is False else 1
            if len(self[name]) > most and not isinstance(usual[name], list):
                raise UserError(f"'{self[name][most]}' after --{name} is no value of it; DATA stands before the flags")

    def value(self, name: str, default: str = "") -> str:
        return next(iter(self.get(name, [])), default)

    def flags(self, *left_out: str) -> list[str]:
        """The options as words again, less those of some names or patterns (kd_*)."""
        kept = {name: values for name, values in self.items() if not any(fnmatch(name, p) for p in left_out)}
        return [w for n, v in kept.items() for w in (n if n.startswith("-") else f"--{n}", *v)]
