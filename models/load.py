"""A ready network from a file: one of the project's checkpoints, a released one, or one of soft filter pruning."""

from __future__ import annotations

import os

from torch import Tensor, nn

from models.registry import REGISTRY, build, check_arch
from utils import checkpoint as checkpoints
from utils.errors import UserError


def infer_options(arch: str, state_dict: dict[str, Tensor]) -> dict:
    """num_classes and, for the two-layer head of released ResNets, head_width, read off the shapes of the weights.

    Raises:
        UserError: the weights have no classifier that networks of this project have.
    """
    for last in ("classifier", "classifier2", "classifier.6"):
        if f"{last}.weight" in state_dict and state_dict[f"{last}.weight"].dim() == 2:
            options = {"num_classes": state_dict[f"{last}.weight"].shape[0]}
            if last == "classifier2":
                if not arch.startswith("resnet"):
                    raise UserError(f"these weights have the two-layer head of a CIFAR ResNet, {arch} has none")
                options["head_width"] = state_dict["classifier2.weight"].shape[1]
            return options
    raise UserError(f"these are not weights of {arch}: no classifier among {', '.join(list(state_dict)[:3])}, ...")


def load(path: str | os.PathLike, arch: str | None = None) -> nn.Module:
    """The network of a checkpoint, with its weights, on the CPU, in eval mode.

    Args:
        path: a file of this project, of AHSG-HT's release or of soft filter pruning. Files are read without executing anything.
        arch: the network, for files that do not name it.

    Raises:
        UserError: the file is missing, damaged or of another network.
    """
    return load_with_name(path, arch)[1]


def load_with_name(path: str | os.PathLike, arch: str | None = None) -> tuple[str, nn.Module]:
    """`load`, with the registry name of the network before it."""
    checkpoint = checkpoints.read(path)
    arch = checkpoint.get("arch") or arch
    if arch is None:
        raise UserError(f"'{path}' does not name its network; say which: one of {', '.join(REGISTRY)}")
    check_arch(arch)
    net = build(arch, **infer_options(arch, checkpoint["state_dict"]))
    checkpoints.load_weights(net, checkpoint["state_dict"], path)
    return arch, net.eval()
