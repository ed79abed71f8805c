"""The path that AHSG_HT takes on a GPU, checked on machines with and without one.

Without: its arithmetic runs on the CPU beside the naive reference, and on torch's meta device, whose tensors hold no values, it is
seen that no operation asks for a value, touches a tensor of the host or makes one of a host list: each makes the host wait for a GPU.
"""

import contextlib
from collections import Counter

import pytest
import torch
from naive_ahsg import NaiveAHSG, filter_norm
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import AHSG_HT as ahsg_module
from AHSG_HT import AHSG_HT
from utils.bench.optimizer import OPTIMIZERS, build_net, one_step, parameters_with_gradients

META = torch.device("meta")
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
VARIANTS = {
    "recipe": dict(momentum=0.9, nesterov=True, weight_decay=5e-4, v=0.1),
    "plain": dict(),
    "released": dict(momentum=0.9, v=0.1, heavy_ball="released"),
    "l1": dict(norm=1),
    "element": dict(v=0.1, unit="element"),
    "tiny-v": dict(v=1e-9),
    "no-regrow": dict(v=0.1, regrow=False),
}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ---- its arithmetic ---------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_path(monkeypatch):
    """Every branch on the device's type goes the GPU's way, on a CPU."""
    monkeypatch.setattr(ahsg_module, "_threshold_in_place", ahsg_module._threshold_stacked)
    monkeypatch.setattr(ahsg_module, "CPU_LONG_ROW", 10**9)
    monkeypatch.setattr(ahsg_module, "CPU_BLOCK_ENTRIES", 10**9)


def convolutions():
    """Shapes that share their number of filters, layers that share their shape, 1x1, depthwise, a stem, and BatchNorms."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, (1, 3)),
        nn.Conv2d(8, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 8, 1, bias=False),
        nn.Linear(8, 4),
    ).double()


def fill_with_integers(tensors, generator):
    """Small integers: sums are exact and norms tie often."""
    for tensor in tensors:
        tensor.copy_(torch.randint(-2, 3, tensor.shape, generator=generator))


@LAYOUTS
@pytest.mark.parametrize("heavy_ball", ["paper", "released"])
@pytest.mark.parametrize("ranking", [dict(norm=2), dict(norm=1), dict(unit="element")], ids=["l2", "l1", "element"])
def test_is_the_naive_reference_bit_for_bit(gpu_path, ranking, heavy_ball, channels_last):
    """Powers of two as settings and integer gradients make every operation exact."""
    generator = torch.Generator().manual_seed(0)
    net = convolutions().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    params = list(net.parameters())
    with torch.no_grad():
        fill_with_integers(params, generator)
    recipe = dict(lr=0.5, momentum=0.5, nesterov=True, weight_decay=0.25, v=0.5, HTrate=0.5, heavy_ball=heavy_ball)
    optimizer, naive = AHSG_HT(params, **recipe, **ranking), NaiveAHSG(params, **recipe, **ranking)
    for _ in range(4):
        for p in params:
            p.grad = torch.empty_like(p)
        fill_with_integers([p.grad for p in params], generator)
        gradients = [p.grad.clone() for p in params]
        optimizer.update_HSG(1)
        optimizer.step()
        naive.update_HSG(1)
        naive.step(gradients)
        for p, x in zip(params, naive.x, strict=True):
            assert torch.equal(p.detach(), x), p.shape


@LAYOUTS
def test_equal_filters_keep_the_lower_indices_whatever_their_shape(gpu_path, channels_last):
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(1, *shape, generator=generator).repeat(10, 1, 1, 1))
        for shape in ((3, 3, 3), (5, 1, 1), (3, 3, 3), (1, 3, 3), (7, 1, 3))
    ]
    if channels_last:
        params = [nn.Parameter(p.detach().contiguous(memory_format=torch.channels_last)) for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    AHSG_HT(params, HTrate=0.4).step()
    for p in params:
        assert [filter_norm(w, 2) > 0 for w in p] == [True] * 4 + [False] * 6, p.shape


# ---- it never waits, as far as this shows without a GPU -----------------------------------------------------------------


class DeviceOnly(TorchDispatchMode):
    """Counts operations, and raises on one that takes or gives a tensor of the host."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if any(t.device.type == "cpu" for t in tensors):
            raise RuntimeError(f"{operation} touches a tensor of the host")
        if tensors and not operation.is_view:
            self.operations[operation.overloadpacket.__name__] += 1
        return result


class NoHostLists(TorchFunctionMode):
    """Raises where a tensor is made of a Python list, which no dispatch shows."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        indexes = function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        parts = args[1] if indexes and isinstance(args[1], tuple) else args[1:2]
        if function in (torch.tensor, torch.as_tensor) or (indexes and any(isinstance(part, list) for part in parts)):
            raise RuntimeError(f"{function} makes a tensor of a list")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched():
    """Raises on whatever would make the host wait for a GPU; gives the counted operations."""
    with NoHostLists(), DeviceOnly() as device_only:
        yield device_only.operations


def meta_parameters(*makers, channels_last):
    """The parameters of several networks on the meta device, with gradients of their layout."""
    with torch.device(META):
        nets = [make() for make in makers]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    params = [p for net in nets for p in net.to(memory_format=layout).parameters()]
    for p in params:
        p.grad = torch.empty_like(p)
    return params


@LAYOUTS
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_no_step_reads_a_value_or_touches_the_host(options, channels_last):
    params = meta_parameters(lambda: build_net("resnet20"), convolutions, channels_last=channels_last)
    optimizer = AHSG_HT(params, lr=0.1, HTrate=0.7, **options)
    with watched() as operations:
        for _ in range(3):  # state is made in the first step, the heavy ball moves from the second on
            one_step(optimizer)
    assert operations["sort"] > 0


@LAYOUTS
def test_depth_costs_no_operation(channels_last):
    counts = []
    for name in ("resnet20", "resnet56", "resnet110"):
        params = meta_parameters(lambda name=name: build_net(name), channels_last=channels_last)
        optimizer = OPTIMIZERS["AHSG-HT"](params)
        one_step(optimizer)
        with watched() as operations:
            one_step(optimizer)
        counts.append(operations)
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["sort"] == 3  # 16, 32 and 64 filters
    assert counts[0]["stack"] == counts[0]["linalg_vector_norm"] == 6  # shapes
    assert sum(counts[0].values()) < 50


@LAYOUTS
def test_copies_of_many_layers_are_between_equal_strides(channels_last, monkeypatch):
    """Between others foreach falls back to a kernel per tensor."""
    of_a_1x1_convolution = torch.empty_strided((64, 64, 1, 1), (64, 1, 64, 64), device=META)
    if channels_last and torch.empty_like(of_a_1x1_convolution).stride() != of_a_1x1_convolution.stride():
        pytest.skip("the meta device of this torch, unlike its CPU, gives copies of 1x1 filters other strides")
    params = meta_parameters(lambda: build_net("resnet50"), lambda: convolutions().float(), channels_last=channels_last)
    copied = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: (copied.extend(zip(to, of, strict=True)), copy(to, of)))
    optimizer = AHSG_HT(params, lr=0.1, v=0.1, HTrate=0.7)
    one_step(optimizer)
    one_step(optimizer)
    assert len(copied) > 100
    for to, of in copied:
        assert (to.stride(), to.dtype) == (of.stride(), of.dtype), to.shape


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: float(t[0]),
        lambda t: bool((t > 0).any()),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: t.unique(),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.add_(torch.tensor([1.0, 2.0], device=t.device)),
        lambda t: t[torch.tensor([0, 1])],
        lambda t: t[[1, 0]],
    ],
    ids=["item", "float", "bool", "mask", "nonzero", "unique", "tolist", "cpu", "list", "index-on-host", "index-list"],
)
def test_the_watch_sees_what_would_wait(wait):
    with pytest.raises((RuntimeError, NotImplementedError)), watched():
        wait(torch.ones(2, device=META))


def test_the_watch_sees_the_per_filter_loop():
    params = meta_parameters(convolutions, channels_last=False)
    with pytest.raises((RuntimeError, NotImplementedError)), watched():
        one_step(OPTIMIZERS["per-filter loop"](params))


# ---- on a GPU -----------------------------------------------------------------------------------------------------------


@NEEDS_GPU
@LAYOUTS
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_no_step_on_a_gpu_synchronizes(options, channels_last):
    params = parameters_with_gradients("resnet20", torch.device("cuda"), channels_last)
    optimizer = AHSG_HT(params, lr=0.1, HTrate=0.7, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            one_step(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_GPU
@LAYOUTS
def test_a_gpu_with_grad_scaler_takes_the_steps_of_a_cpu(channels_last):
    """Powers of two and integers again: exact on both, whatever the order of the sums."""
    recipe = dict(lr=0.5, momentum=0.5, nesterov=True, v=0.5, HTrate=0.5)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    nets = [convolutions().to(device, memory_format=layout) for device in ("cpu", "cuda")]
    for net in nets:
        with torch.no_grad():
            fill_with_integers(net.parameters(), torch.Generator().manual_seed(0))
    optimizers = [AHSG_HT(net.parameters(), **recipe) for net in nets]
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            p.grad, q.grad = torch.empty_like(p), torch.empty_like(q)
            fill_with_integers([p.grad], generator)
            q.grad.copy_(scaler.scale(p.grad.to(q.device)))
        one_step(optimizers[0])
        optimizers[1].update_HSG(1)
        scaler.step(optimizers[1], None, 1.0, 0, 1)
        scaler.update()
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            assert torch.equal(p, q.cpu()), p.shape
