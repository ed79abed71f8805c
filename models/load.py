"""A ready network from a file: a checkpoint or small network of the project, a released one, or one of soft filter pruning."""

from __future__ import annotations

import os

from torch import Tensor, nn

from models.initialise import initialise
from models.registry import REGISTRY, build
from models.small import check_narrowed, narrow_like
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.base.torchvision_import import import_torchvision


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
    net = build_like(checkpoint, arch, path)
    checkpoints.load_weights(net, checkpoint["state_dict"], path)
    return arch, net.eval()


def build_like(checkpoint: dict, arch: str, path: str | os.PathLike) -> nn.Module:
    """A network with the shapes of a checkpoint's weights, narrowed where they are a small network's; its weights are not loaded.

    Raises:
        UserError: no such network, or layers that do not fit each other.
    """
    weights = checkpoint["state_dict"]
    net = _build_full(checkpoint, arch, path)
    full = {name: value.shape for name, value in net.state_dict().items()}
    narrow_like(net, weights, checkpoint.get("pads"))
    if any(value.shape != full[name] for name, value in net.state_dict().items()):
        try:
            check_narrowed(net, checkpoint.get("input_shape", input_shape(arch, checkpoint)), path)
        except UserError:
            if checkpoint.get("small"):
                raise
            # No small network: load_weights says which weight is of another shape.
            return _build_full(checkpoint, arch, path)
    return net


def build_with_widths(path: str | os.PathLike, arch: str, num_classes: int) -> nn.Module:
    """A new, untrained network with the widths of a small network: the control of training it from scratch.

    Args:
        path: a file of utils.get_small_model, or a checkpoint of a network of that width.
        arch: the network that it must be of.
        num_classes: the classes that it must tell apart.

    Raises:
        UserError: the file is of another network or of other classes.
    """
    checkpoint = checkpoints.read(path)
    found = checkpoint.get("arch", arch)
    if found != arch:
        raise UserError(f"'{path}' is a {found}, not a {arch}; use --arch {found}")
    net = build_like(checkpoint, arch, path)
    if net.num_classes != num_classes:
        raise UserError(
            f"'{path}' tells {net.num_classes} classes apart, the data has {num_classes}; use a small network of the same data set"
        )
    return initialise(net)


def _build_full(checkpoint: dict, arch: str, path: str | os.PathLike) -> nn.Module:
    weights = checkpoint["state_dict"]
    if not is_torchvisions(checkpoint, arch):
        return build(arch, **infer_options(arch, weights))
    heads = [value for value in weights.values() if value.dim() == 2]
    net = build_torchvision(arch, checkpoint.get("num_classes") or len(heads[-1] if heads else ()))
    if not {name for name, _ in net.named_parameters()} <= weights.keys():
        raise UserError(f"'{path}' names the network {arch}, but its weights are not those of torchvision's {arch}")
    return net


def check_torchvision_arch(arch: str) -> None:
    """Raises UserError for a name that is no classification network of torchvision."""
    torchvision = import_torchvision()
    if arch not in torchvision.models.list_models(torchvision.models):
        raise UserError(
            f"unknown network '{arch}'; choose resnet18, resnet34, resnet50, resnet101, resnet152 or another classification network of torchvision.models"
        )


def build_torchvision(arch: str, num_classes: int) -> nn.Module:
    """torchvision's classification network of this name, untrained.

    Raises:
        UserError: torchvision has no such network.
    """
    torchvision = import_torchvision()
    if arch not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"unknown network '{arch}'; choose from {', '.join(REGISTRY)}, or one of torchvision.models")
    # The heads that these two add for training alone make them return several outputs.
    options = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **options)


def is_torchvisions(checkpoint: dict, arch: str) -> bool:
    """Whether a checkpoint's network is torchvision's. The VGGs of both libraries share their names, but not the widths of their heads."""
    if checkpoint.get("library") == "torchvision" or arch not in REGISTRY:
        return True
    full, weights = build(arch, **infer_options(arch, checkpoint["state_dict"])).state_dict(), checkpoint["state_dict"]
    heads = [name for name in full if name in weights and full[name].dim() == weights[name].dim() == 2]
    wider = [name for name in heads if weights[name].numel() > full[name].numel()]
    torchvision = import_torchvision()
    return bool(wider) and arch in torchvision.models.list_models(torchvision.models)


def input_shape(arch: str, checkpoint: dict | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the images that a network is for, where its file does not say."""
    other = arch not in REGISTRY if checkpoint is None else is_torchvisions(checkpoint, arch)
    return (3, 224, 224) if other else (3, 32, 32)
