"""Every network of the project by its name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from models import resnet_cifar, vgg_cifar
from utils.base.errors import UserError

REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet_cifar.resnet20,
    "resnet32": resnet_cifar.resnet32,
    "resnet44": resnet_cifar.resnet44,
    "resnet56": resnet_cifar.resnet56,
    "resnet110": resnet_cifar.resnet110,
    "vgg11": vgg_cifar.vgg11,
    "vgg13": vgg_cifar.vgg13,
    "vgg16": vgg_cifar.vgg16,
    "vgg19": vgg_cifar.vgg19,
    "vgg11_bn": vgg_cifar.vgg11_bn,
    "vgg13_bn": vgg_cifar.vgg13_bn,
    "vgg16_bn": vgg_cifar.vgg16_bn,
    "vgg19_bn": vgg_cifar.vgg19_bn,
}


def build(arch: str, num_classes: int = 10, **options) -> nn.Module:
    """A new network.

    Args:
        arch: a name of REGISTRY.
        num_classes: width of the output.
        options: of that network (`head_width` of the ResNets).

    Raises:
        UserError: no network has this name.
    """
    check_arch(arch)
    return REGISTRY[arch](num_classes, **options)


def check_arch(arch: str) -> None:
    """Raises UserError when no network has this name."""
    if not isinstance(arch, str) or arch not in REGISTRY:
        raise UserError(f"unknown network '{arch}'; choose from {', '.join(REGISTRY)}")
