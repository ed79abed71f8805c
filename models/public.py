"""The public trained CIFAR ResNets of akamaster/pytorch_resnet_cifar10 (BSD-2), as networks of this project.

Names there: conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear. The shortcut into a stage of `width` channels
has width/4 zero channels in front and behind, where models.resnet_cifar has width/2 behind. So the channels of stages 2
and 3 are put into another order, which is exact: outputs of conv2 and bn2, inputs of the next conv1 and the last layer.
"""

import re

from torch import Tensor

from models.resnet_cifar import STAGE_WIDTHS
from utils.base.errors import UserError

# Mean and std of the images (in 0..1) that these networks were trained on: those of ImageNet.
NORMALISATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
OUTER_NAMES = {"conv1": "conv_1_3x3", "bn1": "bn_1", "linear": "classifier"}


def convert_public(checkpoint: dict, path: object = "the file") -> dict:
    """A public CIFAR ResNet's checkpoint with this project's names, "arch" and "normalisation"; any other as it is.

    Args:
        checkpoint: of utils.base.checkpoint.read.

    Raises:
        UserError: a CIFAR ResNet of another kind; the line names the first weight that differs.
    """
    weights = checkpoint["state_dict"]
    is_cifar = "layer3.0.conv1.weight" in weights and "layer4.0.conv1.weight" not in weights
    if "format" in checkpoint or not is_cifar:
        return checkpoint
    other = next((name for name, value in weights.items() if not _is_public(name, value)), None)
    if other is not None:
        expected = "conv1, bn1, layer1 to layer3 of 16, 32, 64 channels without shortcut weights, and linear are read"
        raise UserError(
            f"'{path}' is a CIFAR ResNet of another kind: it has '{other}', while {expected}; use another file"
        )
    blocks = sum(re.fullmatch(r"layer1\.\d+\.conv1\.weight", name) is not None for name in weights)
    return {"arch": f"resnet{6 * blocks + 2}", "state_dict": convert_weights(weights), "normalisation": NORMALISATION}


def _is_public(name: str, value: Tensor) -> bool:
    """Whether these networks have a weight of this name and width."""
    found = re.fullmatch(r"(conv1|bn1|linear|layer([123])\.\d+\.(conv|bn)[12])\.\w+", name)
    return bool(found) and (not found[2] or not value.dim() or len(value) == STAGE_WIDTHS[int(found[2]) - 1])


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
