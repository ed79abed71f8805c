"""Gradual pruning in training: the schedule, zeros that stay zeros, scores, cuts, and resumption."""

import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from AHSG_HT import AHSG_HT
from models.resnet_cifar import CifarResNet
from utils.base.torchvision_import import import_torchvision
from utils.prune.allocation import uniform
from utils.prune.gradual import GradualPruning
from utils.prune.scores import SCORES

OPTIONS = dict(lr=0.05, momentum=0.9, weight_decay=5e-3, nesterov=True, v=0.1)
# A removal after every fourth step, so that scores are collected before and after a cut.
EVERY_4 = {"steps": 300, "begin": 0.0, "end": 0.8}
NETWORKS = {
    "resnet8": (lambda: CifarResNet(8), 8),
    "resnet20": (lambda: models.build("resnet20"), 8),
    "vgg11_bn": (lambda: models.build("vgg11_bn"), 32),
    "resnet18": (lambda: import_torchvision().models.resnet18(num_classes=10), 64),
    "mobilenet_v2": (lambda: import_torchvision().models.mobilenet_v2(num_classes=10, width_mult=0.35), 64),
}


def images(step, size, dtype=torch.float64, n=4):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(step), dtype=dtype)


def start(name="resnet8", steps=50, dtype=torch.float64, **options):
    """(network, optimizer, pruning, size of its images); dropout off, as its masks depend on widths."""
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    net = make().to(dtype)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net, *prune(net, size, steps, **options), size


def prune(net, size, steps=50, **options):
    optimizer = AHSG_HT(net.parameters(), **OPTIONS)
    schedule = {"begin": 0.2, "end": 0.8, **options}
    return optimizer, GradualPruning(net, optimizer, images(0, size), steps=steps, **schedule)


def train(net, optimizer, pruning, size, steps, epoch=20):
    """Runs these steps. Returns the steps after which the network was cut."""
    net.train()
    cuts, dtype = [], next(net.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        F.cross_entropy(net(images(step, size, dtype)), torch.arange(4)).backward()
        pruning.before_step(step)
        optimizer.step()
        if (step + 1) % epoch == 0 and pruning.cut(step + 1):
            cuts.append(step)
    return cuts


# -- the proof: cutting does not change what is learnt --


@pytest.mark.parametrize(
    "name, options, steps",
    [
        ("resnet8", {"HTrate": 0.5}, 50),
        ("resnet8", {"macs_cut": 0.6, "allocation": "global", "score": "taylor", **EVERY_4}, 50),
        ("resnet8", {"HTrate": 0.5, "score": "gamma", "tied": False}, 50),
        ("mobilenet_v2", {"HTrate": 0.7, "score": "taylor"}, 6),
    ],
)
def test_cut_run_equals_the_masked_one(name, options, steps):
    """All kept weights, momenta, x_{t-1} and statistics, in float64, across two cuts."""
    epoch = 20 if steps == 50 else 3
    cut, masked = (start(name, **{"steps": steps, **options}, shrink=shrink) for shrink in (True, False))
    assert train(*cut, range(steps), epoch) == [epoch - 1, 2 * epoch - 1]
    assert train(*masked, range(steps), epoch) == []
    pruning = cut[2]
    assert torch.equal(pruning.alive, masked[2].alive)
    for layer in pruning.plan.layers:
        outputs, inputs = (pruning.present[classes].nonzero().flatten() for classes in (layer.made, layer.read))
        living = pruning.alive[layer.unit[outputs]]
        for key, values in everything(*cut[:2], layer.name).items():
            for a, b in zip(values, everything(*masked[:2], layer.name)[key], strict=True):
                b = b[outputs] if b.dim() else b
                b = b[:, inputs] if b.dim() > 1 and layer.kind != "depthwise" else b
                assert a.shape == b.shape, (layer.name, key)
                a, b = (a[living], b[living]) if b.dim() else (a, b)
                assert torch.allclose(a, b, rtol=1e-9, atol=1e-9), (layer.name, key)


def everything(net, optimizer, name):
    """{key: its tensor and the optimizer's for it} of a layer."""
    module = net.get_submodule(name)
    states = {key: optimizer.state[p] for key, p in module.named_parameters()}
    tensors = {key: [value] for key, value in module.state_dict().items()}
    for key, state in states.items():
        tensors[key] += [state["momentum_buffer"], state["prev_data"]]
    return tensors


@pytest.mark.parametrize(
    "arch, stop, score, tied",
    [("resnet20", 35, "taylor", True), ("resnet8", 20, "norm", True), ("resnet8", 35, "taylor", False)],
)
def test_resumed_run_is_bit_identical(arch, stop, score, tied):
    """Stopped right after a cut, and between two with filters at zero, on disk in between."""
    options = dict(HTrate=0.5, score=score, tied=tied, **EVERY_4)
    straight = start(arch, dtype=torch.float32, **options)
    train(*straight, range(50))
    net, optimizer, pruning, size = start(arch, dtype=torch.float32, **options)
    assert train(net, optimizer, pruning, size, range(stop)) == [19]
    file = io.BytesIO()
    parts = {"optimizer": optimizer.state_dict(), "pruning": pruning.state_dict()}
    torch.save({"state_dict": net.state_dict(), "arch": arch, "num_classes": 10, **parts}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    net = models.build_like(saved, arch, "file")
    net.load_state_dict(saved["state_dict"])
    optimizer = AHSG_HT(net.parameters(), **OPTIONS)
    optimizer.load_state_dict(saved["optimizer"])
    pruning = GradualPruning(net, optimizer, images(0, size), state=saved["pruning"], **options)
    assert train(net, optimizer, pruning, size, range(stop, 50)) == [39]
    assert pruning.present_filters == straight[2].present_filters
    for (name, a), b in zip(net.state_dict().items(), straight[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in itertools.zip_longest(optimizer.state.values(), straight[1].state.values()):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- the schedule and the zeros --


def test_share_grows_along_the_cubic():
    _, _, pruning, _ = start(steps=100, HTrate=0.5, begin=0.2, end=0.7, shrink=False)
    assert (pruning.first, pruning.last, pruning.every) == (20, 70, 1)
    removals = {}
    for step in range(100):
        if pruning.before_step(step):
            removals[step] = pruning.alive
    assert min(removals) == 21 and max(removals) <= 70
    for step, alive in removals.items():
        removed = 0.5 * (1 - (1 - (step - 20) / 50) ** 3)
        assert torch.equal(pruning.plan.count(alive), uniform(pruning.plan, 1 - removed)), step
    # Half-way in time seven eighths are gone.
    widest = pruning.plan.convolutions[-1].unit
    assert removals[max(s for s in removals if s <= 45)][widest].sum() == int(64 * (1 - 0.5 * 7 / 8))
    assert pruning.alive[widest].sum() == 32


@pytest.mark.parametrize("rate, round_to", [(0.7, 1), (0.55, 8)])
def test_widths_at_the_end_are_the_planned_ones(rate, round_to):
    """On the way a stage's width may round down later than the stage before it."""
    _, _, pruning, _ = start(steps=60, HTrate=rate, round_to=round_to)
    for step in range(60):
        pruning.before_step(step)
    assert torch.equal(pruning.plan.count(pruning.alive), uniform(pruning.plan, rate, round_to))


@pytest.mark.parametrize("begin, end, steps", [(0, 0, 50), (1, 1, 50), (0.5, 0.5, 7), (0, 1, 1), (0.1, 0.9, 5000)])
def test_everything_is_removed_whatever_the_schedule(begin, end, steps):
    net, _, pruning, _ = start(steps=steps, HTrate=0.5, begin=begin, end=end)
    removed = [step for step in range(steps) if pruning.before_step(step)]
    assert removed[0] >= int(begin * steps) - 1 and len(removed) <= 55
    assert begin != end or len(removed) == 1
    assert pruning.cut(steps) and net.stage_3[0].conv_a.out_channels == 32


@pytest.mark.parametrize("name, tied", [*((name, True) for name in NETWORKS if name != "resnet8"), ("resnet8", False)])
def test_removed_filters_give_zeros_and_their_cut_changes_nothing(name, tied):
    net, optimizer, pruning, size = start(name, 3, HTrate=0.6, begin=0, end=0, tied=tied)
    train(net, optimizer, pruning, size, range(3))
    outputs, names = {}, {module: name for name, module in net.named_modules()}
    hooks = [m.register_forward_hook(lambda m, _, output: outputs.update({names[m]: output})) for m in names]
    norms = {layer.name: layer for layer in pruning.plan.layers if layer.kind == "norm"}
    before = {}
    with torch.no_grad():
        for training in (True, False):
            before[training] = net.train(training)(images(9, size))
            for conv in pruning.plan.convolutions:
                removed = ~pruning.alive[conv.unit]
                assert removed.sum() == len(conv.made) - int(len(conv.made) * 0.6)
                assert not outputs[conv.name][:, removed].any()
                assert not outputs[conv.norm][:, ~pruning.alive[norms[conv.norm].unit]].any()
                assert outputs[conv.norm][:, ~removed].any()
        for hook in hooks:
            hook.remove()
        assert pruning.cut(4)
        assert torch.allclose(net(images(9, size)), before[False], rtol=1e-9, atol=1e-9)
        assert torch.allclose(net.train()(images(9, size)), before[True], rtol=1e-9, atol=1e-9)


def test_removal_zeroes_momentum_and_previous_weights_too():
    net, optimizer, pruning, size = start(HTrate=0.5, begin=0.1, end=0.1, shrink=False)
    train(net, optimizer, pruning, size, range(5))
    conv, norm = net.stage_1[0].conv_a, net.stage_1[0].bn_a
    assert optimizer.state[conv.weight]["momentum_buffer"].any() and "kept" not in optimizer.state[conv.weight]
    F.cross_entropy(net(images(5, size)), torch.arange(4)).backward()
    pruning.before_step(5)
    removed = ~pruning.alive[next(c for c in pruning.plan.convolutions if c.name == "stage_1.0.conv_a").made]
    assert removed.sum() == 8 and not norm.running_mean[removed].any() and norm.running_mean[~removed].all()
    for p in (conv.weight, norm.bias):
        kept = optimizer.state[p]["kept"]
        assert kept.dtype == p.dtype and torch.equal(kept.flatten().bool(), ~removed)
        assert (kept * torch.ones_like(p)).shape == p.shape
        for value in (p, optimizer.state[p]["momentum_buffer"], optimizer.state[p]["prev_data"]):
            assert not value[removed].any() and value[~removed].any()
    assert "kept" not in optimizer.state[norm.weight]


# -- scores --


def test_a_mini_batch_without_a_readable_image_adds_no_score():
    net, optimizer, pruning, size = start(score="taylor", HTrate=0.5, **EVERY_4)
    train(net, optimizer, pruning, size, range(3))
    before = {name: value.clone() for name, value in pruning.scores.sums.items()}
    optimizer.zero_grad()
    pruning.scores.accumulate()
    assert before and all(torch.equal(value, pruning.scores.sums[name]) for name, value in before.items())


def test_a_taylor_score_waits_for_a_mini_batch_with_a_readable_image():
    net, optimizer, pruning, size = start(begin=0.0, end=0.0, score="taylor", HTrate=0.5)
    net.zero_grad()
    assert pruning.before_step(0) is None and pruning.alive.all()
    train(net, optimizer, pruning, size, [1])
    assert pruning.done and not pruning.alive.all()


def taylor(conv, norm, i):
    return sum(p[i] * p.grad[i] for p in (norm.weight, norm.bias)).abs()


# The score of filter i, added up over mini-batches, for every key of SCORES.
NAIVE_SCORES = {
    "norm": lambda conv, norm, i: conv.weight[i].norm(),
    "gamma": lambda conv, norm, i: norm.weight[i].abs(),
    "taylor": taylor,
}


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_the_naive_ones(score):
    net, _, pruning, size = start(steps=40, HTrate=0.5, score=score, shrink=False)
    pairs = {"conv_1_3x3": "bn_1"}
    pairs |= {f"stage_{s}.0.conv_{c}": f"stage_{s}.0.bn_{c}" for s in (1, 2, 3) for c in "ab"}
    expected = {name: [0.0] * len(net.get_submodule(name).weight) for name in pairs}
    for step in range(8, 12):
        net.zero_grad()
        F.cross_entropy(net(images(step, size)), torch.arange(4)).backward()
        pruning.scores.accumulate()
        for name, values in expected.items():
            conv, norm = net.get_submodule(name), net.get_submodule(pairs[name])
            for i in range(len(values)):
                values[i] += NAIVE_SCORES[score](conv, norm, i).item()
    expected = {name: [v / sum(values) for v in values] for name, values in expected.items()}
    found = pruning.scores.units(pruning.alive, pruning.present)
    made = {c.name: c.made for c in pruning.plan.convolutions}
    for name in ("stage_1.0.conv_a", "stage_2.0.conv_a", "stage_3.0.conv_a"):
        assert found[made[name]].tolist() == pytest.approx(expected[name])
    # A stream's channel: all that is added to it, in the later stages too.
    added = [expected[name] for name in ("conv_1_3x3", *(f"stage_{s}.0.conv_b" for s in (1, 2, 3)))]
    assert found[made["conv_1_3x3"]].tolist() == pytest.approx([sum(values) for values in zip(*added, strict=False)])


def test_scores_start_again_after_a_removal():
    net, _, pruning, size = start(HTrate=0.5, score="taylor", **EVERY_4)
    F.cross_entropy(net(images(0, size)), torch.arange(4)).backward()
    sums = {}
    for step in range(13):
        pruning.before_step(step)
        sums[step] = pruning.scores.sums.get("conv_1_3x3", torch.zeros(())).clone()
    assert not sums[4].any() and not sums[12].any() and sums[5].any()
    assert torch.allclose(sums[3], 4 * sums[0]) and torch.allclose(sums[7], 3 * sums[5])


def test_taylor_without_batch_norm_is_weight_times_gradient():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)).double()
    _, pruning = prune(net, 8, HTrate=0.5, score="taylor")
    F.cross_entropy(net(images(0, 8)), torch.arange(4)).backward()
    pruning.scores.accumulate()
    expected = [(w * g).sum().abs().item() for w, g in zip(net[0].weight, net[0].weight.grad, strict=True)]
    expected = [e / sum(expected) for e in expected]
    found = pruning.scores.units(pruning.alive, pruning.present)[pruning.plan.convolutions[0].made]
    assert found.tolist() == pytest.approx(expected)


def test_the_weakest_filters_are_removed():
    net, _, pruning, _ = start(HTrate=0.5, begin=0, end=0, score="gamma")
    with torch.no_grad():
        net.stage_2[0].bn_a.weight.copy_(torch.arange(32).flip(0) - 5.0)
    pruning.before_step(0)
    pruning.cut(1)
    # |26|, |25|, ... |11|: the first sixteen.
    assert pruning.present_filters["stage_2.0.conv_a.weight"] == list(range(16))


# -- cuts --


def test_optimizer_follows_a_cut():
    torch.manual_seed(0)
    net = CifarResNet(8).double().to(memory_format=torch.channels_last)
    adapter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    groups = [{"params": [p for p in net.parameters() if p.dim() == d], "lr": 0.01 * d} for d in (4, 2, 1)]
    optimizer = AHSG_HT([*groups, {"params": [adapter]}], momentum=0.9, v=0.1)
    pruning = GradualPruning(net, optimizer, images(0, 8), steps=50, begin=0.2, end=0.8, HTrate=0.5)
    names = [[n for n, p in net.named_parameters() if p.dim() == d] for d in (4, 2, 1)]
    module, classifier_bias = net.stage_1[0].conv_a, net.classifier.bias
    assert train(net, optimizer, pruning, 8, range(20)) == [19]
    own = dict(net.named_parameters())
    for group, expected in zip(optimizer.param_groups, names, strict=False):
        assert [id(p) for p in group["params"]] == [id(own[name]) for name in expected]
    assert optimizer.param_groups[3]["params"][0] is adapter and net.classifier.bias is classifier_bias
    assert net.stage_1[0].conv_a is module and module.out_channels == len(module.weight) < 16
    assert {id(p) for p in optimizer.state} <= {id(p) for p in [*own.values(), adapter]}
    state = optimizer.state[module.weight]
    for value in (module.weight, state["momentum_buffer"], state["prev_data"]):
        assert value.shape == module.weight.shape and value.is_contiguous(memory_format=torch.channels_last)
    train(net, optimizer, pruning, 8, range(20, 50))
    present, weights = pruning.present_filters, net.state_dict()
    assert {name: len(at) for name, at in present.items()} == {name: len(weights[name]) for name in present}
    assert present["classifier.weight"] == list(range(10)) and len(present) == 8


def test_kept_indices_are_the_original_ones_through_all_cuts():
    net, optimizer, pruning, size = start(HTrate=0.5)
    with torch.no_grad():
        for i, row in enumerate(net.stage_3[0].conv_a.weight):
            row.fill_(1 + i)
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    assert train(net, optimizer, pruning, size, range(50)) == [19, 39]
    values = net.stage_3[0].conv_a.weight[:, 0, 0, 0].tolist()
    assert [v - 1 for v in values] == pruning.present_filters["stage_3.0.conv_a.weight"] == list(range(32, 64))
