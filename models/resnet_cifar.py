"""ResNet for 32x32 images (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2).

Three stages of basic blocks with 16, 32 and 64 channels and parameter-free shortcuts (option A: subsample, then append
zero channels). State-dict names are those of soft filter pruning and of AHSG-HT's release: their checkpoints load.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.initialise import initialise

STAGE_WIDTHS = (16, 32, 64)


class OptionA(nn.Module):
    """The parameter-free shortcut between stages: every second pixel, zeros in the new channels."""

    def __init__(self, new_channels: int):
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        # A pooling window of one pixel takes every second pixel too, and unlike x[:, :, ::2, ::2] its gradient is
        # channels_last where x is: one contiguous gradient made the ReLU before it ten times slower on a CPU.
        return F.pad(F.avg_pool2d(x, 1, 2), (0, 0, 0, 0, 0, self.new_channels))


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv_a = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn_a = nn.BatchNorm2d(channels)
        self.conv_b = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn_b = nn.BatchNorm2d(channels)
        self.shortcut = OptionA(channels - in_channels) if stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn_a(self.conv_a(x)), inplace=True)
        y = self.bn_b(self.conv_b(y))
        return F.relu(y + self.shortcut(x), inplace=True)


class CifarResNet(nn.Module):
    """ResNet-`depth` for 32x32 images.

    Args:
        depth: 6n + 2 layers, n blocks per stage.
        num_classes: width of the output.
        head_width: None for one linear layer `classifier`; a number for the head of the released checkpoint, two linear
            layers `classifier1` (64 -> head_width) and `classifier2` with no activation between them.

    Shapes: images (B, 3, H, W) to logits (B, num_classes); H = W = 32 in the papers.
    """

    def __init__(self, depth: int, num_classes: int = 10, head_width: int | None = None):
        super().__init__()
        if depth < 8 or (depth - 2) % 6 != 0:
            raise ValueError(f"depth must be 6n + 2 with n >= 1 (20, 32, 44, 56, 110), got {depth}")
        blocks = (depth - 2) // 6
        self.num_classes = num_classes
        self.conv_1_3x3 = nn.Conv2d(3, STAGE_WIDTHS[0], 3, 1, 1, bias=False)
        self.bn_1 = nn.BatchNorm2d(STAGE_WIDTHS[0])
        self.stage_1 = _stage(STAGE_WIDTHS[0], STAGE_WIDTHS[0], blocks, 1)
        self.stage_2 = _stage(STAGE_WIDTHS[0], STAGE_WIDTHS[1], blocks, 2)
        self.stage_3 = _stage(STAGE_WIDTHS[1], STAGE_WIDTHS[2], blocks, 2)
        if head_width is None:
            self.classifier = nn.Linear(STAGE_WIDTHS[2], num_classes)
        else:
            self.classifier1 = nn.Linear(STAGE_WIDTHS[2], head_width)
            self.classifier2 = nn.Linear(head_width, num_classes)
        self._two_layers = head_width is not None
        initialise(self)

    @staticmethod
    def options_of(state_dict: dict[str, Tensor]) -> dict:
        """The options, beside depth and num_classes, of the network that these weights are of."""
        hidden = state_dict.get("classifier1.weight")
        return {"head_width": len(hidden)} if hidden is not None and hidden.dim() else {}

    def forward(self, x: Tensor, return_features: bool = False):
        """Logits; with return_features (logits, features (B, 64) after pooling, [stage outputs (B, C, H, W)])."""
        stages = [F.relu(self.bn_1(self.conv_1_3x3(x)), inplace=True)]
        for stage in (self.stage_1, self.stage_2, self.stage_3):
            stages.append(stage(stages[-1]))
        features = torch.flatten(F.adaptive_avg_pool2d(stages[-1], 1), 1)
        logits = self.classifier2(self.classifier1(features)) if self._two_layers else self.classifier(features)
        # "is True": a tracer's stand-in for the argument is not True, so torch.fx traces the plain network.
        return (logits, features, stages[1:]) if return_features is True else logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))
