"""A ready network from a file: a checkpoint or small network of the project, or a file of others that it knows."""

import os

import torch
from torch import nn

from models.initialise import initialise
from models.public import convert_public
from models.registry import REGISTRY, build, build_torchvision, is_torchvisions
from models.small import narrow_like
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError

# torchvision's networks whose weights were trained on images of mean and std 0.5; all others' have ImageNet's. A file
# of such a network that names neither is taken to hold torchvision's weights.
OF_HALF = ("efficientnet_v2_l", "googlenet", "inception_v3")
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


def load(path: str | os.PathLike, arch: str | None = None) -> nn.Module:
    """The network of a checkpoint, with its weights, on the CPU, in eval mode.

    Args:
        path: a file of this project, of AHSG-HT's release, of soft filter pruning or of models.public.
        arch: the network, for files that do not name it.

    Raises:
        UserError: the file is missing, damaged or of another network.
    """
    return load_with_checkpoint(path, arch)[0]


def load_with_checkpoint(path: str | os.PathLike, arch: str | None = None) -> tuple[nn.Module, dict]:
    """(what `load` returns, what `load_checkpoint` returns with "input_shape", (C, H, W) of its images)."""
    checkpoint = load_checkpoint(path, arch)
    net = build_like(checkpoint, checkpoint["arch"], path)
    checkpoints.load_weights(net, checkpoint["state_dict"], path)
    usual = (3, 224, 224) if is_torchvisions(checkpoint, checkpoint["arch"]) else (3, 32, 32)
    return net.eval(), {"input_shape": usual, **checkpoint}


def load_checkpoint(path: str | os.PathLike, arch: str | None = None) -> dict:
    """A checkpoint whose entries "state_dict" and "arch" are those of a network that this project builds.

    Where the network was not trained with the usual mean and std of its data set, "normalisation" names them:
    {"mean": [...], "std": [...]}, per channel, of images in 0..1.

    Args:
        arch: the network, for files that do not name it.

    Raises:
        UserError: the file is missing or damaged, does not name its network, or is of a network with other layers.
    """
    checkpoint = convert_public(checkpoints.read(path), path)
    arch = checkpoint.get("arch") or arch
    if arch is None:
        raise UserError(f"'{path}' does not name its network; use --arch with one of {', '.join(REGISTRY)}")
    return {**({"normalisation": HALF} if arch in OF_HALF else {}), **checkpoint, "arch": arch}


def build_like(checkpoint: dict, arch: str, path: str | os.PathLike) -> nn.Module:
    """An untrained network with the shapes of a checkpoint's weights, which may be a small network's.

    Raises:
        UserError: no such network.
    """
    net = build_full(checkpoint, arch, path)
    if checkpoint.keys() <= {"state_dict", "normalisation", "library", *checkpoints.FROM_OTHERS}:
        # Other projects write full networks; load_weights names the weight of another shape.
        return net
    return narrow_like(net, checkpoint["state_dict"], checkpoint.get("pads"))


def build_with_widths(path: str | os.PathLike, arch: str, num_classes: int) -> nn.Module:
    """A new, untrained network with the widths of a small network's file: the control of training it from scratch.

    Raises:
        UserError: the file is not of `arch`, or of other classes.
    """
    checkpoint = load_checkpoint(path, arch)
    if checkpoint["arch"] != arch:
        raise UserError(f"'{path}' is a {checkpoint['arch']}, not a {arch}; use --arch {checkpoint['arch']}")
    net = build_like(checkpoint, arch, path)
    if net.num_classes != num_classes:
        classes = f"'{path}' has {net.num_classes} classes, the data has {num_classes}"
        raise UserError(f"{classes}; use a small network of the same data set")
    return initialise(net)


def build_full(checkpoint: dict, arch: str, path: str | os.PathLike) -> nn.Module:
    """The unpruned network of a checkpoint; the number of classes is the file's own, or the rows of its last layer."""
    weights, classes = checkpoint["state_dict"], checkpoint.get("num_classes")
    make = build_torchvision if is_torchvisions(checkpoint, arch) else build
    # On the meta device layers have shapes only; torchvision's RegNets cannot be built there.
    with torch.device("cpu" if make is build_torchvision else "meta"):
        net = make(arch)
        options = net.options_of(weights) if hasattr(net, "options_of") else {}
        head = last_layer(make(arch, **options) if options else net) + ".weight"
    if classes is None:
        if head not in weights or weights[head].dim() < 2:
            raise UserError(f"'{path}' has no weights of {arch}: no '{head}' among {', '.join(list(weights)[:3])}, ...")
        classes = len(weights[head])
    return make(arch, num_classes=classes, **options)


def last_layer(net: nn.Module) -> str:
    """The name of the linear or convolutional layer registered last: the head of all that others' files hold."""
    return [name for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
