"""A network keeps the normalisation that it was trained with, whatever the images are normalised with."""

import torch
from torch import nn


def renormalise(net: nn.Module, trained_with: dict, fed_with: dict) -> nn.Module:
    """Makes a network take images that are normalised otherwise than in its training. In place; returns the network.

    Each channel becomes x * scale + shift before the first layer, which is exact also where that layer pads with zeros;
    folding scale and shift into its weights would not be. It is a forward pre-hook: names and state dict stay, and
    torch.compile(net) includes it. What torch.fx makes of the network would lack it.

    Args:
        trained_with: {"mean": [...], "std": [...]} per channel, of images in 0..1, as models.load_checkpoint has it.
        fed_with: that of the images which the network will be called with.
    """
    mean, std = (torch.tensor(trained_with[name]).view(-1, 1, 1) for name in ("mean", "std"))
    fed_mean, fed_std = (torch.tensor(fed_with[name]).view(-1, 1, 1) for name in ("mean", "std"))
    if not hasattr(net, "input_scale"):
        if torch.equal(mean, fed_mean) and torch.equal(std, fed_std):
            return net
        net.register_forward_pre_hook(_rescale)
    # Buffers, so that they move with the network; the state dict does not hold them.
    net.register_buffer("input_scale", fed_std / std, persistent=False)
    net.register_buffer("input_shift", (fed_mean - mean) / std, persistent=False)
    return net


def _rescale(net: nn.Module, inputs: tuple) -> tuple:
    return (inputs[0] * net.input_scale + net.input_shift, *inputs[1:])
