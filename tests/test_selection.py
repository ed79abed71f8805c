"""Why the papers' iteration selects at initialisation: what gradient a removed filter gets."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from AHSG_HT import AHSG_HT
from utils.small.filters import filter_additives

EPS = 1e-5


class Block(nn.Module):
    """A convolution with BatchNorm, followed by ReLU, or by an addition that makes the sum positive, then by ReLU."""

    def __init__(self, added: bool):
        super().__init__()
        self.conv, self.norm, self.added = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=EPS), added
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.head(F.relu(y + 10 if self.added else y).mean((2, 3)))


@pytest.mark.parametrize("added", [False, True], ids=["ReLU", "open stream"])
def test_gradient_of_a_removed_filter(added):
    """Exactly 0 where ReLU closes on 0; else 1/sqrt(eps) = 316 times that of a filter whose output has variance 1."""
    torch.manual_seed(0)
    net, x = Block(added).double(), torch.randn(64, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        net.conv.weight.div_(net.conv(x).std((0, 2, 3)).view(-1, 1, 1, 1))
        net.conv.weight[:4], net.norm.bias[:4] = 0, 0
    F.cross_entropy(net(x), torch.arange(64) % 4).backward()
    removed, live = net.conv.weight.grad.flatten(1).norm(dim=1).view(2, 4).unbind()
    if not added:
        assert removed.eq(0).all() and net.norm.bias.grad[:4].eq(0).all() and live.gt(0).all()
        return
    # Without ReLU the gradient at a filter's output differs from filter to filter only through the head.
    scale = net.head.weight.detach().norm(dim=0).view(2, 4)
    ratio = (removed / scale[0]).mean() / (live / scale[1]).mean()
    assert 0.5 * EPS**-0.5 < ratio < 3 * EPS**-0.5


def test_filters_before_relu_are_chosen_in_the_first_step():
    torch.manual_seed(0)
    net = models.build("resnet8")
    x, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    optimizer = AHSG_HT(net.parameters(), lr=0.1, v=0.1, HTrate=0.7, additives=filter_additives(net, x))
    first = []
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()
        kept = [p.flatten(1).any(1) for name, p in net.named_parameters() if "conv_a" in name]
        first = first or kept
        assert all(map(torch.equal, kept, first))
