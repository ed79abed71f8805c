"""Number format, compilation, layout and memory: what they may change, and what they must not."""

import argparse
import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
from AHSG_HT import AHSG_HT
from models.resnet_cifar import CifarResNet
from models.vgg_cifar import CifarVGG
from utils.base.errors import UserError
from utils.small.cut import make_small
from utils.train.acceleration import Acceleration, CompiledForward, accelerate, choose_acceleration
from utils.train.distillation import Distillation
from utils.train.engine import cross_entropy, evaluate, to_device
from utils.train.losses import parse_term
from utils.train.setup import recalibrate

CPU = torch.device("cpu")
AMP = Acceleration(amp=True)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler"
)


def batch(n=8, seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (n,), generator=generator)


def network(seed=0, depth=8):
    torch.manual_seed(seed)
    return CifarResNet(depth, 10).to(memory_format=torch.channels_last).train()


def tiny_network():
    torch.manual_seed(0)
    block = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).train()


def options(**given):
    return argparse.Namespace(**({"amp": None, "compile": False, "deterministic": False, "tf32": False} | given))


# What is chosen


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "capability", "amp", "expected"),
    [
        (CPU, None, None, "float32"),
        (CPU, None, True, "bfloat16"),
        (GPU, 8, None, "bfloat16"),
        (GPU, 9, False, "float32"),
        (GPU, 7, None, "float32"),
    ],
)
def test_bfloat16_is_the_default_where_a_gpu_computes_in_it(monkeypatch, tf32_off, device, capability, amp, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 5))
    chosen = choose_acceleration(options(amp=amp), device)
    assert chosen.arithmetic == expected and f"arithmetic: {expected}," in str(chosen)


def test_what_the_machine_lacks_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match=r"--amp needs a GPU of compute capability 8\.0"):
        choose_acceleration(options(amp=True), GPU)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler"):
        choose_acceleration(options(compile=True), CPU)


def test_a_run_with_amp_keeps_float32_weights(train):
    try:
        folder = train("--epochs", 1, "--amp", "--deterministic")
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
    log = (folder / "log_seed_1.txt").read_text()
    assert "arithmetic: bfloat16, eager, channels_last, deterministic" in log
    saved = torch.load(folder / "checkpoint.resnet8.pth.tar", weights_only=True)
    assert {v.dtype for v in saved["state_dict"].values()} == {torch.float32, torch.int64}
    assert {v.dtype for s in saved["optimizer"]["state"].values() for v in s.values()} == {torch.float32}


@pytest.fixture
def tf32_off():
    """The two switches, set back afterwards."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    yield switches
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_an_arithmetic_of_its_own_and_never_that_of_tests(tf32, monkeypatch, tf32_off):
    """cuDNN's convolutions compute in TF32 by default: off without --tf32, and in every pass with --evaluate."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for switch in tf32_off:
        switch.allow_tf32 = True
    chosen = choose_acceleration(options(amp=False, tf32=tf32), GPU)
    assert chosen.arithmetic == ("TF32" if tf32 else "float32")
    seen = []
    net = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    net.register_forward_hook(lambda *_: seen.append([switch.allow_tf32 for switch in tf32_off]))
    pixels, labels = torch.zeros(4, 2, 1, 1, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    loader = data.DataLoader(data.ImageArrays(pixels, labels, [0.5] * 2, [0.5] * 2, augment=False), 4)
    evaluate(net, loader, CPU)
    recalibrate(net, loader, 1, CPU)
    assert seen == [[False, False]] * 2 and [switch.allow_tf32 for switch in tf32_off] == [tf32, tf32]


# bfloat16


def test_under_amp_convolutions_are_bfloat16_and_all_else_that_is_kept_is_float32():
    net, (images, labels) = network(), batch(32)
    seen, other = {}, copy.deepcopy(net)
    cross_entropy(other, images, labels)[0].backward()
    net.conv_1_3x3.register_forward_hook(lambda module, inputs, output: seen.update(conv=output.dtype))
    net.bn_1.register_forward_pre_hook(lambda module, inputs: seen.update(bn_input=inputs[0].detach()))
    loss, logits = accelerate(net, cross_entropy, CPU, AMP, 8)(net, images, labels)
    loss.backward()
    assert seen["conv"] == torch.bfloat16
    assert loss.dtype == logits.dtype == torch.float32 and torch.equal(loss, F.cross_entropy(logits, labels))
    assert torch.equal(logits, logits.bfloat16().float()), "the logits were computed in bfloat16"
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}
    a, b = (torch.cat([p.grad.flatten() for p in n.parameters()]) for n in (net, other))
    assert 0 < ((a - b).norm() / b.norm()).item() < 0.2
    # The statistics are those that float32 arithmetic gives of the bfloat16 activations.
    assert net.bn_1.running_mean.dtype == net.bn_1.running_var.dtype == torch.float32
    x = seen["bn_input"].double()
    n = x.numel() / x.shape[1]
    torch.testing.assert_close(net.bn_1.running_mean.double(), 0.1 * x.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    var = 0.9 + 0.1 * x.var((0, 2, 3), correction=0) * n / (n - 1)
    torch.testing.assert_close(net.bn_1.running_var.double(), var, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("term", ["feature:MSE", "stages:SmoothL1", "logits:KL", "logits:L1"])
def test_under_amp_distances_are_taken_in_float32(term):
    net, (images, labels) = network(), batch()
    distillation = Distillation(network(seed=1), net, images, [parse_term(term)])
    inputs, distance = [], distillation.losses[0]
    distillation.losses[0] = lambda *pair: (inputs.extend(pair[:2]), distance(*pair))[1]
    value, _ = accelerate(net, distillation, CPU, AMP, 8)(net, images, labels)
    assert {x.dtype for x in inputs} == {torch.float32} and value.dtype == torch.float32
    pairs = zip(inputs[::2], inputs[1::2], strict=True)
    exact = sum(distance(x.detach(), y, labels) for x, y in pairs)
    assert value.item() > exact.item() > 0


# Compilation


@pytest.fixture
def graphs():
    """Number of graphs that were compiled since the test began."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.fixture
def traced_only(monkeypatch):
    """Graphs are captured and guarded as ever and then run by Python: the number of compilations without their time."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compile(net, backend="aot_eager"))


SIZES = [24, 26, 28, 32, 32, 25, 15, 2, 1, 24]


def train_on(net, objective, sizes=SIZES):
    optimizer = AHSG_HT(net.parameters(), lr=0.01, momentum=0.9, v=0.1, HTrate=0.7)
    losses = []
    for seed, size in enumerate(sizes):
        loss, _ = objective(net, *batch(size, seed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "make",
    [
        lambda: CifarVGG(11, batch_norm=True).train(),
        lambda: make_small(network().eval(), batch(1, size=32)[0])[0].train(),
    ],
    ids=["vgg", "small network of torch.fx"],
)
def test_a_growing_mini_batch_compiles_once(graphs, traced_only, make):
    torch.manual_seed(0)
    net = make()
    forward = CompiledForward(net, 16)
    for seed, size in enumerate(SIZES):
        # Of one image VGG's last BatchNorm would see one value per channel.
        if size > 1 or not isinstance(net, CifarVGG):
            forward(batch(size, seed, size=32)[0]).sum().backward()
    assert graphs() == 1


def test_a_growing_mini_batch_compiles_once_with_a_teacher(graphs, traced_only):
    net = network()
    distillation = Distillation(network(seed=1), net, batch()[0], [parse_term("feature:MSE")])
    objective = accelerate(net, distillation, CPU, Acceleration(compile=True), 32)
    train_on(net, objective)
    assert graphs() == 2, "one of the student, one of the teacher"


@needs_compiler
def test_compiled_steps_are_those_of_the_eager_network(graphs):
    """Losses, weights and BatchNorm statistics over a growing schedule, with a short last mini-batch and one of a
    single image.
    """
    net, other = tiny_network(), tiny_network()
    compiled = train_on(net, accelerate(net, cross_entropy, CPU, Acceleration(compile=True), 32))
    assert graphs() == 1
    eager = train_on(other, cross_entropy)
    assert compiled == pytest.approx(eager, rel=1e-3)
    state, expected = net.state_dict(), other.state_dict()
    assert list(state) == list(expected), "no prefix, no other names"
    for name in state:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-2, atol=1e-4)


def test_a_compiled_run_leaves_ordinary_files_and_resumes(train, traced_only, graphs):
    folder = train("--epochs", 1, "--compile")
    saved = torch.load(folder / "checkpoint.resnet8.pth.tar", weights_only=True)
    assert list(saved["state_dict"]) == list(CifarResNet(8, 10).state_dict())
    assert (folder / "small.resnet8.pth.tar").is_file()
    train("--resume", folder / "checkpoint.resnet8.pth.tar", "--epochs", 2)
    assert (folder / "log_seed_1.txt").read_text().count("float32, compiled") == 2 and 1 <= graphs() <= 2


# Layout and memory


def test_channels_last_gradients_are_those_of_nchw():
    made, _ = to_device(torch.zeros(2, 3, 4, 4), torch.zeros(2), CPU)
    assert made.is_contiguous(memory_format=torch.channels_last)
    net, (images, labels) = network().double(), batch()
    images = images.double()
    other = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    cross_entropy(net, images, labels)[0].backward()
    cross_entropy(other, images.contiguous(), labels)[0].backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
