"""VGG for 32x32 images (Simonyan, Zisserman, ICLR 2015), with and without BatchNorm.

The convolutions of configurations A, B, D and E with biases, five max-poolings down to 1x1, and a head
512-512-512-classes with ReLU and dropout 0.5. Names: features.N, classifier.{0,3,6}.
"""

import torch
from torch import Tensor, nn

from models.initialise import initialise

# Output channels of the convolutions, stage by stage; every stage ends in a 2x2 max-pooling.
STAGES = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    19: ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512, 512, 512, 512)),
}


class CifarVGG(nn.Module):
    """VGG-`depth` (11, 13, 16 or 19 layers): images (B, 3, 32, 32) to logits (B, num_classes).

    batch_norm: a BatchNorm after every convolution.
    """

    def __init__(self, depth: int, num_classes: int = 10, batch_norm: bool = False):
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"depth must be one of {tuple(STAGES)}, got {depth}")
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        self._stage_ends = []
        in_channels = 3
        for stage in STAGES[depth]:
            for channels in stage:
                layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(channels))
                layers.append(nn.ReLU(inplace=True))
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
            self._stage_ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        hidden = [m for _ in range(2) for m in (nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Dropout(0.5))]
        self.classifier = nn.Sequential(*hidden, nn.Linear(512, num_classes))
        initialise(self)

    def forward(self, x: Tensor, return_features: bool = False):
        """Logits; with return_features (logits, features (B, 512) after pooling, [outputs of the five stages])."""
        stages = []
        # Not start=1, which torch.compile of 2.4 does not follow.
        for number, layer in enumerate(self.features, 1):
            x = layer(x)
            if number in self._stage_ends:
                stages.append(x)
        features = torch.flatten(x, 1)
        logits = self.classifier(features)
        # "is True": a tracer's stand-in for the argument is not True, so torch.fx traces the plain network.
        return (logits, features, stages) if return_features is True else logits
