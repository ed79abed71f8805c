"""Random small networks of operations with rules, with random zeroed filters; and what of them is needed, measured."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet_cifar import OptionA

SIZE = 12


class RandomNet(nn.Module):
    """A chain of blocks, a head, and a label per channel of all that a convolution or linear layer reads or makes.

    Channels that are added have the same label, written down while the network is built, independently of the analysis
    under test. With `leaky` no activation makes zeros of anything but zeros, so that what is zero in a few hundred
    images is zero in all. `links` holds (label before, label after) of every channel that passes an option-A shortcut.
    """

    def __init__(self, seed: int, leaky: bool = False):
        super().__init__()
        self.leaky = leaky
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList()
        self.kinds: list[str] = []
        self.reads: dict[nn.Module, list[int]] = {}
        self.makes: dict[nn.Module, list[int]] = {}
        self.links: list[tuple[int, int]] = []
        self.labels_used = 0
        labels = self.fresh(3)
        self.input_labels = set(labels)
        size, labels = SIZE, self.add("plain", labels)
        for _ in range(self.rng.randint(2, 5)):
            kinds = ["plain", "residual", "depthwise", "cat", "gate"]
            kinds += ["option_a", "option_a", "downsample", "max", "average"] if size % 2 == 0 else []
            kind = self.rng.choice(kinds)
            labels = self.add(kind, labels)
            size //= 2 if kind in ("option_a", "downsample", "max", "average") else 1
        self.flat = self.rng.random() < 0.4
        features = [label for label in labels for _ in range(size * size)] if self.flat else labels
        self.hidden = self.linear(features, self.fresh(self.rng.randint(2, 6))) if self.rng.random() < 0.5 else None
        last = self.makes[self.hidden] if self.hidden else features
        self.head = self.linear(last, self.fresh(3))

    def fresh(self, n: int) -> list[int]:
        self.labels_used += n
        return list(range(self.labels_used - n, self.labels_used))

    def conv(self, read: list[int], make: list[int], kernel=3, stride=1, groups=1) -> nn.Conv2d:
        bias = self.rng.random() < 0.3
        layer = nn.Conv2d(len(read), len(make), kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.makes[layer] = make
        if groups == 1:
            self.reads[layer] = read
        return layer

    def linear(self, read: list[int], make: list[int]) -> nn.Linear:
        layer = nn.Linear(len(read), len(make))
        self.reads[layer], self.makes[layer] = read, make
        return layer

    def act(self) -> nn.Module:
        kinds = [nn.ReLU(inplace=True), nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1), nn.Hardswish()]
        return nn.LeakyReLU(0.1) if self.leaky else self.rng.choice(kinds)

    def add(self, kind: str, labels: list[int]) -> list[int]:
        """Appends a block; returns the labels of its result."""
        n, width = len(labels), self.rng.randint(2, 8)
        block = nn.ModuleDict()
        if kind in ("max", "average"):
            made = labels
        elif kind in ("plain", "cat"):
            made = self.fresh(width)
            block["conv"] = self.conv(labels, made, self.rng.choice([1, 3]))
            block["bn"], block["act"] = nn.BatchNorm2d(width), self.act()
            made = labels + made if kind == "cat" else made
        elif kind == "depthwise":
            made = labels
            block["conv"], block["bn"] = self.conv(labels, labels, groups=n), nn.BatchNorm2d(n)
        elif kind == "gate":
            inner, made = self.fresh(2), labels
            block["conv_a"], block["conv_b"] = self.conv(labels, inner, 1), self.conv(inner, labels, 1)
        else:
            stride = 2 if kind in ("option_a", "downsample") else 1
            inner, made = self.fresh(width), labels
            if kind == "option_a":
                new = self.rng.randint(0, 4)
                made = self.fresh(n + new)
                self.links += zip(labels, made, strict=False)
                block["shortcut"] = OptionA(new)
            elif kind == "downsample":
                made = self.fresh(self.rng.randint(2, 8))
                block["shortcut"], block["bn_s"] = self.conv(labels, made, 1, 2), nn.BatchNorm2d(len(made))
            block["conv_a"], block["bn_a"] = self.conv(labels, inner, 3, stride), nn.BatchNorm2d(width)
            block["conv_b"], block["bn_b"] = self.conv(inner, made), nn.BatchNorm2d(len(made))
            block["act"] = self.act()
        self.blocks.append(block)
        self.kinds.append(kind)
        return made

    def forward(self, x: Tensor) -> Tensor:
        relu = F.leaky_relu if self.leaky else F.relu
        for kind, b in zip(self.kinds, self.blocks, strict=True):
            if kind in ("plain", "cat"):
                y = b["act"](b["bn"](b["conv"](x)))
                x = torch.cat([x, y], dim=1) if kind == "cat" else y
            elif kind == "depthwise":
                x = relu(b["bn"](b["conv"](x)))
            elif kind == "max":
                x = F.max_pool2d(x, 2)
            elif kind == "average":
                x = F.avg_pool2d(x, 2)
            elif kind == "gate":
                x = x * torch.sigmoid(b["conv_b"](relu(b["conv_a"](x.mean((2, 3), keepdim=True)))))
            else:
                y = relu(b["bn_a"](b["conv_a"](x)))
                short = b["shortcut"](x) if "shortcut" in b else x
                x = b["act"](b["bn_b"](b["conv_b"](y)) + (b["bn_s"](short) if "bn_s" in b else short))
        x = x.flatten(1) if self.flat else F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)
        return self.head(relu(self.hidden(x)) if self.hidden else x)


@torch.no_grad()
def zero_filters(net: RandomNet, *, constants: bool) -> None:
    """Random weights and statistics, then random filters zeroed, those of one label mostly together.

    Args:
        constants: leave some additive parameters and running means of zeroed filters, so that their channels are
            constants other than 0.
    """
    rng, norms, previous = net.rng, {}, None
    dead = {label for label in range(net.labels_used) if rng.random() < 0.45}
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.running_var):
                value.uniform_(0.5, 1.5)
            for value in (module.bias, module.running_mean):
                value.normal_(0, 0.3)
            if previous is not None and module.num_features == previous.out_channels:
                norms[previous] = module
        previous = module if isinstance(module, nn.Conv2d) else None
    for module, labels in net.makes.items():
        if module is net.head:
            continue
        for i, label in enumerate(labels):
            if (label in dead) == (rng.random() < 0.1):
                continue
            module.weight[i] = 0
            keep_bias, keep_mean = (constants and rng.random() < 0.4 for _ in range(2))
            if module.bias is not None and not keep_bias:
                module.bias[i] = 0
            if module in norms:
                norms[module].bias[i] *= keep_bias
                norms[module].running_mean[i] *= keep_mean


@torch.no_grad()
def needed_labels(net: RandomNet, images: Tensor) -> set[int] | None:
    """Labels of which a needed layer reads something other than zero in `images`, and those linked to them.

    None where a layer reads a constant other than zero: which of those can be removed is another question.
    """
    seen: dict[nn.Module, Tensor] = {}

    def keep(module, inputs):
        seen[module] = inputs[0].transpose(0, 1).flatten(1)

    hooks = [module.register_forward_pre_hook(keep) for module in net.reads]
    net.eval()(images)
    for hook in hooks:
        hook.remove()
    if any(((x == x[:, :1]).all(dim=1) & (x[:, 0] != 0)).any() for x in seen.values()):
        return None
    needed = net.input_labels | set(net.makes[net.head])
    while True:
        before = len(needed)
        for module, labels in net.reads.items():
            rows = torch.tensor([label in needed for label in net.makes[module]])
            read = (module.weight[rows] != 0).transpose(0, 1).flatten(1).any(dim=1) & (seen[module] != 0).any(dim=1)
            needed.update(label for label, r in zip(labels, read.tolist(), strict=True) if r)
        needed.update(after for first, after in net.links if first in needed)
        if len(needed) == before:
            return needed
