"""AHSG_HT: equal to SGD and to its naive reference, what it thresholds and keeps, how it behaves as a torch optimizer."""

import ast
import copy
import importlib
import io
import pickle
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from naive_ahsg import NaiveAHSG, brute_force_kept, filter_norm
from torch import nn

import AHSG_HT as ahsg_module
from AHSG_HT import AHSG_HT

SOURCE = Path(__file__).parents[1] / "AHSG-HT.py"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
BOTH_HEAVY_BALLS = pytest.mark.parametrize("heavy_ball", ["paper", "released"])

SGD_OPTIONS = {
    "plain": dict(),
    "momentum": dict(momentum=0.9),
    "dampening": dict(momentum=0.9, dampening=0.3),
    "dampening-alone": dict(dampening=0.3),
    "nesterov": dict(momentum=0.9, nesterov=True),
}
# The released recipe's: two momenta stacked, Nesterov, weight decay, 30 % of the filters removed.
RECIPE = dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, v=0.1, HTrate=0.7)


def small_net(seed=0, dtype=torch.float32):
    """All follower patterns, two convolutions of one shape, a 1x1, one without followers, and a linear layer."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 7, 3),
        nn.BatchNorm2d(7),
        nn.Conv2d(7, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3),
        nn.Conv2d(6, 6, 3),
        nn.Conv2d(6, 5, (1, 3), bias=False),
        nn.Linear(5, 4),
    ).to(dtype)
    for p in net.parameters():
        if p.dim() == 1:
            nn.init.normal_(p)
    return net


def small_params(seed=0, dtype=torch.float32):
    return list(small_net(seed, dtype).parameters())


def draw_gradients(params, count, seed=1):
    """`count` lists of random gradients, one list per step."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(p.shape, generator=generator).to(p) for p in params] for _ in range(count)]


def set_gradients(params, gradients):
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()


def train(params, optimizer, steps, zero1=1):
    """The released calling order over given gradients."""
    for gradients in steps:
        set_gradients(params, gradients)
        optimizer.update_HSG(zero1)
        optimizer.step(None, 1.0, 0, 1)


def threshold_only(params, **options):
    """One step that changes the parameters by H alone."""
    set_gradients(params, [torch.zeros_like(p) for p in params])
    AHSG_HT(params, lr=0.1, **options).step()


def kept_filters(weight):
    return set(weight.detach().flatten(1).abs().sum(1).nonzero().flatten().tolist())


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def snapshot(tensors):
    return [t.detach().clone() for t in tensors]


def tensors_in(thing):
    """Every tensor inside nested dicts, lists and tuples."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        thing = list(thing.values())
    if isinstance(thing, (list, tuple)):
        return [t for inner in thing for t in tensors_in(inner)]
    return []


# ---- the module -------------------------------------------------------------------------------------------------------


def test_class_lives_in_module_AHSG_HT():
    assert AHSG_HT.__module__ == "AHSG_HT"


def test_loading_twice_gives_the_same_class():
    assert importlib.import_module("AHSG_HT").AHSG_HT is AHSG_HT
    assert sys.modules["AHSG_HT"] is ahsg_module


def test_module_comes_from_the_hyphenated_file():
    assert Path(ahsg_module.__file__).resolve() == SOURCE.resolve()


# ---- SGD --------------------------------------------------------------------------------------------------------------


@BOTH_HEAVY_BALLS
@pytest.mark.parametrize("weight_decay", [0, 5e-4])
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
def test_keeping_all_without_heavy_ball_is_sgd_bit_for_bit(options, weight_decay, heavy_ball):
    ours, theirs = small_params(), small_params()
    optimizer = AHSG_HT(ours, lr=0.1, weight_decay=weight_decay, v=0, HTrate=1, heavy_ball=heavy_ball, **options)
    sgd = torch.optim.SGD(theirs, lr=0.1, weight_decay=weight_decay, **options)
    for gradients in draw_gradients(ours, 50):
        set_gradients(ours, gradients)
        set_gradients(theirs, gradients)
        optimizer.update_HSG(1)
        optimizer.step()
        sgd.step()
        assert same_bits(ours, theirs)


def test_is_sgd_bit_for_bit_where_gradients_are_missing_now_and_then():
    ours, theirs = small_params(), small_params()
    options = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    optimizer, sgd = AHSG_HT(ours, **options), torch.optim.SGD(theirs, **options)
    for t, gradients in enumerate(draw_gradients(ours, 20)):
        for tensors, one in ((ours, optimizer), (theirs, sgd)):
            set_gradients(tensors, gradients)
            for p in tensors[t % 3 :: 3]:
                p.grad = None
            one.step()
        assert same_bits(ours, theirs)


# ---- the naive reference ----------------------------------------------------------------------------------------------

NAIVE_OPTIONS = {
    "plain": dict(),
    "strong-heavy-ball": dict(v=0.6),
    "momentum+dampening": dict(momentum=0.9, dampening=0.3),
    "recipe": RECIPE,
    "no-regrowth": RECIPE | dict(regrow=False),
}
# What happens at step t: (argument of update_HSG or None when it is not called, final).
CALLS = {
    "released-order": lambda t: (1, 1),
    "update_HSG(0)": lambda t: (0 if t % 5 == 3 else 1, 1),
    "final=0": lambda t: (1, int(t % 4 == 3)),
    "update_HSG-left-out": lambda t: (1 if t % 5 == 0 else None, 1),
    "all-mixed": lambda t: ((1, None, 0, 1, 0, None)[t % 6], int(t % 4 < 3)),
}


def assert_follows_naive(calls, dtype, rtol, steps=24, seed=0, **options):
    params = small_params(seed, dtype)
    optimizer = AHSG_HT(params, **options)
    naive = NaiveAHSG(params, **options)
    for t, gradients in enumerate(draw_gradients(params, steps, seed + 1)):
        zero1, final = calls(t)
        set_gradients(params, gradients)
        if zero1 is not None:
            optimizer.update_HSG(zero1)
            naive.update_HSG(zero1)
        optimizer.step(None, 1 + 0.1 * t, 0, final)
        naive.step(gradients, final)
        if final and options.get("unit") != "element":
            assert {i: kept_filters(params[i]) for i in naive.kept} == naive.kept
        for p, x in zip(params, naive.x, strict=True):
            torch.testing.assert_close(p.detach().double(), x, rtol=rtol, atol=rtol)
            assert torch.equal(p == 0, x == 0)


@BOTH_HEAVY_BALLS
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("options", NAIVE_OPTIONS.values(), ids=NAIVE_OPTIONS)
def test_follows_the_naive_reference(options, calls, heavy_ball):
    options = dict(lr=0.05, v=0.1, HTrate=0.7) | options
    assert_follows_naive(calls, torch.float64, 1e-12, heavy_ball=heavy_ball, **options)


@BOTH_HEAVY_BALLS
def test_follows_the_naive_reference_in_float32(heavy_ball):
    assert_follows_naive(CALLS["all-mixed"], torch.float32, 2e-5, steps=60, heavy_ball=heavy_ball, **RECIPE)


@BOTH_HEAVY_BALLS
@pytest.mark.parametrize("ranking", [dict(norm=1), dict(unit="element"), dict(unit="element", regrow=False)])
def test_follows_the_naive_reference_in_other_rankings(ranking, heavy_ball):
    assert_follows_naive(CALLS["all-mixed"], torch.float64, 1e-12, heavy_ball=heavy_ball, **RECIPE, **ranking)


def test_zero_filters_before_a_batch_norm_come_back_only_with_regrow():
    """A zero filter's gradient through BatchNorm is about 1/sqrt(eps) = 316 times that of a filter of unit variance."""
    kept = {}
    for regrow in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(4))
        images, labels = torch.randn(16, 3, 6, 6), torch.arange(16) % 4
        net(images)
        optimizer = AHSG_HT(net.parameters(), lr=0.1, HTrate=0.5, regrow=regrow)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            kept.setdefault(regrow, []).append(kept_filters(net[0].weight))
    assert kept[True][0] == kept[False][0] != kept[True][1]
    assert kept[False][0] == kept[False][1] == kept[False][2]


def test_released_heavy_ball_is_zero_in_the_released_calling_order():
    with_ball, without = small_params(), small_params()
    steps = draw_gradients(with_ball, 30)
    train(with_ball, AHSG_HT(with_ball, heavy_ball="released", **RECIPE), steps)
    train(without, AHSG_HT(without, heavy_ball="released", **RECIPE | dict(v=0)), steps)
    assert same_bits(with_ball, without)


def test_released_thresholds_whatever_final_says():
    params, reference = small_params(), small_params()
    optimizer = AHSG_HT(params, heavy_ball="released", **RECIPE)
    other = AHSG_HT(reference, heavy_ball="released", **RECIPE)
    for gradients in draw_gradients(params, 5):
        for tensors, one, final in ((params, optimizer, 0), (reference, other, 1)):
            set_gradients(tensors, gradients)
            one.update_HSG(1)
            one.step(None, 1.0, 0, final)
        assert len(kept_filters(params[0])) == 4
        assert same_bits(params, reference)


# ---- paper mode: where x_{t-1} stands ---------------------------------------------------------------------------------


def moves_without_gradient(zero1):
    """Whether the heavy ball alone moves the parameters after some steps and update_HSG(zero1)."""
    params = small_params()
    optimizer = AHSG_HT(params, lr=0.1, v=0.3)
    train(params, optimizer, draw_gradients(params, 3))
    before = snapshot(params)
    set_gradients(params, [torch.zeros_like(p) for p in params])
    optimizer.update_HSG(zero1)
    optimizer.step()
    return not same_bits(params, before)


def test_paper_heavy_ball_moves_without_gradient():
    assert moves_without_gradient(zero1=1)


@pytest.mark.parametrize("v", [0.9, 0.1, 1e-3, 1e-9, 1e-300])
def test_large_and_tiny_heavy_balls_follow_the_naive_reference(v):
    recipe = dict(lr=0.5, momentum=0.9, nesterov=True, v=v)
    params = small_params(dtype=torch.float64)
    optimizer, naive = AHSG_HT(params, **recipe), NaiveAHSG(params, **recipe)
    for gradients in draw_gradients(params, 4):
        train(params, optimizer, [gradients])
        naive.step(gradients)
    for p, x in zip(params, naive.x, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)


def test_half_precision_with_a_tiny_heavy_ball_does_not_overflow():
    p = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = AHSG_HT([p], lr=0.5, v=1e-5)
    train([p], optimizer, [[torch.full((4,), 100.0, dtype=torch.float16)]] * 3)
    torch.testing.assert_close(p.detach(), torch.full((4,), -150.0, dtype=torch.float16))


@pytest.mark.parametrize("lr, v, gradient", [(0.5, 1e-3, 200.0), (1.0, 0.125, 10_000.0), (0.125, 0.125, 60_000.0)])
def test_half_precision_overflows_no_earlier_than_the_step_itself(lr, v, gradient):
    p = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    train([p], AHSG_HT([p], lr=lr, v=v), [[torch.full((4,), gradient, dtype=torch.float16)]] * 2)
    torch.testing.assert_close(p.detach(), torch.full((4,), -(2 + v) * lr * gradient, dtype=torch.float16))


def test_paper_update_HSG_0_forgets_the_previous_point():
    assert not moves_without_gradient(zero1=0)


def test_paper_heavy_ball_returns_one_step_after_update_HSG_0():
    start, first, second = torch.tensor([8.0]), torch.tensor([2.0]), torch.tensor([4.0])
    p = nn.Parameter(start.clone())
    optimizer = AHSG_HT([p], lr=1.0, v=0.5)
    optimizer.update_HSG(0)
    for gradient in (first, second):
        p.grad = gradient
        optimizer.step()
    assert p.item() == 8 - 2 - 4 + 0.5 * (6 - 8)


def test_paper_step_alone_is_the_full_calling_order():
    alone, full = small_params(), small_params()
    optimizer, other = AHSG_HT(alone, **RECIPE), AHSG_HT(full, **RECIPE)
    for t, gradients in enumerate(draw_gradients(alone, 20)):
        set_gradients(alone, gradients)
        optimizer.step()
        set_gradients(full, gradients)
        other.update_HSG(1)
        other.step(None, 1 + 0.1 * t, t, 1)
        assert same_bits(alone, full)


def test_paper_final_0_leaves_H_out():
    params, unthresholded = small_params(), small_params()
    optimizer = AHSG_HT(params, **RECIPE)
    other = AHSG_HT(unthresholded, **RECIPE | dict(HTrate=1.0))
    for gradients in draw_gradients(params, 10):
        for tensors, one in ((params, optimizer), (unthresholded, other)):
            set_gradients(tensors, gradients)
            one.update_HSG(1)
            one.step(None, 1.0, 0, 0)
    assert same_bits(params, unthresholded)


# ---- what H keeps -----------------------------------------------------------------------------------------------------


def random_case(rng, largest):
    """A random shape, and a rate at which at least one of shape[0] units stays."""
    shape = (rng.randint(2, largest), rng.randint(1, 4), rng.choice([1, 2, 3]), rng.choice([1, 2, 3]))
    rates = [rate for rate in (0.05, 0.1, 0.29, 0.3, 0.5, 0.57, 0.6, 0.7, 0.8, 0.9, 0.99) if shape[0] * rate >= 1]
    return shape, rng.choice(rates)


def integers(shape, rng, generator):
    """Small integers, so that norms tie exactly; in half of the cases filters are also copies of one another."""
    weight = torch.randint(-2, 3, shape, generator=generator).float()
    if rng.random() < 0.5:
        weight = weight[torch.randint(0, max(1, shape[0] // 3), (shape[0],), generator=generator)]
    return weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [1, 2])
def test_kept_filters_are_the_brute_force_top_k_with_ties(norm, device):
    rng, generator = random.Random(norm), torch.Generator().manual_seed(norm)
    for _ in range(500):
        shape, rate = random_case(rng, largest=24)
        target, g = integers(shape, rng, generator), integers(shape, rng, generator)
        # The step of length 1 lands on `target` exactly. The bias shows which filters stay, zero filters among them.
        weight = nn.Parameter((target + g).to(device))
        bias = nn.Parameter(torch.ones(shape[0], device=device))
        weight.grad, bias.grad = g.to(device), torch.zeros_like(bias)
        AHSG_HT([weight, bias], lr=1.0, HTrate=rate, norm=norm).step()
        kept = brute_force_kept([filter_norm(w, norm) for w in target], rate)
        mask = torch.tensor([float(i in kept) for i in range(shape[0])])
        assert torch.equal(bias.detach().cpu(), mask), (shape, rate)
        assert torch.equal(weight.detach().cpu(), target * mask.view(-1, 1, 1, 1)), (shape, rate)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [1, 2])
def test_kept_elements_are_the_brute_force_top_k_with_ties(norm, device):
    rng, generator = random.Random(norm), torch.Generator().manual_seed(norm)
    for _ in range(500):
        shape, rate = random_case(rng, largest=6)
        shape = rng.choice([shape, shape[:2], (shape[0] * shape[1],)])
        target, g = integers(shape, rng, generator), integers(shape, rng, generator)
        weight = nn.Parameter((target + g).to(device))
        weight.grad = g.to(device)
        AHSG_HT([weight], lr=1.0, HTrate=rate, norm=norm, unit="element").step()
        entries = target.flatten().tolist()
        kept = brute_force_kept([abs(e) for e in entries], rate)
        expected = torch.tensor([e if i in kept else 0.0 for i, e in enumerate(entries)]).view(shape)
        assert torch.equal(weight.detach().cpu(), expected), (shape, rate)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [1, 2])
def test_equal_filters_of_any_values_keep_the_lower_indices(norm, device):
    generator = torch.Generator().manual_seed(norm)
    for entries in range(1, 200, 3):
        weight = nn.Parameter(torch.randn(1, entries, 1, 1, generator=generator).repeat(40, 1, 1, 1).to(device))
        threshold_only([weight], HTrate=0.5, norm=norm)
        assert kept_filters(weight) == set(range(20)), entries


def test_long_rows_keep_what_a_stable_sort_keeps(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for width in range(1, 60):
        scores = torch.randint(0, 6, (5, width), generator=generator).float()
        scores[4, ::7] = float("nan")
        for kept in range(max(1, (width + 6) // 7), width + 1, 3):
            by_sort = ahsg_module._keep_largest(scores, kept, torch.float64)
            with monkeypatch.context() as patch:
                patch.setattr(ahsg_module, "CPU_LONG_ROW", 1)
                by_selection = ahsg_module._keep_largest(scores, kept, torch.float64)
            # Of exactly `kept` nan, the smallest kept score is nan itself and says nothing.
            rows = slice(4 if kept == (width + 6) // 7 else 5)
            assert torch.equal(by_sort[rows], by_selection[rows]), (width, kept)


def test_equal_elements_keep_the_lower_indices():
    p = nn.Parameter(torch.tensor([1.0, -2.0, 2.0, -1.0, 2.0, 1.0, -2.0, 1.0]))
    threshold_only([p], HTrate=0.625, unit="element")
    assert p.tolist() == [1, -2, 2, 0, 2, 0, -2, 0]


@pytest.mark.parametrize(
    "filters, HTrate, kept",
    [(16, 0.7, 11), (32, 0.7, 22), (64, 0.7, 44), (90, 0.7, 63), (100, 0.29, 29), (10, 0.99, 9), (16, 1.0, 16)],
)
def test_floor_of_filters_times_rate_is_kept(filters, HTrate, kept):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(filters, 3, 3, 3))
    threshold_only([weight], HTrate=HTrate)
    assert len(kept_filters(weight)) == kept


def test_norms_1_and_2_rank_differently():
    """Filter 0 is larger in l1 (4 > 3), filter 1 in l2 (2 < 3)."""
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    kept = {}
    for norm in (1, 2):
        weight = nn.Parameter(values.clone())
        threshold_only([weight], HTrate=0.5, norm=norm)
        kept[norm] = kept_filters(weight)
    assert kept == {1: {0}, 2: {1}}


def test_bfloat16_filters_are_ranked_by_float32_norms():
    """The norms 1 and 1.00195 are one number in bfloat16, where the tie would keep the first."""
    values = torch.tensor([[1.0, 0.0], [1.0, 0.0625]], dtype=torch.bfloat16).view(2, 2, 1, 1)
    weight = nn.Parameter(values.clone())
    threshold_only([weight], HTrate=0.5)
    assert kept_filters(weight) == {1}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("unit", ["filter", "element"])
@pytest.mark.parametrize("norm", [1, 2])
def test_the_stacked_path_of_gpus_is_the_path_of_cpus(norm, unit, layout):
    generator = torch.Generator().manual_seed(norm)
    weights = [torch.randint(-3, 4, (12, 5, 3, 3), generator=generator).float() for _ in range(4)]
    weights = [w.to(memory_format=layout) for w in weights]
    others = [w.clone() for w in weights]
    kept = 7 if unit == "filter" else 300
    masks = torch.stack(ahsg_module._threshold_in_place(weights, kept, norm, unit))
    assert torch.equal(masks, torch.stack(ahsg_module._threshold_stacked(others, kept, norm, unit)))
    assert (masks.sum(1) == kept).all()
    assert same_bits(weights, others)


@pytest.mark.parametrize("norm", [1, 2])
def test_equal_channels_last_filters_keep_the_lower_indices(norm):
    generator = torch.Generator().manual_seed(norm)
    for channels in range(1, 70, 3):
        values = torch.randn(1, channels, 3, 3, generator=generator).repeat(40, 1, 1, 1)
        weight = nn.Parameter(values.to(memory_format=torch.channels_last))
        threshold_only([weight], HTrate=0.5, norm=norm)
        assert kept_filters(weight) == set(range(20)), channels


# ---- which layers, and what follows a filter --------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [nn.Conv2d(3, 10, 3), nn.Conv2d(10, 10, 1), nn.Conv2d(10, 10, 3, groups=10)])
def test_stem_1x1_and_depthwise_convolutions_are_thresholded(conv):
    threshold_only(list(conv.parameters()), HTrate=0.7)
    assert len(kept_filters(conv.weight)) == 7


@pytest.mark.parametrize("layer", [nn.Linear(10, 10), nn.Embedding(10, 10), nn.Conv1d(10, 10, 3), nn.BatchNorm2d(10)])
def test_other_layers_are_not_thresholded(layer):
    nn.init.ones_(next(layer.parameters()))
    before = snapshot(layer.parameters())
    threshold_only(list(layer.parameters()), HTrate=0.7)
    assert same_bits(layer.parameters(), before)


def conv_with_followers(conv_bias, norm):
    """Four filters, of which 1 and 2 are the weakest, then a linear layer with four outputs; the 1-D parameters are all ones."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3, bias=conv_bias), *([nn.BatchNorm2d(4)] if norm else []), nn.Linear(3, 4))
    for p in net.parameters():
        nn.init.ones_(p)
    with torch.no_grad():
        net[0].weight *= torch.tensor([4.0, 1.0, 2.0, 3.0]).view(4, 1, 1, 1)
    return net


@pytest.mark.parametrize(
    "conv_bias, norm, followers",
    [
        (False, True, {"1.weight": [1, 1, 1, 1], "1.bias": [1, 0, 0, 1]}),
        (True, True, {"0.bias": [1, 0, 0, 1], "1.weight": [1, 1, 1, 1], "1.bias": [1, 0, 0, 1]}),
        (True, False, {"0.bias": [1, 0, 0, 1]}),
        (False, False, {}),
    ],
    ids=["norm", "bias+norm", "bias", "none"],
)
def test_biases_of_a_removed_filter_are_zeroed_and_the_norm_weight_is_not(conv_bias, norm, followers):
    net = conv_with_followers(conv_bias, norm)
    threshold_only(list(net.parameters()), HTrate=0.5)
    last = str(len(net) - 1)
    values = {name: p.tolist() for name, p in net.named_parameters() if p.dim() == 1}
    assert kept_filters(net[0].weight) == {0, 3}
    assert values == followers | {f"{last}.bias": [1, 1, 1, 1]}


def test_one_dimensional_parameters_of_another_length_do_not_follow():
    weight = nn.Parameter(torch.arange(1.0, 5.0).view(4, 1, 1, 1))
    other = nn.Parameter(torch.ones(3))
    threshold_only([weight, other], HTrate=0.5)
    assert other.tolist() == [1, 1, 1]


def test_elements_have_no_followers():
    weight = nn.Parameter(torch.arange(1.0, 5.0).view(4, 1, 1, 1))
    bias = nn.Parameter(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    threshold_only([weight, bias], HTrate=0.5, unit="element")
    assert bias.tolist() == [4, 3, 0, 0]


def test_more_than_three_followers_are_refused():
    params = [nn.Parameter(torch.ones(4, 2, 1, 1)), *(nn.Parameter(torch.ones(4)) for _ in range(4))]
    with pytest.raises(ValueError, match="4 one-dimensional parameters"):
        AHSG_HT(params, HTrate=0.5)


def test_a_removed_filter_may_come_back():
    net = conv_with_followers(conv_bias=True, norm=True)
    params = list(net.parameters())
    optimizer = AHSG_HT(params, lr=1.0, HTrate=0.5)
    set_gradients(params, [torch.zeros_like(p) for p in params])
    optimizer.step()
    removed_first = kept_filters(net[0].weight) == {0, 3}
    for p in params[:4]:
        p.grad[1] = -5.0
    optimizer.step()
    assert removed_first and kept_filters(net[0].weight) == {0, 1}
    assert [net[0].bias[1], net[1].bias[1], net[1].weight[1]] == [5, 5, 6]


# ---- a well-behaved torch optimizer -----------------------------------------------------------------------------------


def test_is_a_torch_optimizer():
    assert issubclass(AHSG_HT, torch.optim.Optimizer)


def test_source_never_uses_data():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    assert "data" not in {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_closure_runs_with_gradients_enabled():
    p = nn.Parameter(torch.ones(2))
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        AHSG_HT([p], lr=0.25).step(closure)
    assert seen == [True]
    assert p.tolist() == [0.5, 0.5]


def test_step_returns_the_closures_loss():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    loss = torch.tensor(3.25)
    assert AHSG_HT([p], lr=0.1).step(lambda: loss) is loss


def test_step_without_closure_returns_none():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    assert AHSG_HT([p], lr=0.1).step() is None


@BOTH_HEAVY_BALLS
def test_nothing_is_recorded_for_autograd(heavy_ball):
    params = small_params()
    optimizer = AHSG_HT(params, heavy_ball=heavy_ball, **RECIPE)
    train(params, optimizer, draw_gradients(params, 3))
    assert all(p.is_leaf and p.requires_grad for p in params)
    assert not any(t.requires_grad for t in tensors_in(dict(optimizer.state)))


@BOTH_HEAVY_BALLS
@pytest.mark.parametrize("weight_decay", [0, 5e-4])
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
def test_gradients_are_never_overwritten(options, weight_decay, heavy_ball):
    params = small_params()
    optimizer = AHSG_HT(params, lr=0.1, weight_decay=weight_decay, v=0.1, HTrate=0.7, heavy_ball=heavy_ball, **options)
    set_gradients(params, draw_gradients(params, 1)[0])
    gradients = [p.grad for p in params]
    before = snapshot(gradients)
    for _ in range(3):
        optimizer.update_HSG(1)
        optimizer.step()
    assert all(p.grad is g for p, g in zip(params, gradients, strict=True))
    assert same_bits(gradients, before)


@BOTH_HEAVY_BALLS
def test_parameters_without_gradient_are_skipped(heavy_ball):
    params = small_params()
    optimizer = AHSG_HT(params, heavy_ball=heavy_ball, **RECIPE)
    train(params, optimizer, draw_gradients(params, 3))
    frozen = params[:4]  # the first convolution and its BatchNorm
    before, rest_before = snapshot(frozen), snapshot(params[4:])
    set_gradients(params, draw_gradients(params, 1, seed=2)[0])
    for p in frozen:
        p.grad = None
    optimizer.update_HSG(1)
    optimizer.step()
    assert same_bits(frozen, before)
    assert not any(torch.equal(p, b) for p, b in zip(params[4:], rest_before, strict=True))


def test_a_convolution_without_gradient_is_not_thresholded():
    params = small_params()
    set_gradients(params, draw_gradients(params, 1)[0])
    for p in params[:4]:  # the first convolution and its BatchNorm
        p.grad = None
    AHSG_HT(params, **RECIPE).step()
    assert len(kept_filters(params[0])) == 7


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        AHSG_HT(embedding.parameters(), lr=0.1).step()


BAD_ARGUMENTS = [
    dict(lr=-0.1),
    dict(lr=float("nan")),
    dict(lr=float("inf")),
    dict(lr="fast"),
    dict(momentum=-0.9),
    dict(dampening=float("nan")),
    dict(weight_decay=-5e-4),
    dict(v=-0.1),
    dict(v=float("nan")),
    dict(v=None),
    dict(HTrate=0.0),
    dict(HTrate=-0.3),
    dict(HTrate=1.5),
    dict(HTrate=float("nan")),
    dict(HTrate=0.01),  # of four filters it would keep none
    dict(heavy_ball="polyak"),
    dict(norm=3),
    dict(unit="channel"),
    dict(regrow=1),
    dict(nesterov=True, momentum=0.0),
    dict(nesterov=True, momentum=0.9, dampening=0.25),
]


def bad_id(bad):
    return ",".join(f"{name}={value}" for name, value in bad.items())


def naming(bad):
    """A pattern for the name of the argument, then the bad value, which stands last in `bad`."""
    name, value = list(bad.items())[-1]
    return f"{re.escape(name)}.*{re.escape(str(value))}"


@pytest.mark.parametrize("bad", BAD_ARGUMENTS, ids=bad_id)
def test_bad_arguments_are_refused_by_name_and_value(bad):
    with pytest.raises(ValueError, match=naming(bad)):
        AHSG_HT([nn.Parameter(torch.ones(4, 2, 1, 1))], **bad)


def test_bad_zero1_is_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"zero1.*2"):
        AHSG_HT([p]).update_HSG(2)


def test_bad_final_is_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"final.*7"):
        AHSG_HT([p]).step(None, 1.0, 0, 7)


@BOTH_HEAVY_BALLS
def test_param_groups_hold_no_tensors_but_the_parameters(heavy_ball):
    params = small_params()
    optimizer = AHSG_HT(params, heavy_ball=heavy_ball, **RECIPE)
    train(params, optimizer, draw_gradients(params, 3))
    found = [
        t for group in optimizer.param_groups for name, x in group.items() if name != "params" for t in tensors_in(x)
    ]
    assert found == []
    assert [id(t) for t in tensors_in(optimizer.param_groups)] == [id(p) for p in params]


@BOTH_HEAVY_BALLS
def test_the_optimizer_object_holds_only_what_every_torch_optimizer_holds(heavy_ball):
    params = small_params()
    optimizer = AHSG_HT(params, heavy_ball=heavy_ball, **RECIPE)
    train(params, optimizer, draw_gradients(params, 3))
    assert set(vars(optimizer)) == set(vars(torch.optim.SGD(params, lr=0.1)))


@BOTH_HEAVY_BALLS
def test_state_tensors_have_the_parameters_shape_and_dtype(heavy_ball):
    """load_state_dict casts state to the parameter's dtype: masks or indices would not survive it."""
    params = small_params(dtype=torch.bfloat16)
    optimizer = AHSG_HT(params, heavy_ball=heavy_ball, **RECIPE)
    train(params, optimizer, draw_gradients(params, 3))
    for p in params:
        assert {(t.shape, t.dtype) for t in tensors_in(optimizer.state[p])} == {(p.shape, p.dtype)}


def continue_both(params, optimizer, copies, copied, calls=CALLS["update_HSG-left-out"]):
    """Five more steps of an optimizer and of its copy; True if they stay equal to the bit."""
    for t, gradients in enumerate(draw_gradients(params, 5, seed=9), start=3):
        for tensors, one in ((params, optimizer), (copies, copied)):
            set_gradients(tensors, gradients)
            if calls(t)[0] is not None:
                one.update_HSG(calls(t)[0])
            one.step()
        if not same_bits(params, copies):
            return False
    return True


def trained(heavy_ball):
    params = small_params()
    optimizer = AHSG_HT(params, heavy_ball=heavy_ball, **RECIPE)
    train(params, optimizer, draw_gradients(params, 6))
    return params, optimizer


@BOTH_HEAVY_BALLS
def test_state_dict_through_a_file_continues_bit_identically(heavy_ball):
    params, optimizer = trained(heavy_ball)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    copied = AHSG_HT(copies, lr=9.0)
    copied.load_state_dict(torch.load(file, weights_only=True))
    assert continue_both(params, optimizer, copies, copied)


@BOTH_HEAVY_BALLS
def test_deepcopy_continues_bit_identically(heavy_ball):
    params, optimizer = trained(heavy_ball)
    copied = copy.deepcopy(optimizer)
    copies = copied.param_groups[0]["params"]
    assert not any(p is q for p, q in zip(params, copies, strict=True))
    assert continue_both(params, optimizer, copies, copied)


@BOTH_HEAVY_BALLS
def test_pickle_continues_bit_identically(heavy_ball):
    params, optimizer = trained(heavy_ball)
    copied = pickle.loads(pickle.dumps(optimizer))
    assert continue_both(params, optimizer, copied.param_groups[0]["params"], copied)


def test_added_group_is_optimized_with_its_own_options():
    first, second = small_params(0), small_params(1)
    optimizer = AHSG_HT(first, **RECIPE)
    optimizer.add_param_group(dict(params=second, HTrate=0.5, v=0.3))
    alone = small_params(1)
    other = AHSG_HT(alone, **RECIPE | dict(HTrate=0.5, v=0.3))
    for gradients in draw_gradients(first, 5):
        for tensors in (first, second, alone):
            set_gradients(tensors, gradients)
        optimizer.step()
        other.step()
    assert same_bits(second, alone)


BAD_GROUPS = [
    dict(HTrate=1.5),
    dict(HTrate=0.1),  # of seven filters it would keep none
    dict(unit="channel"),
    dict(nesterov=True, momentum=0.9, dampening=0.5),
]


@pytest.mark.parametrize("bad", BAD_GROUPS, ids=bad_id)
def test_a_refused_group_leaves_the_optimizer_as_it_was(bad):
    params, reference = small_params(), small_params()
    optimizer, other = AHSG_HT(params, **RECIPE), AHSG_HT(reference, **RECIPE)
    refused = small_params(1)
    with pytest.raises(ValueError, match=naming(bad)):
        optimizer.add_param_group(dict(params=refused, **bad))
    assert len(optimizer.param_groups) == 1
    assert continue_both(params, optimizer, reference, other)
    optimizer.add_param_group(dict(params=refused))  # not remembered from the refusal
    assert len(optimizer.param_groups) == 2


def test_lr_scheduler_is_the_same_as_setting_lr_by_hand():
    scheduled, manual = small_params(), small_params()
    optimizer, other = AHSG_HT(scheduled, **RECIPE), AHSG_HT(manual, **RECIPE)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.2)
    for t, gradients in enumerate(draw_gradients(scheduled, 9)):
        other.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(RECIPE["lr"] * 0.2 ** (t // 3))
        train(scheduled, optimizer, [gradients])
        train(manual, other, [gradients])
        scheduler.step()
    assert same_bits(scheduled, manual)


def scaled_step(params, optimizer, scaler, gradients):
    set_gradients(params, [scaler.scale(g) for g in gradients])
    optimizer.update_HSG(1)
    scaler.step(optimizer, None, 1.0, 0, 1)
    scaler.update()


@BOTH_HEAVY_BALLS
def test_grad_scaler_steps_are_the_unscaled_steps(heavy_ball):
    """Scaling by powers of two is exact."""
    scaled, plain = small_params(), small_params()
    optimizer = AHSG_HT(scaled, heavy_ball=heavy_ball, **RECIPE)
    other = AHSG_HT(plain, heavy_ball=heavy_ball, **RECIPE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for gradients in draw_gradients(scaled, 5):
        scaled_step(scaled, optimizer, scaler, gradients)
        train(plain, other, [gradients])
    assert same_bits(scaled, plain)


def test_a_step_skipped_by_grad_scaler_changes_nothing():
    params, optimizer = trained("paper")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before, state_before = snapshot(params), copy.deepcopy(optimizer.state_dict())
    gradients = draw_gradients(params, 1)[0]
    gradients[2][0] = float("inf")
    scaled_step(params, optimizer, scaler, gradients)
    assert same_bits(params, before)
    assert same_bits(tensors_in(optimizer.state_dict()), tensors_in(state_before))
    assert scaler.get_scale() == 2.0**9  # the step was seen, and skipped


@BOTH_HEAVY_BALLS
@pytest.mark.parametrize("unit", ["filter", "element"])
@pytest.mark.parametrize("device", DEVICES)
def test_channels_last_gives_the_contiguous_result(device, unit, heavy_ball):
    contiguous, last = small_net().to(device), small_net().to(device, memory_format=torch.channels_last)
    params, others = list(contiguous.parameters()), list(last.parameters())
    assert not others[0].is_contiguous()
    optimizer = AHSG_HT(params, heavy_ball=heavy_ball, unit=unit, **RECIPE)
    other = AHSG_HT(others, heavy_ball=heavy_ball, unit=unit, **RECIPE)
    for gradients in draw_gradients(params, 12):
        for tensors, one in ((params, optimizer), (others, other)):
            for p, g in zip(tensors, gradients, strict=True):
                p.grad = torch.empty_like(p).copy_(g)
            one.update_HSG(1)
            one.step()
        assert same_bits(params, others)
    assert not others[0].is_contiguous()


def test_blocks_of_a_large_network_give_the_result_of_one_block(monkeypatch):
    params, others = small_params(), small_params()
    optimizer, other = AHSG_HT(params, **RECIPE), AHSG_HT(others, **RECIPE)
    for gradients in draw_gradients(params, 6):
        train(params, optimizer, [gradients])
        with monkeypatch.context() as patch:
            patch.setattr(ahsg_module, "CPU_BLOCK_ENTRIES", 20)
            assert len(ahsg_module._update_blocks(others)) > 3
            train(others, other, [gradients])
    assert same_bits(params, others)


def test_groups_with_different_HTrate():
    convs = [nn.Parameter(torch.randn(10, 2, 3, 3, generator=torch.Generator().manual_seed(s))) for s in range(3)]
    set_gradients(convs, [torch.zeros_like(p) for p in convs])
    rates = (0.3, 0.7, 1.0)
    AHSG_HT([dict(params=[p], HTrate=rate) for p, rate in zip(convs, rates, strict=True)], lr=0.1, HTrate=0.5).step()
    assert [len(kept_filters(p)) for p in convs] == [3, 7, 10]


@BOTH_HEAVY_BALLS
def test_small_networks_loss_decreases(heavy_ball):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 3),
    )
    images, labels = torch.randn(24, 1, 8, 8), torch.arange(24) % 3
    images += labels.view(-1, 1, 1, 1) - 1.0
    optimizer = AHSG_HT(net.parameters(), heavy_ball=heavy_ball, **RECIPE)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.update_HSG(1)
        optimizer.step(None, 1.0, 0, 1)
        losses.append(loss.item())
    assert len(kept_filters(net[0].weight)) == 5
    assert losses[-1] < 0.5 * losses[0]


def test_ranks_with_the_same_gradients_keep_the_same_filters():
    """Integer weights and steps, so that many norms tie; one rank stores its weights in channels_last."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    shape = (16, 4, 3, 3)
    start = integers(shape, rng, generator)
    ranks = [
        nn.Parameter(start.clone(memory_format=layout)) for layout in (torch.contiguous_format, torch.channels_last)
    ]
    optimizers = [AHSG_HT([p], lr=1.0, v=1.0, HTrate=0.7) for p in ranks]
    for _ in range(20):
        gradient = integers(shape, rng, generator)
        for p, optimizer in zip(ranks, optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
        assert kept_filters(ranks[0]) == kept_filters(ranks[1])
    assert torch.equal(ranks[0], ranks[1])


def step_with_gradients(net, **options):
    """One step of AHSG_HT with random gradients for what requires them; returns the filters of `net[0]` that were removed."""
    optimizer = AHSG_HT(net.parameters(), lr=0.01, HTrate=0.5, **options)
    for p in net.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer.step()
    return net[0].weight.flatten(1).eq(0).all(dim=1)


def test_a_frozen_norm_bias_leaves_the_norm_weight_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    net[1].bias.requires_grad_(False).fill_(1.0)
    removed = step_with_gradients(net)
    assert removed.sum() == 4
    assert net[1].weight.ne(0).all()
    assert net[1].bias.eq(1).all()


def test_a_frozen_convolution_between_keeps_its_own_norm():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
    )
    net[2].weight.requires_grad_(False)
    for norm in (net[1], net[3]):
        nn.init.ones_(norm.bias)
    removed = step_with_gradients(net)
    assert torch.equal(net[1].bias.eq(0), removed)
    assert net[3].bias.ne(0).all()


def test_a_one_dimensional_parameter_of_another_length_is_passed_over():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(1), nn.BatchNorm2d(8))
    nn.init.ones_(net[2].bias)
    removed = step_with_gradients(net)
    assert removed.sum() == 4
    assert torch.equal(net[2].bias.eq(0), removed)
    assert torch.equal(net[0].bias.eq(0), removed)
    assert net[2].weight.ne(0).all()


def test_an_empty_parameter_is_no_layer():
    empty = torch.zeros(0, requires_grad=True)
    full = torch.ones(4, requires_grad=True)
    optimizer = AHSG_HT([empty, full], lr=0.1, HTrate=0.5, unit="element")
    empty.grad, full.grad = torch.zeros(0), torch.zeros(4)
    optimizer.step()
    assert full.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "bad",
    [
        dict(HTrate=1.5),
        dict(HTrate=0.1),  # of seven filters it would keep none
        dict(HTrate=float("nan")),
        dict(heavy_ball="polyak"),
        dict(norm=3),
        dict(unit="channel"),
        dict(regrow=1),
        dict(lr=float("nan")),
        dict(lr=10**400),
        dict(v=-1.0),
        dict(momentum="x"),
        dict(nesterov="no"),
    ],
    ids=bad_id,
)
def test_a_bad_value_from_a_schedule_stops_the_step_before_any_update(bad):
    params = small_params()
    optimizer = AHSG_HT([dict(params=params[4:]), dict(params=params[:4])], **RECIPE)
    train(params, optimizer, draw_gradients(params, 2))
    before, state_before = snapshot(params), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[1].update(bad)
    with pytest.raises(ValueError, match=naming(bad)):
        optimizer.step()
    assert same_bits(params, before)
    assert same_bits(tensors_in(optimizer.state_dict()["state"]), tensors_in(state_before))


@pytest.mark.parametrize("ranking", [dict(), dict(unit="element")], ids=["filter", "element"])
@pytest.mark.parametrize("HTrate", [1, 0.7])
def test_without_regrow_what_is_zero_stays_zero_at_any_rate(HTrate, ranking):
    """As it does in the naive reference, H or not."""
    params = small_params(dtype=torch.float64)
    with torch.no_grad():
        params[0][:5] = 0
    recipe = RECIPE | dict(HTrate=HTrate, regrow=False) | ranking
    optimizer, naive = AHSG_HT(params, **recipe), NaiveAHSG(params, **recipe)
    for gradients in draw_gradients(params, 3):
        train(params, optimizer, [gradients])
        naive.step(gradients)
        for p, x in zip(params, naive.x, strict=True):
            torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)
    assert not params[0][:5].any()


def test_a_sparse_gradient_in_a_later_group_stops_the_step_before_any_update():
    first, second = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    first.grad, second.grad = torch.ones(3), torch.ones(3).to_sparse()
    optimizer = AHSG_HT([{"params": [first]}, {"params": [second]}], lr=0.1)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert first.eq(1).all()


@pytest.mark.parametrize("unit", ["filter", "element"])
def test_complex_weights_are_ranked_by_their_magnitude(unit):
    weight = torch.nn.Parameter(torch.tensor([3j, 1 + 1j, -2.0, 0.5]).view(4, 1, 1, 1))
    optimizer = AHSG_HT([weight], lr=0.1, HTrate=0.5, unit=unit)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.detach().flatten().tolist() == [3j, 0, -2, 0]
