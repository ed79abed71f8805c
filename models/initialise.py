"""The initial weights of a network: those of the release and of soft filter pruning."""

import math

from torch import nn


def initialise(net: nn.Module) -> nn.Module:
    """Draws new weights in place and returns the network.

    Convolutions N(0, sqrt(2/(kh*kw*C_out))) (He et al., "Delving Deep into Rectifiers", ICCV 2015, by fan-out), linear
    layers Kaiming-normal, biases 0, BatchNorm 1 and 0 with fresh running statistics.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_parameters()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return net
