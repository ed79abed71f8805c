"""Checkpoints: plain tensors, numbers and strings; a crash leaves the previous file, and reading one runs no code."""

from __future__ import annotations

import io
import math
import os
import random
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils.base.errors import UserError
from utils.base.files import replace_file

# The entry "format" of this project's files.
FORMAT = "ahsg-ht 1"
# Entries and their types.
NUMBER = (int, float)
TYPES = {
    **{"arch": str, "epoch": int, "best_prec1": NUMBER, "optimizer": dict, "dataset": str, "library": str},
    **{"num_classes": int, "input_shape": list, "normalisation": dict, "kept": dict, "pads": dict, "adapters": dict},
    **{"settings": dict, "history": list, "loader": dict, "random_states": dict, "running_means": dict},
    **{"pruning": dict, "pieces": int, "cost": dict, "shapes": dict},
}
# What is read of files of other projects.
FROM_OTHERS = ("arch", "epoch", "best_prec1", "optimizer")


def write(checkpoint: dict, *paths: str | os.PathLike, keep: Path | None = None) -> None:
    """Writes a checkpoint of plain values and tensors to each of the paths.

    Args:
        keep: the new path of the file that the last path had before.

    Raises:
        UserError: the disk is full or the folder not writable; earlier files at the paths are untouched.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    for number, path in enumerate(map(Path, paths), start=1):
        replace_file(path, buffer.getbuffer(), keep=keep if number == len(paths) else None)


def read(path: str | os.PathLike) -> dict:
    """A checkpoint as a dict with at least "state_dict", tensors on the CPU; nothing in it is executed (weights_only).

    A bare state dict is wrapped, a `module.` prefix of the names removed. Of other projects' files the entries
    FROM_OTHERS are kept where they are of the expected type.

    Raises:
        UserError: missing, damaged, unsafe, or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at '{path}'; check the path")
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle protocols that it then refuses or reads
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader raise whatever its bytes lead to
        if "unsupported global" in str(error).lower():
            raise UserError(f"'{path}' holds what could run code, not only tensors and plain values") from None
        reason = error if isinstance(error, zipfile.BadZipFile) else type(error).__name__
        raise UserError(f"'{path}' is damaged or is no PyTorch checkpoint ({reason}); use an intact copy") from None
    content = content if isinstance(content, dict) else {}
    if "state_dict" not in content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"state_dict": content}
    weights = content.get("state_dict")
    if not weights or not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise UserError(f"'{path}' is no checkpoint: it has no state_dict of tensors")
    size = path.stat().st_size
    for name, value in weights.items():
        # A view may claim any size: stride 0 repeats one number, and dimensions without entries take no memory.
        dense = isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided
        if not dense or not 0 < value.nbytes <= value.untyped_storage().nbytes() <= size:
            raise UserError(f"'{path}' is damaged or is no checkpoint: '{name}' in its state_dict is no intact tensor")
    if all(name.startswith("module.") for name in weights):
        content["state_dict"] = {name.removeprefix("module."): value for name, value in weights.items()}
    for name in FROM_OTHERS:
        if isinstance(content.get(name), Tensor) and content[name].numel() == 1:
            content[name] = content[name].item()
    present = [name for name in TYPES if name in content]
    unfit = [name for name in present if not _fits(name, content)]
    if content.get("format") != FORMAT:
        kept = {name: content[name] for name in present if name in FROM_OTHERS and name not in unfit}
        return {"state_dict": content["state_dict"], **kept}
    if unfit:
        raise UserError(f"entry '{unfit[0]}' in '{path}' is not what this project writes; use an intact copy")
    return content


def _check_archive(path: Path) -> None:
    """Raises BadZipFile where a zip file has a wrong checksum, which torch does not compare, or unpacks to more."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise zipfile.BadZipFile("its entries are larger than the file")
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum in entry '{broken}'")


def _fits(name: str, content: dict) -> bool:
    """Whether an entry has its type and, where sizes are taken from it, a possible value."""
    value = content[name]
    if not isinstance(value, TYPES[name]):
        return False
    if name == "num_classes":
        return any(value in weight.shape for weight in content["state_dict"].values())
    if name == "input_shape":
        return len(value) == 3 and all(type(n) is int and 0 < n <= 4096 for n in value)
    if name == "normalisation":
        lists = (value.get("mean"), value.get("std"))
        return all(isinstance(numbers, list) and all(type(n) is float for n in numbers) for numbers in lists)
    if name == "optimizer":
        return isinstance(value.get("state"), dict) and isinstance(value.get("param_groups"), list)
    # best_prec1 is -1 before the first test.
    return not isinstance(value, NUMBER) or (-1 if name == "best_prec1" else 0) <= value < math.inf


def progress(checkpoint: dict) -> tuple[int, int]:
    """How far a checkpoint is: complete epochs, and mini-batches of the epoch under way."""
    return checkpoint.get("epoch", 0), checkpoint.get("loader", {}).get("position", 0)


def load_weights(net: nn.Module, state_dict: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Copies weights into a network; BatchNorm's num_batches_tracked may be missing (PyTorch before 0.4.1).

    Raises:
        UserError: names or shapes differ; the line names the first that does.
    """
    own = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state_dict.items()}
    missing = [f"no '{n}' in the file" for n in own if n not in found and not n.endswith("num_batches_tracked")]
    unexpected = [f"'{n}' of the file has no place in the network" for n in found if n not in own]
    other = [n for n in own if n in found and found[n] != own[n]]
    shapes = [f"'{n}' is {found[n]} in the file, {own[n]} in the network" for n in other]
    # A copy would drop their imaginary parts.
    numbers = [f"'{n}' holds complex numbers" for n, value in state_dict.items() if value.is_complex()]
    if reasons := [several[0] for several in (missing, unexpected, shapes, numbers) if several]:
        remedy = "choose the --arch and --dataset that it was trained with"
        raise UserError(f"'{path}' does not fit this network: {'; '.join(reasons)}; {remedy}")
    net.load_state_dict(state_dict, strict=False)


def random_states() -> dict:
    """The states of all random generators, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": list(random.getstate()),
        "numpy": [kind, keys.tolist(), *rest],
    }


def restore_random_states(states: dict) -> None:
    """Sets all random generators as `random_states` found them; GPU states only when there are as many GPUs.

    Raises:
        UserError: the states are none that the generators take.
    """
    try:
        torch.set_rng_state(states["torch"])
        if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states["cuda"])
        version, internal, gauss = states["python"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(tuple(states["numpy"]))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"the checkpoint's random states are damaged ({type(error).__name__}); use another") from None
