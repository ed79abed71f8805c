"""Every network by its name: this project's, for 32x32 images, and torchvision's."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from models.resnet_cifar import CifarResNet
from models.vgg_cifar import STAGES, CifarVGG
from utils.base.errors import UserError
from utils.base.torchvision_import import import_torchvision

# {name: what makes the network, called with num_classes and the network's own options}. A network whose class has
# `options_of(state_dict)` reads such options (here head_width) off the weights of a file; see models.load.
REGISTRY: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    **{f"vgg{depth}": partial(CifarVGG, depth) for depth in STAGES},
    **{f"vgg{depth}_bn": partial(CifarVGG, depth, batch_norm=True) for depth in STAGES},
}


def build(arch: str, num_classes: int = 10, **options) -> nn.Module:
    """A new network of REGISTRY; its attribute `num_classes` is the width of its output.

    Args:
        options: of that network (`head_width` of the ResNets).

    Raises:
        UserError: no network has this name.
    """
    check_arch(arch)
    net = REGISTRY[arch](num_classes=num_classes, **options)
    net.num_classes = num_classes
    return net


def check_arch(arch: str) -> None:
    """Raises UserError when no network of this project has this name."""
    if arch not in REGISTRY:
        raise UserError(f"unknown network '{arch}'; choose from {', '.join(REGISTRY)}")


def build_torchvision(arch: str, num_classes: int = 1000) -> nn.Module:
    """torchvision's classification network of this name, untrained.

    Raises:
        UserError: torchvision has no such network.
    """
    check_torchvision_arch(arch)
    # The auxiliary heads that these two have for training alone make them return several outputs.
    options = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    net = import_torchvision().models.get_model(arch, weights=None, num_classes=num_classes, **options)
    net.num_classes = num_classes
    return net


def check_torchvision_arch(arch: str) -> None:
    """Raises UserError for a name that is no classification network of torchvision."""
    if not _torchvision_has(arch):
        known = "resnet18, resnet34, resnet50, resnet101, resnet152 or another classification network of torchvision"
        raise UserError(f"unknown network '{arch}'; choose {known}, or for 32x32 images one of {', '.join(REGISTRY)}")


def is_torchvisions(checkpoint: dict, arch: str) -> bool:
    """Whether a checkpoint's network is torchvision's. Both have VGGs; torchvision's linear layers are wider."""
    if checkpoint.get("library") == "torchvision" or arch not in REGISTRY:
        return True
    with torch.device("meta"):
        own, weights = build(arch).state_dict(), checkpoint["state_dict"]
    shared = [name for name in own if name in weights and own[name].dim() == weights[name].dim() == 2]
    return any(weights[name].shape[1] > own[name].shape[1] for name in shared) and _torchvision_has(arch)


def _torchvision_has(arch: str) -> bool:
    torchvision = import_torchvision()
    return arch in torchvision.models.list_models(torchvision.models)
