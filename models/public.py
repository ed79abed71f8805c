"""The public trained CIFAR ResNets of akamaster/pytorch_resnet_cifar10 (BSD-2), as networks of this project.

Names there: conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear. The shortcut into a stage of `width` channels
has width/4 zero channels in front and behind, where models.resnet_cifar has width/2 behind. So the channels of stages 2
and 3 are put into another order, which is exact: outputs of conv2 and bn2, inputs of the next conv1 and the last layer.
"""

from __future__ import annotations

import re

from torch import Tensor

from models.registry import REGISTRY
from models.resnet_cifar import STAGE_WIDTHS
from utils.base.errors import UserError

# Mean and std of the images (in 0..1) that these networks were trained on: those of ImageNet.
NORMALISATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
OUTER_NAMES = {"conv1": "conv_1_3x3", "bn1": "bn_1", "linear": "classifier"}


def convert_public(checkpoint: dict, arch: str | None, path: object) -> dict:
    """A public CIFAR ResNet's checkpoint with this project's names, "arch" and "normalisation"; any other as it is.

    Args:
        checkpoint: of utils.base.checkpoint.read.
        arch: the network that it is taken for, where the file does not name it.

    Raises:
        UserError: it is a CIFAR ResNet of another kind; the message names what differs.
    """
    weights, arch = checkpoint["state_dict"], checkpoint.get("arch") or arch
    is_cifar = {"conv1.weight", "layer3.0.conv1.weight"} <= weights.keys() and "layer4.0.conv1.weight" not in weights
    if "format" in checkpoint or not is_cifar or not re.fullmatch(r"resnet\d+", arch or "resnet20"):
        return checkpoint
    blocks = sum(re.fullmatch(r"layer1\.\d+\.conv1\.weight", name) is not None for name in weights)
    arch = f"resnet{6 * blocks + 2}"
    if reason := _difference(weights) or (None if arch in REGISTRY else f"this project has no {arch}"):
        raise UserError(f"'{path}' is not a CIFAR ResNet of the kind that is read here: {reason}; use another file")
    return {"arch": arch, "state_dict": convert_weights(weights), "normalisation": NORMALISATION}


def _difference(weights: dict[str, Tensor]) -> str | None:
    """What keeps these weights from being those of a network of this project."""
    for name, value in weights.items():
        stage = re.match(r"layer([123])\.\d+\.(conv|bn)[12]\.\w+$", name)
        if "shortcut" in name or "downsample" in name:
            return f"its shortcuts have weights ('{name}'), this project's have none"
        if stage is None and name.split(".")[0] not in OUTER_NAMES:
            return f"it has '{name}', where conv1, bn1, layer1 to layer3 and linear are expected"
        if stage is not None and value.dim() and len(value) != STAGE_WIDTHS[int(stage[1]) - 1]:
            return f"'{name}' has {len(value)} channels, where {STAGE_WIDTHS[int(stage[1]) - 1]} are expected"
    return None if "linear.weight" in weights else "it has no 'linear.weight'"


def convert_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the same function in this project's names and order of channels."""
    orders = {1: list(range(STAGE_WIDTHS[0]))}
    for stage, width in enumerate(STAGE_WIDTHS[1:], start=2):
        pad = width // 4
        orders[stage] = [pad + i for i in orders[stage - 1]] + [*range(pad), *range(width - pad, width)]
    converted = {}
    for name, value in weights.items():
        layer, _, end = name.rpartition(".")
        if layer.startswith("layer"):
            stage, block, inner = int(layer[5]), layer.split(".")[1], layer.split(".")[2]
            if inner == "conv1":
                value = value[:, orders[stage - 1 if block == "0" and stage > 1 else stage]]
            elif inner in ("conv2", "bn2") and value.dim():
                value = value[orders[stage]]
            converted[f"stage_{stage}.{block}.{inner[:-1]}_{'ab'[int(inner[-1]) - 1]}.{end}"] = value
        else:
            value = value[:, orders[3]] if name == "linear.weight" else value
            converted[f"{OUTER_NAMES[layer]}.{end}"] = value
    return converted
