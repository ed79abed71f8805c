"""Checkpoints: plain tensors, numbers and strings; a crash leaves the previous file, and reading one runs no code."""

import io
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
# What is read of files of other projects, and where.
FROM_OTHERS = {
    "arch": lambda value: isinstance(value, str),
    "epoch": lambda value: isinstance(value, int) and value >= 0,
    "optimizer": lambda value: isinstance(value, dict) and isinstance(value.get("param_groups"), list),
}


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
    FROM_OTHERS are kept where they are what they should be.

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
    if content.get("format") == FORMAT:
        return content
    kept = {name: content[name] for name, accepts in FROM_OTHERS.items() if accepts(content.get(name))}
    return {"state_dict": content["state_dict"], **kept}


def _check_archive(path: Path) -> None:
    """Raises BadZipFile where a zip file has a wrong checksum, which torch does not compare."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum in entry '{broken}'")


def progress(checkpoint: dict) -> tuple[int, int]:
    """How far a checkpoint is: complete epochs, and mini-batches of the epoch under way."""
    return checkpoint.get("epoch", 0), checkpoint.get("loader", {}).get("position", 0)


def load_weights(net: nn.Module, state_dict: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Copies weights into a network; BatchNorm's num_batches_tracked may be missing (PyTorch before 0.4.1).

    Raises:
        UserError: names or shapes differ; the line names the first that does.
    """
    try:
        missing, unexpected = net.load_state_dict(state_dict, strict=False)
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        reasons = [f"no '{name}' in the file" for name in missing[:1]]
        reasons += [f"'{name}' of the file has no place in the network" for name in unexpected[:1]]
    except RuntimeError as error:  # shapes that differ, a line each below the heading
        reasons = [line.strip() for line in str(error).splitlines()[1:2]]
    if reasons:
        remedy = "choose the --arch and --dataset that it was trained with"
        raise UserError(f"'{path}' does not fit this network: {'; '.join(reasons)}; {remedy}")


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
