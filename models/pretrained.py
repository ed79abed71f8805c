"""torchvision's networks with trained weights: torchvision's own, or those of a local file."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from models.load import HALF, OF_HALF, last_layer, load_checkpoint
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.base.files import network_timeout
from utils.base.torchvision_import import import_torchvision

# The weights that papers on pruning start from (ResNet-50: 76.13 % top-1); newer ones come of another recipe.
USUAL_WEIGHTS = "IMAGENET1K_V1"
# Heads that only help training, which networks built here do not have.
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


def load_pretrained(net: nn.Module, arch: str, file: str | None) -> tuple[str, dict | None]:
    """Copies trained weights into a network; a last layer for another number of classes keeps its own.

    Args:
        net: torchvision's network `arch`, of any number of classes.
        file: a checkpoint or a bare state dict; None downloads torchvision's weights, or takes them from torch's cache.

    Returns:
        (where the weights come from, in words; mean and std of the images that they take, None for the usual ones).

    Raises:
        UserError: no network, or weights of another network.
    """
    if file is None:
        weights, source = _torchvisions_weights(arch)
        normalisation = HALF if arch in OF_HALF else None
    else:
        checkpoint, source = load_checkpoint(file, arch), f"'{file}'"
        weights, normalisation = checkpoint["state_dict"], checkpoint.get("normalisation")
    own = net.state_dict()
    weights = {name: value for name, value in weights.items() if not name.startswith(AUXILIARY)}
    head = [f"{last_layer(net)}.{end}" for end in ("weight", "bias")]
    other = [name for name in head if name in weights and weights[name].shape != own[name].shape]
    weights.update({name: own[name] for name in other})
    checkpoints.load_weights(net, weights, file or f"torchvision's {arch}")
    source += ", except the last layer, which has another number of classes" if other else ""
    return source, normalisation


def _torchvisions_weights(arch: str) -> tuple[dict[str, Tensor], str]:
    choices = import_torchvision().models.get_model_weights(arch)
    weights = getattr(choices, USUAL_WEIGHTS, None) or next(iter(choices), None)
    if weights is None:
        raise UserError(f"torchvision has no trained weights of {arch}; use --use_pretrain FILE, or leave it out")
    cached = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
    try:
        with network_timeout():
            return weights.get_state_dict(progress=False, check_hash=True), f"torchvision's {weights}"
    except (OSError, RuntimeError) as error:
        remedy = f"put {weights.url} at '{cached}', or use --use_pretrain FILE"
        raise UserError(f"the download of the trained weights of {arch} failed ({error}); {remedy}") from None
