"""The networks, behind one registry.

models.resnet20(num_classes=10)         # every name of the registry is also a function of this package
models.build("vgg16_bn", num_classes=100)
models.load("best.resnet20.pth.tar")    # a ready network from any checkpoint of the project, a released one, or a small network's file
"""

from models.initialise import initialise
from models.load import (
    build_like,
    build_torchvision,
    build_with_widths,
    check_torchvision_arch,
    infer_options,
    input_shape,
    is_torchvisions,
    load,
    load_with_name,
)
from models.registry import REGISTRY, build, check_arch
from models.resnet_cifar import resnet20, resnet32, resnet44, resnet56, resnet110
from models.small import narrow_like
from models.vgg_cifar import vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn

__all__ = [
    "REGISTRY",
    "build",
    "build_like",
    "build_torchvision",
    "build_with_widths",
    "check_arch",
    "check_torchvision_arch",
    "infer_options",
    "initialise",
    "input_shape",
    "is_torchvisions",
    "load",
    "load_with_name",
    "narrow_like",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
]
