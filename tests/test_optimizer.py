"""AHSG_HT: equal to SGD and to its naive reference, what H keeps, how it behaves as a torch optimizer."""

import copy
import io
import pickle
import random
import re

import pytest
import torch
from naive_ahsg import NaiveAHSG, brute_force_kept, filter_norm
from torch import nn
from torch.utils._pytree import tree_leaves

import AHSG_HT as ahsg_module
from AHSG_HT import AHSG_HT, NORMS, kept_count

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
BOTH_HEAVY_BALLS = pytest.mark.parametrize("heavy_ball", ["paper", "released"])

SGD_OPTIONS = {
    "plain": dict(),
    "momentum": dict(momentum=0.9),
    "dampening": dict(momentum=0.9, dampening=0.3),
    "nesterov": dict(momentum=0.9, nesterov=True),
}
# The released recipe's: two momenta stacked, Nesterov, weight decay, 30 % of the filters removed.
RECIPE = dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, v=0.1, HTrate=0.7)


def small_params(seed=0, dtype=torch.float32):
    """[bias, norm], [norm] and [bias] after a convolution, two convolutions of one shape, a 1x1, and a linear layer."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 7, 3),
        nn.BatchNorm2d(7),
        nn.Conv2d(7, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3),
        nn.Conv2d(6, 6, 3),
        nn.Conv2d(6, 5, (1, 3)),
        nn.Linear(5, 4),
    ).to(dtype)
    for p in net.parameters():
        if p.dim() == 1:
            nn.init.normal_(p)
    return list(net.parameters())


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
    return [leaf for leaf in tree_leaves(thing) if isinstance(leaf, torch.Tensor)]


# -- SGD, the naive reference, the heavy ball --


@BOTH_HEAVY_BALLS
@pytest.mark.parametrize("weight_decay", [0, 5e-4])
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
def test_keeping_all_without_heavy_ball_is_sgd_bit_for_bit(options, weight_decay, heavy_ball):
    ours, theirs = small_params(), small_params()
    optimizer = AHSG_HT(ours, lr=0.1, weight_decay=weight_decay, v=0, HTrate=1, heavy_ball=heavy_ball, **options)
    sgd = torch.optim.SGD(theirs, lr=0.1, weight_decay=weight_decay, **options)
    for t, gradients in enumerate(draw_gradients(ours, 30)):
        for params in (ours, theirs):
            set_gradients(params, gradients)
            if t % 2:
                for p in params[t % 3 :: 3]:
                    p.grad = None
        optimizer.update_HSG(1)
        optimizer.step()
        sgd.step()
        assert same_bits(ours, theirs)


NAIVE_OPTIONS = {
    "plain": dict(),
    "strong-heavy-ball": dict(v=0.6),
    "momentum+dampening": dict(momentum=0.9, dampening=0.3),
    "recipe": RECIPE,
    "no-regrowth": RECIPE | dict(regrow=False),
    **{f"norm-{norm}": RECIPE | dict(norm=norm) for norm in NORMS},
    "elements": RECIPE | dict(unit="element"),
    "elements-no-regrowth": dict(unit="element", regrow=False),
    "float32": RECIPE | dict(dtype=torch.float32),
}
# What happens at step t: (argument of update_HSG or None when it is not called, final).
CALLS = {
    "released-order": lambda t: (1, 1),
    "update_HSG(0)": lambda t: (0 if t % 5 == 3 else 1, 1),
    "final=0": lambda t: (1, int(t % 4 == 3)),
    "update_HSG-left-out": lambda t: (1 if t % 5 == 0 else None, 1),
    "all-mixed": lambda t: ((1, None, 0, 1, 0, None)[t % 6], int(t % 4 < 3)),
}


@BOTH_HEAVY_BALLS
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("options", NAIVE_OPTIONS.values(), ids=NAIVE_OPTIONS)
def test_follows_the_naive_reference_in_parameters_and_state(options, calls, heavy_ball):
    options = dict(lr=0.05, v=0.1, HTrate=0.7, heavy_ball=heavy_ball) | options
    dtype = options.pop("dtype", torch.float64)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    params = small_params(dtype=dtype)
    optimizer, naive = AHSG_HT(params, **options), NaiveAHSG(params, **options)
    for t, gradients in enumerate(draw_gradients(params, 13)):
        zero1, final = calls(t)
        set_gradients(params, gradients)
        if zero1 is not None:
            optimizer.update_HSG(zero1)
            naive.update_HSG(zero1)
        optimizer.step(None, 1 + 0.1 * t, 0, final)
        naive.step(gradients, final)
        assert same_bits([p.grad for p in params], gradients)
        for i, p in enumerate(params):
            assert torch.equal(p == 0, naive.x[i] == 0)
            state = optimizer.state[p]
            pairs = [(p, naive.x[i]), (state.get("momentum_buffer"), naive.buffers[i])]
            pairs += [(state.get("prev_data"), naive.prev[i])] if options["v"] else []
            pairs += [(state["kept"].expand(p.shape), naive.kept_factor(i))] if "kept" in state else []
            for ours, theirs in pairs:
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    torch.testing.assert_close(ours.detach().double(), theirs, rtol=tolerance, atol=tolerance)


def test_the_heavy_ball_speeds_up_a_quadratic_and_the_released_one_does_not_move():
    """Curvatures 1 to 100: Polyak's step and weight shrink the error by 0.82 a step, plain descent by 0.98 at best."""
    curvature, errors = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64), {}
    for name, lr, heavy_ball in (("paper", 4 / 11**2, "paper"), ("released", 2 / 101, "released")):
        x = nn.Parameter(torch.ones_like(curvature))
        optimizer = AHSG_HT([x], lr=lr, v=(9 / 11) ** 2, heavy_ball=heavy_ball)
        for _ in range(60):
            x.grad = curvature * x.detach()
            optimizer.update_HSG(1)
            optimizer.step()
        errors[name] = float(x.detach().norm())
    assert errors["paper"] < 1e-2 < 0.3 < errors["released"] < 0.5


# -- what H keeps --


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
@pytest.mark.parametrize("unit", ["filter", "element"])
@pytest.mark.parametrize("norm", NORMS)
def test_what_is_kept_is_the_brute_force_top_k_with_ties(norm, unit, device):
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    for _ in range(150):
        shape, rate = random_case(rng, largest=24 if unit == "filter" else 6)
        if unit == "element":
            shape = rng.choice([shape, shape[:2], (shape[0] * shape[1],)])
        target, g = integers(shape, rng, generator), integers(shape, rng, generator)
        # The step of length 1 lands on `target` exactly. The bias shows which filters stay, zero filters among them.
        weight, bias = nn.Parameter((target + g).to(device)), nn.Parameter(torch.ones(shape[0], device=device))
        weight.grad, bias.grad = g.to(device), torch.zeros_like(bias)
        AHSG_HT([weight, bias] if unit == "filter" else [weight], lr=1.0, HTrate=rate, norm=norm, unit=unit).step()
        scores = [filter_norm(w, norm) for w in target] if unit == "filter" else target.abs().flatten().tolist()
        kept = brute_force_kept(scores, rate)
        mask = torch.tensor([float(i in kept) for i in range(len(scores))])
        if unit == "filter":
            assert torch.equal(bias.detach().cpu(), mask), (shape, rate)
        mask = mask.view(-1, 1, 1, 1) if unit == "filter" else mask.view(shape)
        assert torch.equal(weight.detach().cpu(), target * mask), (shape, rate)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", NORMS)
def test_equal_filters_of_any_values_keep_the_lower_indices(norm, layout, device):
    generator = torch.Generator().manual_seed(1)
    for channels in range(1, 70, 3):
        values = torch.randn(1, channels, 3, 3, generator=generator).repeat(40, 1, 1, 1)
        weight = nn.Parameter(values.to(device, memory_format=layout))
        threshold_only([weight], HTrate=0.5, norm=norm)
        assert kept_filters(weight) == set(range(20)), channels


def test_bfloat16_filters_are_ranked_by_float32_norms():
    """The norms 1 and 1.00195 are one number in bfloat16, where the tie would keep the first."""
    values = torch.tensor([[1.0, 0.0], [1.0, 0.0625]], dtype=torch.bfloat16).view(2, 2, 1, 1)
    weight = nn.Parameter(values.clone())
    threshold_only([weight], HTrate=0.5)
    assert kept_filters(weight) == {1}


@pytest.mark.parametrize("layer", [nn.Linear(10, 10), nn.Embedding(10, 10), nn.Conv1d(10, 10, 3), nn.BatchNorm2d(10)])
def test_only_four_dimensional_weights_are_thresholded(layer):
    nn.init.ones_(next(layer.parameters()))
    before, depthwise = snapshot(layer.parameters()), nn.Conv2d(10, 10, 3, groups=10, bias=False)
    threshold_only([*layer.parameters(), depthwise.weight], HTrate=0.7)
    assert same_bits(layer.parameters(), before) and len(kept_filters(depthwise.weight)) == 7
    assert [kept_count(n, rate) for n, rate in ((16, 0.7), (90, 0.7), (100, 0.29), (10, 0.99))] == [11, 63, 29, 9]


# -- what belongs to a filter, and whether it comes back --


@pytest.mark.parametrize("order", ["PReLU after BatchNorm", "pre-activation"])
def test_an_order_that_does_not_tell_is_refused_naming_the_remedy(order):
    conv, norm = nn.Conv2d(4, 4, 1, bias=order.startswith("PReLU")), nn.BatchNorm2d(4)
    rest = nn.PReLU(4) if conv.bias is not None else nn.Conv2d(4, 4, 1, bias=False)
    params = [p for layer in (conv, norm, rest) for p in layer.parameters()]
    with pytest.raises(ValueError, match="additives="):
        AHSG_HT(params, HTrate=0.5)
    AHSG_HT(params, HTrate=0.5, additives={conv.weight: [norm.bias]})


def test_given_additives_are_zeroed_in_any_group_and_nothing_else():
    """The order would give the convolution's bias and the slope."""
    conv, norm, slope = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4)
    nn.init.ones_(conv.bias), nn.init.ones_(norm.bias)
    groups = [[norm.weight, norm.bias], [conv.weight, conv.bias, slope.weight]]
    optimizer = AHSG_HT([{"params": g} for g in groups], lr=0.1, HTrate=0.5, additives={conv.weight: [norm.bias]})
    set_gradients(groups[0] + groups[1], [torch.zeros_like(p) for p in groups[0] + groups[1]])
    optimizer.step()
    assert torch.equal(norm.bias == 0, conv.weight.flatten(1).eq(0).all(1)) and norm.bias.sum() == 2
    assert all(p.ne(0).all() for p in (norm.weight, conv.bias, slope.weight))
    with pytest.raises(ValueError, match=r"\(4, 2, 1, 1\).*\(3,\)"):
        AHSG_HT([conv.weight], additives={conv.weight: [torch.ones(3)]})


@pytest.mark.parametrize("regrow", [True, False])
def test_a_removed_filter_comes_back_with_regrow_only(regrow):
    """Of four filters 1 and 2 are the weakest; biases go and come with them, the norm's weight stays."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(3, 4))
    for p in net.parameters():
        nn.init.ones_(p)
    with torch.no_grad():
        net[0].weight *= torch.tensor([4.0, 1.0, 2.0, 3.0]).view(4, 1, 1, 1)
    params = list(net.parameters())
    optimizer = AHSG_HT(params, lr=1.0, HTrate=0.5, regrow=regrow)
    for pull in (0.0, -5.0):
        set_gradients(params, [torch.zeros_like(p) for p in params])
        for p in params[:4]:
            p.grad[1] = pull
        optimizer.step()
    assert kept_filters(net[0].weight) == ({0, 1} if regrow else {0, 3})
    assert [net[0].bias[1], net[1].bias[1], net[1].weight[1]] == ([5, 5, 6] if regrow else [0, 0, 6])


@pytest.mark.parametrize("unit", ["filter", "element"])
@pytest.mark.parametrize("HTrate", [1, 0.7])
def test_a_weight_that_starts_at_zero_is_not_removed(HTrate, unit):
    weight = nn.Parameter(torch.ones(10, 2, 1, 1))
    nn.init.zeros_(weight[:1].detach())
    optimizer = AHSG_HT([weight], lr=1.0, HTrate=HTrate, unit=unit, regrow=False)
    weight.grad = torch.zeros_like(weight)
    weight.grad[0] = -2.0
    optimizer.step()
    assert weight[0].eq(2).all()


def test_what_a_schedule_removed_by_state_stays_zero_also_after_loading():
    params = small_params()
    optimizer = AHSG_HT(params, **RECIPE | dict(HTrate=1))
    weight, bias = params[2:4]
    optimizer.state[params[0]]["kept"] = torch.tensor([1.0, 0, 1, 1, 0, 1, 1]).view(-1, 1, 1, 1)
    optimizer.state[bias]["kept"] = torch.tensor([1.0, 0, 1, 1, 0, 1, 1])
    train(params, optimizer, draw_gradients(params, 3))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = AHSG_HT(params, **RECIPE | dict(HTrate=1))
    optimizer.load_state_dict(state)
    train(params, optimizer, draw_gradients(params, 3))
    assert kept_filters(params[0]) == {0, 2, 3, 5, 6} == set(bias.nonzero().flatten().tolist())
    assert all(p.ne(0).all() for p in (weight, *params[4:]))


# -- a well-behaved torch optimizer --


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    p = nn.Parameter(torch.ones(2))

    def closure():
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert AHSG_HT([p], lr=0.25).step(closure) == 2
    assert p.tolist() == [0.5, 0.5]


def test_a_frozen_norm_bias_or_convolution_stays():
    params = small_params()
    set_gradients(params, draw_gradients(params, 1)[0])
    params[3].grad = params[4].grad = None  # the first BatchNorm's bias, the second convolution
    AHSG_HT(params, **RECIPE).step()
    assert len(kept_filters(params[0])) == 4 and params[3].ne(0).all() and params[2].ne(0).all()
    assert len(kept_filters(params[4])) == 6 and params[6].ne(0).all()


BAD_OPTIONS = [dict(lr=-0.1), dict(lr=float("nan")), dict(lr=10**400), dict(momentum="x"), dict(weight_decay=-5e-4)]
BAD_OPTIONS += [dict(v=None), dict(HTrate=0.0), dict(HTrate=1.5), dict(HTrate=0.1)]  # 0.1: none of seven filters
BAD_OPTIONS += [dict(heavy_ball="polyak"), dict(norm=3), dict(unit="channel"), dict(regrow=1), dict(nesterov="no")]
BAD_OPTIONS += [dict(momentum=0.0, nesterov=True), dict(dampening=0.25, momentum=0.9, nesterov=True)]


@pytest.mark.parametrize("bad", BAD_OPTIONS, ids=lambda bad: str(bad)[:30])
def test_bad_options_are_refused_by_name_and_value_before_anything_changes(bad):
    """At construction, in a new group, and from a schedule."""
    name, value = next(iter(bad.items()))
    refused = pytest.raises(ValueError, match=f"{name}.*{re.escape(str(value))}")
    params = small_params()
    with refused:
        AHSG_HT(params, **bad)
    optimizer = AHSG_HT([dict(params=params[4:])], **RECIPE)
    with refused:
        optimizer.add_param_group(dict(params=params[:4], **bad))
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group(dict(params=params[:4]))
    train(params, optimizer, draw_gradients(params, 2))
    before, state_before = snapshot(params), copy.deepcopy(optimizer.state_dict()["state"])
    for zero1, final, named in ((2, 1, r"zero1.*2"), (1, 7, r"final.*7")):
        with pytest.raises(ValueError, match=named):
            optimizer.update_HSG(zero1)
            optimizer.step(None, 1.0, 0, final)
    gradient, params[2].grad = params[2].grad, params[2].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    params[2].grad = gradient
    optimizer.param_groups[1].update(bad)
    with refused:
        optimizer.step()
    assert same_bits(params, before)
    assert same_bits(tensors_in(optimizer.state_dict()["state"]), tensors_in(state_before))


def trained(**options):
    params = small_params()
    optimizer = AHSG_HT(params, **RECIPE | options)
    train(params, optimizer, draw_gradients(params, 6))
    return params, optimizer


@BOTH_HEAVY_BALLS
def test_param_groups_hold_no_tensors_and_state_has_the_parameters_dtype(heavy_ball):
    params, optimizer = trained(heavy_ball=heavy_ball, regrow=False)
    assert [id(t) for t in tensors_in(optimizer.param_groups)] == [id(p) for p in params]
    for p in params:
        assert p.is_leaf
        assert all(t.dtype == p.dtype and not t.requires_grad for t in tensors_in(optimizer.state[p]))
    assert set(vars(optimizer)) - set(vars(torch.optim.SGD(params, lr=0.1))) == {"additives"}


def through_a_file(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied = AHSG_HT([nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]], lr=9.0)
    copied.load_state_dict(torch.load(file, weights_only=True))
    return copied


@BOTH_HEAVY_BALLS
@pytest.mark.parametrize("regrow", [True, False])
@pytest.mark.parametrize("copy_of", [through_a_file, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_continue_bit_identically(copy_of, regrow, heavy_ball):
    params, optimizer = trained(heavy_ball=heavy_ball, regrow=regrow)
    if copy_of is not through_a_file:
        optimizer.additives = {params[0]: [params[3]]}
    copied = copy_of(optimizer)
    copies = copied.param_groups[0]["params"]
    for gradients in draw_gradients(params, 5, seed=9):
        train(params, optimizer, [gradients])
        train(copies, copied, [gradients])
        assert same_bits(params, copies) and params[0] is not copies[0]


def test_groups_have_their_own_options_and_follow_a_scheduler():
    groups = [small_params(0), small_params(1)]
    optimizer = AHSG_HT(groups[0], **RECIPE)
    optimizer.add_param_group(dict(params=groups[1], HTrate=0.5, v=0.3))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.2)
    alone = small_params(1)
    other = AHSG_HT(alone, **RECIPE | dict(HTrate=0.5, v=0.3))
    for t, gradients in enumerate(draw_gradients(alone, 5)):
        other.param_groups[0]["lr"] = RECIPE["lr"] * 0.2 ** (t // 2)
        set_gradients(groups[0], gradients)
        train(groups[1], optimizer, [gradients])
        train(alone, other, [gradients])
        scheduler.step()
    torch.testing.assert_close(groups[1], alone)
    assert [len(kept_filters(g[0])) for g in groups] == [4, 3]


def test_a_heavy_ball_that_a_schedule_turns_off_begins_anew():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = AHSG_HT([p], lr=0.5, v=0.1)
    moves = []
    for v in (0.1, 0.1, 0, 0.1, 0.1):
        optimizer.param_groups[0]["v"], before = v, p.detach().clone()
        train([p], optimizer, [[torch.ones(3)]])
        moves.append(float((p.detach() - before)[0]))
    assert moves == pytest.approx([-0.5, -0.55, -0.5, -0.5, -0.55])


def test_transposed_convolutions_are_thresholded_along_their_inputs():
    """Their biases belong to outputs, and stay."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(6, 4, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    threshold_only([*layer.parameters()], HTrate=0.5)
    strongest = weight.flatten(1).norm(dim=1).topk(3).indices.sort().values
    assert torch.equal(layer.weight.flatten(1).any(1).nonzero().flatten(), strongest) and torch.equal(layer.bias, bias)


@BOTH_HEAVY_BALLS
def test_grad_scaler_steps_are_the_unscaled_steps_and_a_skipped_one_changes_nothing(heavy_ball):
    """Scaling by powers of two is exact."""
    (scaled, optimizer), (plain, other) = trained(heavy_ball=heavy_ball), trained(heavy_ball=heavy_ball)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for gradients in draw_gradients(scaled, 3):
        for broken in (True, False):
            set_gradients(scaled, [scaler.scale(g) for g in gradients])
            if broken:
                scaled[2].grad[0] = float("inf")
            else:
                optimizer.update_HSG(1)
            scaler.step(optimizer, None, 1.0, 0, 1)
            scaler.update()
        train(plain, other, [gradients])
        assert same_bits(scaled, plain)
    assert scaler.get_scale() == 2.0**7


@BOTH_HEAVY_BALLS
@pytest.mark.parametrize("unit", ["filter", "element"])
@pytest.mark.parametrize("device", DEVICES)
def test_channels_last_and_blocks_of_one_parameter_change_no_bit(device, unit, heavy_ball, monkeypatch):
    params = [p.detach().to(device).requires_grad_() for p in small_params()]
    others = [
        (p.detach().to(memory_format=torch.channels_last) if p.dim() == 4 else p.detach().clone()).requires_grad_()
        for p in params
    ]
    assert not others[0].is_contiguous()
    optimizer = AHSG_HT(params, heavy_ball=heavy_ball, unit=unit, **RECIPE)
    other = AHSG_HT(others, heavy_ball=heavy_ball, unit=unit, **RECIPE)
    for gradients in draw_gradients(params, 12):
        train(params, optimizer, [gradients])
        with monkeypatch.context() as patch:
            patch.setattr(ahsg_module, "CPU_BLOCK_ENTRIES", 1)
            train(others, other, [[torch.empty_like(p).copy_(g) for p, g in zip(others, gradients, strict=True)]])
        assert same_bits(params, others)
    assert not others[0].is_contiguous()
