"""What gradual pruning may remove, how much of each layer, and what is left costs; beside naive searches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from models.resnet_cifar import CifarResNet
from utils.base.errors import UserError
from utils.base.torchvision_import import import_torchvision
from utils.prune.allocation import floors, rate_for, remove_to, remove_where_cheap, uniform
from utils.prune.gradual import GradualPruning
from utils.prune.plan import make_plan
from utils.small.counts import multiply_adds

NETWORKS = {
    "resnet8": (lambda: CifarResNet(8), 32),
    "vgg11_bn": (lambda: models.build("vgg11_bn"), 32),
    "resnet18": (lambda: import_torchvision().models.resnet18(num_classes=10), 64),
    "mobilenet_v2": (lambda: import_torchvision().models.mobilenet_v2(num_classes=10), 64),
}


def example(size=32):
    return torch.zeros(1, 3, size, size)


def optimizer_of(net):
    # Not the project's: nothing here takes a step.
    return torch.optim.SGD(net.parameters(), lr=0.1)


def at_once(net, size=32, **options):
    """Removes everything before the first step and cuts it out. Returns the pruning."""
    torch.manual_seed(0)
    pruning = GradualPruning(net, optimizer_of(net), example(size), steps=10, begin=0, end=0, **options)
    assert "filters removed" in pruning.before_step(0) and pruning.before_step(1) is None
    assert "network cut" in pruning.cut(0) and pruning.cut(1) is None
    return pruning


def widths(net):
    return {name: m.out_channels for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}


def filters(plan, convolution, kept):
    """What a convolution has left."""
    return sum(int(kept[group]) for group in plan.group_of[convolution.unit].unique())


def test_batchnorm_over_all_processes_is_planned_as_any_other():
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(CifarResNet(8))
    plans = [make_plan(net, example(), tied=True) for net in (CifarResNet(8), synced)]
    names, norms = ([[getattr(c, what) for c in plan.convolutions] for plan in plans] for what in ("name", "norm"))
    assert names[0] == names[1] and norms[0] == norms[1] and None not in norms[0]
    assert all(torch.equal(a, b) for a, b in zip(*(plan.groups for plan in plans), strict=True))


# -- widths by hand --


@pytest.mark.parametrize(
    "rate, round_to, stages",
    [
        (0.7, 1, (11, 22, 44)),
        (0.5, 1, (8, 16, 32)),
        (0.6, 1, (9, 19, 38)),
        (0.7, 8, (8, 24, 48)),
        (0.01, 1, (1, 1, 1)),
    ],
)
def test_resnet20_widths_of_streams_and_first_convolutions(rate, round_to, stages):
    net = models.build("resnet20")
    plan = make_plan(net, example(), tied=True)
    kept = uniform(plan, rate, round_to)
    expected = {name: stages[(16, 32, 64).index(width)] for name, width in widths(net).items()}
    assert {c.name: filters(plan, c, kept) for c in plan.convolutions} == expected


@pytest.mark.parametrize("tied", [True, False])
def test_resnet20_is_cut_to_its_widths(tied):
    """Untied, the convolutions that add to a stream keep their zero filters: other blocks use these channels."""
    torch.manual_seed(0)
    net = models.build("resnet20")
    pruning = at_once(net, HTrate=0.7, tied=tied)
    small = {16: 11, 32: 22, 64: 44}
    for name, width in widths(models.build("resnet20")).items():
        in_stream = not name.endswith("conv_a")
        assert widths(net)[name] == (width if in_stream and not tied else small[width]), name
        zero = net.get_submodule(name).weight.flatten(1).eq(0).all(dim=1).sum()
        assert int(zero) == (width - small[width] if in_stream and not tied else 0), name
    assert net.classifier.in_features == (44 if tied else 64)
    assert [s[0].shortcut.new_channels for s in (net.stage_2, net.stage_3)] == ([11, 22] if tied else [16, 32])
    kept = pruning.present_filters
    if tied:
        # A stage's kept channels are the first of the next one's.
        last = [kept[f"stage_{s}.2.conv_b.weight"] for s in (1, 2, 3)]
        assert last[0] == kept["conv_1_3x3.weight"] == last[1][:11] and last[1] == last[2][:22]


# -- costs --


def costs(net, size):
    """(multiply-adds, parameters), by running it."""
    return multiply_adds(net, example(size)), sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet8", {"macs_cut": 0.6, "allocation": "global", "score": "gamma"}),
        ("resnet8", {"HTrate": 0.7, "allocation": "global", "round_to": 4}),
        ("resnet8", {"HTrate": 0.5, "tied": False}),
        ("vgg11_bn", {"macs_cut": 0.5, "round_to": 8}),
        ("vgg11_bn", {"HTrate": 0.5, "tied": False}),
        ("resnet18", {"macs_cut": 0.5, "allocation": "global"}),
        ("mobilenet_v2", {"HTrate": 0.6}),
        ("mobilenet_v2", {"HTrate": 0.5, "tied": False}),
    ],
)
def test_counts_from_widths_are_those_of_the_cut_network(name, options):
    make, size = NETWORKS[name]
    net = make()
    before = costs(net, size)
    pruning = at_once(net, size, **options)
    plan, after = pruning.plan, costs(net, size)
    for kept, expected in ((plan.full, before), (plan.count(pruning.alive), after)):
        assert (plan.multiply_adds(kept), plan.parameters(kept)) == expected
    if "macs_cut" in options:
        assert after[0] <= (1 - options["macs_cut"]) * before[0]
    if "round_to" in options:
        removed = [c.name for c in plan.convolutions if len(c.made) != widths(net)[c.name]]
        assert removed and all(widths(net)[name] % options["round_to"] == 0 for name in removed)


@pytest.mark.parametrize("cut, round_to", [(0.3, 1), (0.9, 1), (0.5, 8)])
def test_rate_reaches_the_cut_and_no_larger_one_does(cut, round_to):
    plan = make_plan(CifarResNet(8), example(), tied=True)
    macs = [plan.multiply_adds(uniform(plan, r / 64, round_to)) for r in range(1, 65)]
    goal = (1 - cut) * macs[-1]
    assert plan.multiply_adds(uniform(plan, rate_for(plan, cut, round_to), round_to)) == max(
        m for m in macs if m <= goal
    )


# -- global allocation against a naive one --


class Tiny(nn.Module):
    """Two blocks on a stream of 6 channels, and a convolution that reads what it adds to."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 5, padding=2), nn.Linear(6, 2)
        self.first = nn.ModuleList([nn.Conv2d(6, n, 3, padding=1) for n in (5, 12)])
        self.second = nn.ModuleList([nn.Conv2d(n, 6, 1) for n in (5, 12)])

    def forward(self, x):
        x = F.relu(self.stem(x))
        for first, second in zip(self.first, self.second, strict=True):
            x = F.relu(x + second(F.relu(first(x))))
        return self.head((x + self.mix(x)).mean((2, 3)))


def naive_multiply_adds(stream, inner, size=8):
    return size**2 * (27 * stream + 25 * stream**2 + sum(10 * stream * n for n in inner)) + 2 * stream


def naive_greedy(parts, scores, goal):
    """The units left of the stream and of both inner layers: the cheapest one is removed until the goal is met."""
    alive = [list(part) for part in parts]
    while naive_multiply_adds(len(alive[0]), [len(part) for part in alive[1:]]) > goal:
        tried = []
        for i, part in enumerate(alive):
            if len(part) - 1 >= 0.1 * len(parts[i]):
                less = [len(p) - (p is part) for p in alive]
                now = naive_multiply_adds(len(alive[0]), [len(p) for p in alive[1:]])
                saved = now - naive_multiply_adds(less[0], less[1:])
                tried += [(float(scores[unit]) / saved, i, unit) for unit in part]
        _, i, unit = min(tried)
        alive[i].remove(unit)
    return alive


@pytest.mark.parametrize("cut", [0.1, 0.4, 0.75])
def test_global_allocation_is_the_naive_greedy_one(cut):
    net = Tiny()
    plan = make_plan(net, example(8), tied=True)
    layers = {c.name: c for c in plan.convolutions}
    parts = [layers[name].made.tolist() for name in ("stem", "first.0", "first.1")]
    goal = (1 - cut) * naive_multiply_adds(6, (5, 12))
    assert plan.multiply_adds(plan.full) == naive_multiply_adds(6, (5, 12)) == costs(net, 8)[0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.rand(len(plan.removable), dtype=torch.float64, generator=generator)
        found = remove_where_cheap(plan, torch.ones_like(plan.removable), scores, goal)
        assert [[unit for unit in part if found[unit]] for part in parts] == naive_greedy(parts, scores, goal)
        assert plan.multiply_adds(plan.count(found)) <= goal


def test_weakest_go_first_and_of_equal_ones_the_last():
    plan = make_plan(Tiny(), example(8), tied=True)
    stem = next(c for c in plan.convolutions if c.name == "stem").made
    scores = torch.zeros(len(plan.removable), dtype=torch.float64)
    scores[stem] = torch.tensor([1.0, 0.5, 2.0, 0.5, 0.5, 3.0], dtype=torch.float64)
    kept = plan.full.clone()
    kept[plan.group_of[stem[0]]] = 4
    assert remove_to(plan, torch.ones_like(plan.removable), scores, kept)[stem].tolist() == [1, 1, 1, 0, 0, 1]


def test_no_layer_falls_below_a_tenth():
    plan = make_plan(CifarResNet(8), example(), tied=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        scores = torch.rand(len(plan.removable), dtype=torch.float64, generator=generator) ** 8
        kept = plan.count(remove_where_cheap(plan, torch.ones_like(plan.removable), scores, goal=0))
        assert torch.equal(kept, floors(plan))
        assert all(filters(plan, c, kept) >= 0.1 * len(c.made) for c in plan.convolutions)


# -- what stays --


class Kept(nn.Module):
    """Groups, an operation without a rule, zeros that a sigmoid makes one half of, and one convolution that may go."""

    def __init__(self):
        super().__init__()
        sizes = {"grouped": (3, 6, 3), "normed": (6, 6, 1), "behind": (6, 6, 1), "free": (6, 6, 1), "out": (6, 6, 1)}
        for name, (read, made, groups) in sizes.items():
            setattr(self, name, nn.Conv2d(read, made, 3, padding=1, groups=groups))
        self.norm, self.head = nn.GroupNorm(2, 6), nn.Linear(6, 2)
        self.mean = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, x):
        x = F.relu(self.norm(self.normed(self.grouped(x - self.mean))))
        x = F.relu(self.free(torch.sigmoid(self.behind(x))))
        return self.head(torch.sigmoid(self.out(x).mean((2, 3))))


def test_what_cannot_be_removed_is_kept_and_named():
    pruning = at_once(Kept(), 8, HTrate=0.5)
    assert [c.name for c in pruning.plan.convolutions] == ["free"]
    text = pruning.plan_text()
    for name, reason in (("grouped", "grouped convolution"), ("normed", "norm"), ("behind", "zeros"), ("out", "zeros")):
        assert any(f"not cut out: {name}: " in line and reason in line for line in text.splitlines()), name
    assert text.count("not cut out") == 4
    alone = GradualPruning(Kept(), torch.optim.SGD([torch.zeros(1)]), example(8), steps=9, HTrate=0.5, tied=False)
    assert {c.name for c in alone.plan.convolutions} == {"normed", "behind", "free", "out"}


def test_the_plan_says_by_how_much_whole_widths_overshoot_the_cut():
    def text(**options):
        net = models.build("resnet20")
        return GradualPruning(net, torch.optim.SGD(net.parameters()), example(), steps=9, **options).plan_text()

    assert "(-55.3 %)" in (rounded := text(macs_cut=0.5, round_to=8)) and "at least 50.0 % of the" in rounded
    assert "at least" not in text(HTrate=0.7)


@pytest.mark.parametrize("tied", [True, False])
def test_outputs_and_networks_of_one_layer_are_refused(tied):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match=r"no filter of this network can be removed \(0: .*output"):
        make_plan(net, example(8), tied)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"begin": 0.7, "end": 0.2, "HTrate": 0.7}, "--prune_begin 0.7 is after --prune_end 0.2"),
        ({"begin": -1, "HTrate": 0.7}, "--prune_begin -1"),
        ({"macs_cut": 1.0}, "--macs_cut 1 is no share"),
        ({"macs_cut": 0.5, "HTrate": 0.7}, "--macs_cut 0.5 and --HTrate 0.7"),
        ({"macs_cut": 0.995}, r"99.5 % fewer .* out of reach.* 99\.\d % fewer"),
        ({"macs_cut": 0.999, "allocation": "global"}, r"99.9 % fewer .* out of reach.* 9\d\.\d % fewer"),
        ({"HTrate": 0.05}, "--HTrate 0.05 keeps nothing of 'conv_1_3x3'"),
        ({"HTrate": 0.1, "allocation": "global"}, r"99\.1 % fewer .* out of reach.*larger --HTrate than 0.1"),
        ({"HTrate": 0.5, "round_to": 64}, "--HTrate 0.5 with widths that are multiples of 64 removes nothing"),
        ({}, "--HTrate 1 removes nothing"),
        ({"HTrate": 0.5, "score": "l7"}, "--prune_score 'l7'"),
    ],
)
def test_bad_input(options, message):
    net = CifarResNet(8)
    with pytest.raises(UserError, match=message) as error:
        GradualPruning(net, optimizer_of(net), example(), steps=100, **options)
    assert "\n" not in str(error.value)


def test_scores_by_gradients_need_them():
    net = CifarResNet(8)
    net.bn_1.weight.requires_grad_(False)
    with pytest.raises(UserError, match="--prune_score taylor needs the gradient of 'bn_1', which is frozen"):
        GradualPruning(net, optimizer_of(net), example(), steps=9, HTrate=0.5, score="taylor")


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_what_is_said_to_be_reachable_is(allocation):
    net = CifarResNet(8)
    with pytest.raises(UserError) as error:
        GradualPruning(net, optimizer_of(net), example(), steps=9, macs_cut=0.9999, allocation=allocation)
    share = float(str(error.value).split("network has ")[1].split(" %")[0]) / 100
    with pytest.raises(UserError, match="out of reach"):
        GradualPruning(net, optimizer_of(net), example(), steps=9, macs_cut=share + 0.002, allocation=allocation)
    at_once(net, macs_cut=share, allocation=allocation)


def test_gamma_needs_a_batch_norm():
    net = Tiny()
    with pytest.raises(UserError, match=r"gamma needs a BatchNorm .* 'stem' has none"):
        GradualPruning(net, optimizer_of(net), example(8), steps=9, HTrate=0.5, score="gamma")
