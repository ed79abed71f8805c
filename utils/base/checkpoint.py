"""Checkpoints: plain tensors, numbers and strings, written so that a crash leaves the previous file, read without executing anything."""

from __future__ import annotations

import io
import math
import os
import random
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils.base.checkpoint_entries import first_odd_entry
from utils.base.declared_sizes import Damaged, Unsafe, check_file
from utils.base.errors import UserError
from utils.base.files import replace_file

# Marks files of this project; what only they hold (settings, metrics, random states) is read from them alone.
FORMAT = "ahsg-ht 1"


def write(checkpoint: dict, *paths: str | os.PathLike, keep: Path | None = None) -> None:
    """Writes one checkpoint to each of the paths: to a temporary file beside it, flushed to the disk, then renamed.

    Args:
        checkpoint: plain values and tensors.
        paths: of the files.
        keep: where the file that the last path had before goes.

    Raises:
        UserError: the disk is full or the folder not writable; earlier files at the paths are untouched.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    for number, path in enumerate(map(Path, paths), start=1):
        replace_file(path, buffer.getbuffer(), keep=keep if number == len(paths) else None)


def read(path: str | os.PathLike) -> dict:
    """A checkpoint as a dict with at least "state_dict", tensors on the CPU.

    A bare state dict is wrapped, a `module.` prefix of the names is taken off; of files of others the entries arch, epoch,
    best_prec1 and optimizer are kept where they are what their names say. Only tensors and plain values are read
    (torch's weights_only), so a file from others cannot run code; sizes and checksums are compared before that.

    Raises:
        UserError: missing, damaged, unsafe, or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at '{path}'; check the path")
    try:
        check_file(path)
        with warnings.catch_warnings():
            # torch warns of odd pickle protocols before it refuses or reads them.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Unsafe as error:
        raise UserError(
            f"'{path}' holds more than tensors and plain values ({error}) and is not read, as it could run code"
        ) from None
    except Exception as error:  # a damaged file makes the reader raise whatever its bytes lead to
        reason = str(error) if isinstance(error, Damaged) else type(error).__name__
        raise UserError(f"'{path}' is damaged or is no PyTorch checkpoint ({reason}); use an intact copy") from None
    if (
        isinstance(content, dict)
        and "state_dict" not in content
        and content
        and all(isinstance(v, Tensor) for v in content.values())
    ):
        content = {"state_dict": content}
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items())
    ):
        raise UserError(f"'{path}' is no checkpoint: it has no state_dict of tensors")
    if all(name.startswith("module.") for name in weights):
        content["state_dict"] = {name.removeprefix("module."): value for name, value in weights.items()}
    if content.get("format") != FORMAT and not _is_from_before_the_mark(content):
        return _entries_of_others(content)
    odd = first_odd_entry(content)
    if odd is not None:
        raise UserError(f"'{path}' says that it is of this project, but its {odd} is not; use an intact copy")
    return content


def progress(checkpoint: dict) -> tuple[int, int]:
    """How far a checkpoint is: complete epochs, and mini-batches of the epoch under way."""
    return checkpoint.get("epoch", 0), checkpoint.get("loader", {}).get("position", 0)


def _is_from_before_the_mark(content: dict) -> bool:
    """Whether a file without a mark is a training checkpoint of this project's first versions, which wrote the same entries."""
    settings = content.get("settings")
    return (
        "format" not in content
        and isinstance(settings, dict)
        and {"recipe", "HTrate", "manualSeed"} <= settings.keys()
        and first_odd_entry(content) is None
    )


def _entries_of_others(content: dict) -> dict:
    """What a checkpoint of another project may say, each entry only where it is of the expected kind."""
    kept = {"state_dict": content["state_dict"]}
    if isinstance(content.get("arch"), str):
        kept["arch"] = content["arch"]
    for name in ("epoch", "best_prec1"):
        value = content.get(name)
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(value, (int, float)) and math.isfinite(value) and value >= 0:
            kept[name] = int(value) if name == "epoch" else float(value)
    optimizer = content.get("optimizer")
    if (
        isinstance(optimizer, dict)
        and isinstance(optimizer.get("state"), dict)
        and isinstance(optimizer.get("param_groups"), list)
    ):
        kept["optimizer"] = optimizer
    return kept


def load_weights(net: nn.Module, state_dict: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Copies weights into a network; BatchNorm's num_batches_tracked may be missing (PyTorch before 0.4.1).

    Raises:
        UserError: names or shapes differ; the line names the first that does.
    """
    own = net.state_dict()
    missing = [name for name in own if name not in state_dict and not name.endswith("num_batches_tracked")]
    odd = [name for name in state_dict if name not in own]
    shapes = [name for name in own if name in state_dict and own[name].shape != state_dict[name].shape]
    reasons = [f"no '{name}' in the file" for name in missing[:1]]
    reasons += [f"'{name}' of the file has no place in the network" for name in odd[:1]]
    reasons += [
        f"'{n}' is {tuple(state_dict[n].shape)} in the file, {tuple(own[n].shape)} in the network" for n in shapes[:1]
    ]
    # A copy would drop their imaginary parts.
    reasons += [f"'{n}' holds complex numbers" for n, value in state_dict.items() if value.is_complex()][:1]
    if reasons:
        raise UserError(
            f"'{path}' does not fit this network: {'; '.join(reasons)}; choose the --arch and --dataset that it was trained with"
        )
    net.load_state_dict(state_dict, strict=False)


def random_states() -> dict:
    """The states of all random generators, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": list(random.getstate()),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
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
        kind, keys, *rest = states["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"the checkpoint's random states are damaged ({type(error).__name__}); use another") from None
