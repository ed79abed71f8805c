"""What distillation compares, out of any network: its logits, penultimate features, or the outputs of its stages.

The project's networks hand them out themselves (`return_features=True`); in others the modules concerned are listened to.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

from torch import Tensor, nn

from utils.base.errors import UserError

# Stages by the names that torchvision's ResNets, ResNeXts, DenseNets and RegNets give them.
STAGE = re.compile(r"(\w+\.)?(layer|denseblock|block)[1-9]")


def observe(forward: Callable, images: Tensor, on: str) -> tuple[Tensor, list[Tensor]]:
    """The logits (B, classes), and what is compared.

    Args:
        forward: the network, or its compiled forward pass, which has it as `net`. What is listened to runs uncompiled: torch.compile
            does not see listeners that come after it.
        on: "logits"; "feature": [the input (B, width) of the last linear layer]; "stages": [the output (B, width, H, W) of each].

    Raises:
        UserError: the network has no such thing.
    """
    if on == "logits":
        logits = forward(images)
        return logits, [logits]
    net = forward if isinstance(forward, nn.Module) else forward.net
    if "return_features" in inspect.signature(net.forward).parameters:
        logits, features, stages = forward(images, return_features=True)
        return logits, [features] if on == "feature" else list(stages)
    heard: list[Tensor] = []
    if on == "feature":
        hooks = [last_linear(net).register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))]
    else:
        stages = [module for name, module in net.named_modules() if STAGE.fullmatch(name)]
        hooks = [stage.register_forward_hook(lambda module, inputs, output: heard.append(output)) for stage in stages]
    try:
        logits = net(images)
    finally:
        for hook in hooks:
            hook.remove()
    if len(heard) != len(hooks) or not heard or any(x.dim() != (2 if on == "feature" else 4) for x in heard):
        raise UserError(
            f"--kd_on {on}: {type(net).__name__} has no {'features' if on == 'feature' else 'stages'} that are known here; use --kd_on logits"
        )
    return logits, heard


def last_linear(net: nn.Module) -> nn.Linear:
    """A network's last linear layer, its classifier."""
    linears = [module for module in net.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise UserError(
            f"{type(net).__name__} has no linear layer; use --kd_on logits, and leave out --share_classifier"
        )
    return linears[-1]
