"""The networks, behind one registry.

models.resnet20(num_classes=10)         # every name of the registry is also a function of this package
models.build("vgg16_bn", num_classes=100)
models.load("best.resnet20.pth.tar")    # a ready network from a checkpoint of this project or of others
"""

from models.initialise import initialise
from models.load import build_full, build_like, build_with_widths, load, load_checkpoint, load_with_checkpoint
from models.normalisation import renormalise
from models.registry import REGISTRY, build, build_torchvision, check_arch, check_torchvision_arch, is_torchvisions
from models.small import narrow_like

__all__ = ["REGISTRY", "build", "build_full", "build_like", "build_torchvision", "build_with_widths", "check_arch"]
__all__ += ["check_torchvision_arch", "initialise", "is_torchvisions", "load", "load_checkpoint"]
__all__ += ["load_with_checkpoint", "narrow_like", "renormalise"]


def __getattr__(name: str):
    """models.resnet20 and so on."""
    if name in REGISTRY:
        return REGISTRY[name]
    raise AttributeError(f"module 'models' has no attribute '{name}'")
