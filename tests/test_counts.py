"""Counts against sums by hand."""

import pytest
import torch
from torch import nn

import models
from utils.small.counts import count, multiply_adds


@pytest.mark.parametrize("depth", [20, 56])
def test_counts_of_a_network_are_those_by_hand_and_of_one_image(depth):
    net = models.build(f"resnet{depth}")
    found = count(net, torch.zeros(5, 3, 32, 32))
    blocks, unit = (depth - 2) // 6, 9 * 16 * 16 * 32 * 32
    assert found.multiply_adds == 9 * 3 * 16 * 32 * 32 + (6 * blocks - 1) * unit + 640
    assert found.parameters == sum(p.numel() for p in net.parameters())


TWICE = nn.Linear(4, 4)


@pytest.mark.parametrize(
    "layer, shape, expected",
    [
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 5, 5), 3 * 8 * 9 * 25),
        (nn.Conv2d(4, 8, 3, stride=2, groups=4), (1, 4, 5, 5), 8 * 9 * 4),
        (nn.Linear(6, 7), (1, 6), 42),
        (nn.ConvTranspose2d(4, 5, 2, stride=2), (1, 4, 3, 3), 4 * 5 * 4 * 9),
        (nn.BatchNorm2d(4), (1, 4, 3, 3), 0),
        (nn.Sequential(TWICE, TWICE), (1, 4), 32),
    ],
)
def test_multiply_adds_of_one_layer(layer, shape, expected):
    assert multiply_adds(nn.Sequential(layer), torch.zeros(shape)) == expected
