"""What belongs to a filter, found in a network's structure; the plan, from the optimizer's groups."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from AHSG_HT import AHSG_HT
from utils.base.errors import UserError
from utils.small.filters import (
    check_plan,
    count_zero_filters,
    filter_additives,
    format_plan,
    kept_filters,
    logits_layer,
    plan_convolutions,
)


def conv(width=8, bias=False):
    return nn.Conv2d(width, 8, 1, bias=bias)


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = conv(3), conv(), conv(bias=True)
        self.bn1, self.bn2, self.last = (nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return F.relu(self.last(x + y)).mean((2, 3))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(3, bias=True), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y * 2 if float(y.sum()) > 0 else y


class Reused(nn.Sequential):
    def forward(self, x):
        return self[2](self[2](self[1](self[0](x))))


NETWORKS = {
    "BN-ReLU": (nn.Sequential(conv(3), nn.BatchNorm2d(8), nn.ReLU()), {"0": ["1.bias"]}),
    "bias-BN": (nn.Sequential(conv(3, True), nn.BatchNorm2d(8)), {"0": ["0.bias", "1.bias"]}),
    "BN-PReLU": (nn.Sequential(conv(3), nn.BatchNorm2d(8), nn.PReLU(8)), {"0": ["1.bias"]}),
    "PReLU": (nn.Sequential(conv(3, True), nn.PReLU(8), conv(), nn.PReLU(8)), {"0": ["0.bias"]}),
    "ReLU-BN": (nn.Sequential(conv(3), nn.ReLU(), nn.BatchNorm2d(8)), {"0": ["2.bias"]}),
    "pre-activation": (PreActivation(), {"conv1": ["bn2.bias"], "conv2": ["conv2.bias"]}),
    "untraceable": (nn.Sequential(Untraceable(), nn.BatchNorm2d(8)), {"0.conv": ["0.conv.bias"]}),
    "reused norm": (Reused(conv(3), nn.Identity(), nn.BatchNorm2d(8)), {}),
}


def by_name(net, example):
    names = {p: name for name, p in net.named_parameters()}
    found = filter_additives(net, example)
    return {names[w].removesuffix(".weight"): [names[a] for a in own] for w, own in found.items()}


@pytest.mark.parametrize("net, expected", NETWORKS.values(), ids=NETWORKS)
def test_additives_are_found_by_structure(net, expected):
    assert by_name(net.train(), torch.randn(2, 3, 4, 4)) == expected
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("arch", ["resnet20", "vgg11", "vgg11_bn", "resnet18", "resnet50"])
def test_structure_and_order_agree_on_plain_networks(arch):
    net = models.build(arch) if arch in models.REGISTRY else models.build_torchvision(arch, 10)
    params, others = ([p.detach() + 1 for p in net.parameters()] for _ in range(2))
    place = {p: i for i, p in enumerate(net.parameters())}
    found = filter_additives(net, torch.zeros(2, 3, 32, 32))
    additives = {others[place[w]]: [others[place[a]] for a in own] for w, own in found.items()}
    for tensors, options in ((params, {}), (others, dict(additives=additives))):
        for p in tensors:
            p.grad = torch.zeros_like(p)
        AHSG_HT(tensors, lr=0.1, HTrate=0.7, **options).step()
    assert all(map(torch.equal, params, others))


@pytest.mark.parametrize("arch, owners", [("densenet121", 59), ("swin_t", 1)])
def test_densenet_and_swin_are_refused_by_order_and_right_by_structure(arch, owners):
    net = models.build_torchvision(arch, 10)
    with pytest.raises(ValueError, match="additives="):
        AHSG_HT(net.parameters(), HTrate=0.7)
    found = by_name(net, torch.zeros(2, 3, 32, 32))
    assert len(found) == owners
    for name, own in found.items():
        # A dense layer's second norm reads its first convolution alone; other norms read concatenations.
        norm = name.replace("conv1", "norm2").replace("conv0", "norm0") + ".bias"
        assert own == [norm], name


def test_a_network_that_does_not_take_the_example_is_refused():
    with pytest.raises(UserError, match=r"\(2, 5, 4, 4\)"):
        filter_additives(conv(3), torch.zeros(2, 5, 4, 4))


def test_the_plan_follows_the_optimizers_groups():
    net = models.build("resnet8")
    stem, first, second, _, frozen, *rest = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    frozen.weight.requires_grad_(False)
    groups = [
        {"params": [stem.weight]},
        {"params": [first.weight], "HTrate": 0.25},
        {"params": [second.weight], "unit": "element"},
        {"params": [m.weight for m in (frozen, *rest)], "HTrate": 0.5},
    ]
    plan = plan_convolutions(net, AHSG_HT(groups, HTrate=0.7))
    assert [layer.kept for layer in plan] == [11, 4, 16, 32, 32, 32, 32]
    assert "7 convolutions, 240 filters: 159 kept, 81 removed" in format_plan(plan)
    with pytest.raises(UserError, match=r"conv_1_3x3\.weight has 16 filters.*plan keeps 11"):
        check_plan(plan, kept_filters(net))
    stem.weight.data[[2, 5]] = 0
    net.bn_1.bias.data[5] = 0.1  # a filter is zero only with what belongs to it
    kept = kept_filters(net, {stem.weight: [net.bn_1.bias]})
    assert count_zero_filters(plan, kept).startswith("1 of 16 (1 convolution), 0 of 16 (2 convolutions)")
    assert all(layer.removed == 0 for layer in plan_convolutions(net, torch.optim.SGD(net.parameters(), lr=0.1)))


class HeadAsFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.rows = nn.Conv2d(3, 6, 3), nn.Parameter(torch.randn(4, 6))

    def forward(self, images):
        return F.linear(self.conv(images).mean((2, 3)), self.rows)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)), 3),
        (HeadAsFunction(), None),
    ],
)
def test_the_layer_of_the_logits(net, expected):
    found = logits_layer(net, torch.zeros(2, 3, 8, 8))
    assert found is (None if expected is None else net[expected]) and net.training
