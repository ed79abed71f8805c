"""Counts against figures of the papers and against sums by hand; latency's report."""

import pytest
import torch
from torch import nn

import models
from utils.small.counts import count, multiply_adds, papers_cut, peak_activation_bytes


@pytest.mark.parametrize(
    "HTrate, cuts", [(0.7, {20: 42.2, 32: 41.5, 56: 41.1, 110: 40.8}), (0.6, {20: 54.0, 32: 53.2, 56: 52.6, 110: 52.3})]
)
def test_papers_formula(HTrate, cuts):
    for depth, cut in cuts.items():
        assert round(100 * papers_cut(depth, HTrate), 1) == cut


def test_formula_starts_from_the_real_network():
    for depth in (20, 56):
        real = count(models.build(f"resnet{depth}"), torch.zeros(1, 3, 32, 32)).multiply_adds
        blocks = (depth - 2) // 6
        unit = 9 * 16 * 16 * 32 * 32
        assert real == 9 * 3 * 16 * 32 * 32 + (6 * blocks - 1) * unit + 640
        assert papers_cut(depth, 1) == 0


@pytest.mark.parametrize(
    "layer, shape, expected",
    [
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 5, 5), 3 * 8 * 9 * 25),
        (nn.Conv2d(4, 8, 3, stride=2, groups=4), (1, 4, 5, 5), 8 * 9 * 4),
        (nn.Linear(6, 7), (1, 6), 42),
        (nn.ConvTranspose2d(4, 5, 2, stride=2), (1, 4, 3, 3), 4 * 5 * 4 * 9),
        (nn.BatchNorm2d(4), (1, 4, 3, 3), 0),
    ],
)
def test_multiply_adds_of_one_layer(layer, shape, expected):
    assert sum(multiply_adds(nn.Sequential(layer), torch.zeros(shape)).values()) == expected


def test_batch_does_not_count():
    net = models.build("vgg11_bn")
    one, five = count(net, torch.zeros(1, 3, 32, 32)), count(net, torch.zeros(5, 3, 32, 32))
    assert one == five and one.parameters == sum(p.numel() for p in net.parameters())


def test_a_layer_called_twice_counts_twice():
    layer = nn.Linear(4, 4)
    assert multiply_adds(nn.Sequential(layer, layer), torch.zeros(1, 4)) == {"0": 32}


def test_peak_activation_memory():
    # Input 4 floats and output 6 live together; then 6 and 2. In-place ReLU and flatten take nothing.
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6, 2))
    assert peak_activation_bytes(net, torch.zeros(1, 4)) == 4 * 10


def test_peak_counts_what_a_shortcut_holds():
    net = models.build("resnet20").eval()
    # A block's input, and what one of its convolutions reads and makes: three tensors of 16x32x32.
    assert peak_activation_bytes(net, torch.zeros(1, 3, 32, 32)) == 3 * 16 * 32 * 32 * 4
