"""What the entries of a checkpoint of this project must be. A file may carry the project's mark and still be anybody's."""

from __future__ import annotations

import math

from torch import Tensor

# Numbers of one input image; beyond them a file's `input_shape` would only cost memory.
MAX_INPUT_NUMBERS = 3 * 4096 * 4096
METRIC_NAMES = {"epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "images_per_s", "seconds"}
# A checkpoint with settings is one of training, and has all of these.
TRAINING_ENTRIES = ("epoch", "arch", "best_prec1", "optimizer", "history", "random_states", "loader")


def first_odd_entry(content: dict) -> str | None:
    """The name of the first entry that is not what this project writes, None where all are."""
    if isinstance(content.get("settings"), dict):
        for name in TRAINING_ENTRIES:
            if name not in content:
                return f"missing entry '{name}'"
    for name, fits in CHECKS.items():
        if name in content and not fits(content[name], content):
            return f"entry '{name}'"
    if content.get("loader", {}).get("position") and "running_means" not in content:
        return "missing entry 'running_means'"
    return None


def _is_whole(value, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _is_number(value) -> bool:
    return type(value) in (int, float)


def _is_dict_of(value, fits) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and fits(entry) for key, entry in value.items())


def _widest(content: dict) -> int:
    return max((n for weight in content["state_dict"].values() for n in weight.shape), default=0)


def _is_plain(value) -> bool:
    if isinstance(value, list):
        return all(_is_plain(entry) and not isinstance(entry, list) for entry in value)
    return value is None or type(value) in (bool, int, float, str)


def _is_loader(value, content) -> bool:
    return isinstance(value, dict) and all(_is_whole(value.get(name)) for name in ("seed", "epoch", "position"))


def _is_optimizer(value, content) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(state, dict) for state in value["state"].values())
        and all(isinstance(group, dict) for group in value["param_groups"])
    )


def _is_history(value, content) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict) and set(row) >= METRIC_NAMES and all(map(_is_number, row.values())) for row in value
    )


def _is_sums(value, content) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("sums"), Tensor)
        and value["sums"].dim() == 2
        and value["sums"].shape[1] == 4
        and _is_number(value.get("seconds"))
    )


def _is_input_shape(value, content) -> bool:
    # Small networks are for images (C, H, W).
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(_is_whole(n, 1) for n in value)
        and math.prod(value) <= MAX_INPUT_NUMBERS
    )


CHECKS = {
    "epoch": lambda value, content: _is_whole(value),
    "arch": lambda value, content: isinstance(value, str),
    "dataset": lambda value, content: isinstance(value, str),
    "library": lambda value, content: isinstance(value, str),
    "best_prec1": lambda value, content: _is_number(value),
    # A classifier of so many classes is in the file, or it would be built from this number alone.
    "num_classes": lambda value, content: _is_whole(value, 1) and value <= _widest(content),
    "settings": lambda value, content: _is_dict_of(value, _is_plain),
    "loader": _is_loader,
    "optimizer": _is_optimizer,
    "history": _is_history,
    "running_means": _is_sums,
    "random_states_of_ranks": lambda value, content: (
        isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)
    ),
    "batchnorm_of_ranks": lambda value, content: (
        isinstance(value, list) and all(_is_dict_of(entry, lambda t: isinstance(t, Tensor)) for entry in value)
    ),
    "random_states": lambda value, content: isinstance(value, dict),
    "adapters": lambda value, content: _is_dict_of(value, lambda entry: isinstance(entry, Tensor)),
    "pads": lambda value, content: _is_dict_of(value, lambda n: _is_whole(n) and n <= _widest(content)),
    "kept": lambda value, content: _is_dict_of(value, lambda at: isinstance(at, list) and all(map(_is_whole, at))),
    "input_shape": _is_input_shape,
}
