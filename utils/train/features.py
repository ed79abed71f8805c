"""Features and stage outputs of any network, for distillation.

The project's networks return them themselves: `net(images, return_features=True)` is (logits, features, stages).
`with_features` gives any other network this signature.
"""

import inspect
import re

from torch import Tensor, nn

# Stages by the names that torchvision's ResNets, ResNeXts, DenseNets and RegNets give them.
STAGE = re.compile(r"(\w+\.)?(layer|denseblock|block)[1-9]")


class WithFeatures(nn.Module):
    """A network whose features and stage outputs are captured with forward hooks.

    The hooks are registered once and stay, so that torch.compile of this module includes them; in other forward passes
    of the network they do nothing. Features are the input of the linear layer that runs last; stages are found by their
    names (STAGE).
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.captures = net, False
        self.features: list[Tensor] = []
        self.stages: list[Tensor] = []

        # Functions, not methods: copy.deepcopy of the network would copy a method's object too.
        def capture_features(module, inputs):
            if self.captures:
                self.features = [inputs[0]]

        def capture_stage(module, inputs, output):
            if self.captures:
                self.stages.append(output)

        for name, module in net.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(capture_features)
            if STAGE.fullmatch(name):
                module.register_forward_hook(capture_stage)

    def forward(self, images: Tensor, return_features: bool = False):
        """Logits; with return_features (logits, features (B, width) or None, stage outputs [(B, width, H, W), ...])."""
        if not return_features:
            return self.net(images)
        self.captures, self.features, self.stages = True, [], []
        logits = self.net(images)
        features, stages = self.features, self.stages
        self.captures, self.features, self.stages = False, [], []
        return logits, features[0] if features else None, stages


def with_features(net: nn.Module) -> nn.Module:
    """The network itself where it takes return_features, else a WithFeatures around it."""
    return net if "return_features" in inspect.signature(net.forward).parameters else WithFeatures(net)
