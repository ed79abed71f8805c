"""The networks against naive forward passes, torchvision's layouts and the papers' counts; networks from files."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from models import public
from models.resnet_cifar import CifarResNet, OptionA
from models.vgg_cifar import CifarVGG
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.base.torchvision_import import import_torchvision

SHARED = Path(__file__).parents[2] / "shared"
PRETRAINED = sorted((SHARED / "pretrained").glob("*.th"))
BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}  # per stage
PARAMETERS = [269_722, 464_154, 658_586, 853_018, 1_727_962]
CONFIGURATIONS = {11: "A", 13: "B", 16: "D", 19: "E"}
VGGS = {f"vgg{depth}{bn}": (letter, bool(bn)) for bn in ("", "_bn") for depth, letter in CONFIGURATIONS.items()}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def images(n=2):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(net, *, seed=0):
    """In eval mode, every parameter and statistic different from its initial value."""
    torch.manual_seed(seed)
    models.initialise(net)
    for name, value in net.state_dict().items():
        if value.dim() == 1:
            value.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else value.normal_(0, 0.1)
    return net.eval()


def saved(path, content, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def same_weights(net, weights):
    return all(torch.equal(value, weights[name]) for name, value in net.state_dict().items() if name in weights)


def naive_option_a(x, channels, front=0):
    """The shortcut pixel by pixel: every second one, zeros in the channels that x lacks, `front` of them before x."""
    batch, have, height, width = x.shape
    y = torch.zeros(batch, channels, (height + 1) // 2, (width + 1) // 2, dtype=x.dtype)
    for c in range(have):
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                y[:, front + c, i, j] = x[:, c, 2 * i, 2 * j]
    return y


def naive_resnet(weights, x, *, is_public=False):
    """Logits, features and stage outputs, from the state dict and the paper's figure; `is_public`: of akamaster's."""
    stem, block_name, halves = ("conv_1_3x3", "bn_1"), "stage_{}.{}.", (("conv_a", "bn_a"), ("conv_b", "bn_b"))
    if is_public:
        stem, block_name, halves = ("conv1", "bn1"), "layer{}.{}.", (("conv1", "bn1"), ("conv2", "bn2"))

    def convolution(x, prefix, names, stride=1):
        x = F.conv2d(x, weights[f"{prefix}{names[0]}.weight"], stride=stride, padding=1)
        parameters = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(weights[f"{prefix}{names[1]}.{n}"] for n in parameters))

    x = convolution(x, "", stem).relu()
    stages = []
    for stage in (1, 2, 3):
        for i in range(sum(f"{block_name.format(stage, n)}{halves[0][0]}.weight" in weights for n in range(20))):
            down, block = stage > 1 and i == 0, block_name.format(stage, i)
            y = convolution(x, block, halves[0], 2 if down else 1).relu()
            y = convolution(y, block, halves[1])
            x = naive_option_a(x, y.shape[1], y.shape[1] // 4 if is_public else 0) if down else x
            x = (x + y).relu()
        stages.append(x)
    logits = features = x.mean((2, 3))
    for layer in ("classifier", "classifier1", "classifier2", "linear"):
        if f"{layer}.weight" in weights:
            logits = logits @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
    return logits, features, stages


def torchvision_features(arch):
    letter, batch_norm = VGGS[arch]
    vgg = import_torchvision().models.vgg
    return vgg.make_layers(vgg.cfgs[letter], batch_norm)


# The registry


def test_registry():
    assert {*BLOCKS, *VGGS} <= set(models.REGISTRY) and models.vgg11_bn(100).num_classes == 100
    with pytest.raises(UserError, match=r"alexnet.*resnet20.*vgg19_bn"):
        models.build("alexnet")
    with pytest.raises(AttributeError, match="alexnet"):
        _ = models.alexnet
    for network in (CifarResNet, CifarVGG):
        with pytest.raises(ValueError, match=r"depth must be .* 21$"):
            network(21)


def test_the_number_of_classes_is_read_off_any_head(tmp_path, monkeypatch):
    def make(num_classes=10):
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, num_classes, 1))

    monkeypatch.setitem(models.REGISTRY, "toy", make)
    path = saved(tmp_path / "toy.pth", models.build("toy", 7).state_dict())
    assert models.load(path, "toy").num_classes == 7


# ResNet


@pytest.mark.parametrize(("arch", "blocks"), BLOCKS.items())
def test_resnet_specification(arch, blocks):
    """Parameters, state-dict names in order, shapes."""
    with torch.device("meta"):
        net = models.build(arch)
        logits, features, stages = net(torch.empty(2, 3, 32, 32), return_features=True)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[list(BLOCKS).index(arch)]
    names = ["conv_1_3x3.weight", *(f"bn_1.{n}" for n in BATCH_NORM)]
    for block in (f"stage_{stage}.{i}" for stage in (1, 2, 3) for i in range(blocks)):
        for half in "ab":
            names += [f"{block}.conv_{half}.weight", *(f"{block}.bn_{half}.{n}" for n in BATCH_NORM)]
    assert list(net.state_dict()) == [*names, "classifier.weight", "classifier.bias"]
    assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))
    assert [logits.shape, features.shape] == [(2, 10), (2, 64)]
    assert [s.shape for s in stages] == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]


@pytest.mark.parametrize(("arch", "head_width"), [("resnet20", None), ("resnet20", 20), ("resnet32", None)])
def test_resnet_is_the_naive_one(arch, head_width):
    """Logits, features and stage outputs, in float64; with two layers in the head no activation between them."""
    net = trained(models.build(arch, head_width=head_width)).double()
    with torch.no_grad():
        ours = net(images().double(), return_features=True)
        torch.testing.assert_close(ours, naive_resnet(net.state_dict(), images().double()))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_shortcut_is_option_a(layout):
    """Value and gradient; that in the layout of the images: another one makes every operation before it slow."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, 8, generator=generator).to(memory_format=layout).requires_grad_()
    weight = torch.randn(2, 5, 4, 4, generator=generator).to(memory_format=layout)
    assert torch.equal(OptionA(2)(x), naive_option_a(x, 5))
    (ours,) = torch.autograd.grad((OptionA(2)(x) * weight).sum(), x)
    (naive,) = torch.autograd.grad((naive_option_a(x, 5) * weight).sum(), x)
    assert torch.equal(ours, naive) and ours.is_contiguous(memory_format=layout)


# VGG


@pytest.mark.parametrize("arch", VGGS)
def test_vgg_specification(arch):
    """Layers of torchvision's names and shapes, head, shapes."""
    with torch.device("meta"):
        net, theirs = models.build(arch, 100), torchvision_features(arch).state_dict()
        logits, features, stages = net(torch.empty(2, 3, 32, 32), return_features=True)
    assert [(n, v.shape) for n, v in net.features.state_dict().items()] == [(n, v.shape) for n, v in theirs.items()]
    head = [(name, *layer.weight.shape) for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    assert head == [("classifier.0", 512, 512), ("classifier.3", 512, 512), ("classifier.6", 100, 512)]
    assert [m.p for m in net.classifier if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    assert [logits.shape, features.shape] == [(2, 100), (2, 512)]
    assert [s.shape[1:] for s in stages] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1)]


@pytest.mark.parametrize("arch", ["vgg11", "vgg13_bn"])
def test_vgg_is_the_naive_one(arch):
    net = trained(models.build(arch)).double()
    layers = torchvision_features(arch).double().eval()
    layers.load_state_dict(net.features.state_dict())
    with torch.no_grad():
        logits, features, stages = net(images().double(), return_features=True)
        x, pooled = images().double(), []
        for layer in layers:
            x = layer(x)
            pooled += [x] if isinstance(layer, nn.MaxPool2d) else []
        x = x.flatten(1)
        torch.testing.assert_close((features, stages), (x, pooled))
        for i in (0, 3, 6):
            x = x @ net.classifier[i].weight.T + net.classifier[i].bias
            x = x.relu() if i < 6 else x
        torch.testing.assert_close(logits, x)


# Any of them


@pytest.mark.parametrize("arch", ["resnet20", "vgg11_bn"])
def test_initial_weights(arch):
    """Convolutions N(0, sqrt(2/(kh*kw*C_out))), linear layers N(0, sqrt(2/fan_in)); bounds of five standard errors."""
    torch.manual_seed(0)
    for layer in models.build(arch, 1000).modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            is_conv = isinstance(layer, nn.Conv2d)
            z = layer.weight.detach() / math.sqrt(2 / (9 * layer.out_channels if is_conv else layer.in_features))
            assert abs(z.mean()) < 5 / math.sqrt(z.numel()) and abs(z.std() - 1) < 5 / math.sqrt(2 * z.numel())
            assert is_conv or z.abs().max() > 3.5  # beyond what a uniform distribution has
        if getattr(layer, "bias", None) is not None:
            assert layer.bias.eq(0).all()


# Files


@pytest.mark.parametrize("kind", ["checkpoint", "legacy", "module.", "no num_batches_tracked"])
@pytest.mark.parametrize(("arch", "options"), [("resnet20", {"head_width": 5}), ("vgg11_bn", {})])
def test_a_file_gives_its_network(tmp_path, arch, options, kind):
    """Classes and head are read off the weights; the weights are those that were saved."""
    weights = trained(models.build(arch, 100, **options)).state_dict()
    if kind == "no num_batches_tracked":
        weights = {name: value for name, value in weights.items() if "num_batches_tracked" not in name}
    content = {f"module.{name}": value for name, value in weights.items()} if kind == "module." else weights
    content = {"arch": arch, "epoch": 3, "state_dict": content} if kind == "checkpoint" else content
    path = saved(tmp_path / "file.pth", content, legacy=kind == "legacy")
    net = models.load(path, None if kind == "checkpoint" else arch)
    assert same_weights(net, weights) and net.num_classes == 100
    assert not any(m.training for m in net.modules())


STEM, HEAD = "conv_1_3x3.weight", "classifier.weight"


@pytest.mark.parametrize(
    ("arch", "changes", "named"),
    [
        ("resnet32", {}, "no 'stage_1.3.conv_a.weight' in the file"),
        (
            "resnet20",
            {"layer2.0.downsample.0.weight": torch.ones(2, 2)},
            "'layer2.0.downsample.0.weight' of the file has",
        ),
        ("vgg11_bn", {}, "no 'classifier.6.weight'"),
        (None, {}, "does not name its network"),
        ("alexnet2", {}, "unknown network 'alexnet2'"),
        ("alexnet", {}, "has no weights of alexnet"),
        ("resnet20", {STEM: torch.zeros(16, 1, 3, 3)}, rf"{STEM}.*\[16, 1, 3, 3\].*\[16, 3, 3, 3\]"),
        ("resnet20", {HEAD: torch.ones(())}, f"no '{HEAD}'"),
    ],
)
def test_weights_of_another_network_are_named(tmp_path, arch, changes, named):
    path = saved(tmp_path / "other.pth", models.build("resnet20").state_dict() | changes)
    with pytest.raises(UserError, match=rf"other\.pth.*{named}|^{named}"):
        models.load(path, arch)


# Public files


def public_weights(blocks, seed=0):
    """Random weights under the names of akamaster's networks."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def add(conv, norm, c_out, c_in):
        weights[f"{conv}.weight"] = torch.randn(c_out, c_in, 3, 3, generator=generator) / math.sqrt(9 * c_in)
        for name in BATCH_NORM[:4]:
            weights[f"{norm}.{name}"] = torch.rand(c_out, generator=generator) + 0.5

    add("conv1", "bn1", 16, 3)
    for stage, width, before in ((1, 16, 16), (2, 32, 16), (3, 64, 32)):
        for i in range(blocks):
            add(f"layer{stage}.{i}.conv1", f"layer{stage}.{i}.bn1", width, width if i else before)
            add(f"layer{stage}.{i}.conv2", f"layer{stage}.{i}.bn2", width, width)
    weights["linear.weight"] = torch.randn(10, 64, generator=generator) / 8
    return {**weights, "linear.bias": torch.randn(10, generator=generator)}


def check_public(path, arch):
    """The network of a public file against the naive one, whose shortcuts pad on both sides."""
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    weights = {name.removeprefix("module."): value.double() for name, value in weights.items()}
    net, checkpoint = models.load_with_checkpoint(path)
    assert (checkpoint["arch"], checkpoint["normalisation"]) == (arch, public.NORMALISATION)
    with torch.no_grad():
        logits, x = net.double()(images(1).double()), images(1).double()
        torch.testing.assert_close(logits, naive_resnet(weights, x, is_public=True)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("arch", "blocks"), [("resnet8", 1), ("resnet20", 3)])
def test_public_resnet_is_the_naive_one(tmp_path, arch, blocks):
    """And one of this project is not taken for it."""
    weights = {f"module.{name}": value for name, value in public_weights(blocks).items()}
    check_public(saved(tmp_path / "public.th", {"state_dict": weights, "best_prec1": 91.0}, legacy=True), arch)
    checkpoints.write({"state_dict": public_weights(1)}, tmp_path / "own.pth.tar")
    assert "conv1.weight" in models.load_checkpoint(tmp_path / "own.pth.tar", "resnet8")["state_dict"]


@pytest.mark.parametrize("name", ["layer2.0.shortcut.0.weight", "fc.weight", "layer1.0.conv1.weight"])
def test_cifar_resnets_of_another_kind_are_refused_by_what_differs(tmp_path, name):
    path = saved(tmp_path / "other.th", public_weights(1) | {name: torch.ones(64, 16, 1, 1)})
    with pytest.raises(UserError, match=f"another kind: it has '{name}'"):
        models.load(path, "resnet8")


@pytest.mark.parametrize("path", PRETRAINED or [None], ids=lambda path: path and path.name)
def test_pretrained_files_are_read(path):
    if path is None:
        pytest.skip(f"no public checkpoints in {SHARED / 'pretrained'}")
    check_public(path, path.name.partition("-")[0])


def test_a_network_keeps_its_normalisation(tmp_path):
    """Fed with images normalised otherwise it returns what it returns for its own."""
    path = saved(tmp_path / "public.th", public_weights(1))
    net, own = models.load(path), models.load_checkpoint(path)["normalisation"]
    fed = {"mean": [0.3, 0.5, 0.7], "std": [0.1, 0.2, 0.4]}
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x, y = ((pixels - torch.tensor(n["mean"]).view(3, 1, 1)) / torch.tensor(n["std"]).view(3, 1, 1) for n in (own, fed))
    with torch.no_grad():
        expected, names = net(x), list(net.state_dict())
        assert torch.equal(models.renormalise(net, own, own)(x), expected)
        models.renormalise(net, own, fed)
        assert list(net.state_dict()) == names and not torch.allclose(net(x), expected, rtol=1e-4, atol=1e-4)
        for called in (net, torch.compile(net, backend="eager")):
            torch.testing.assert_close(called(y), expected, rtol=1e-4, atol=1e-4)
    checkpoints.write({"arch": "resnet8", "state_dict": net.state_dict(), "normalisation": own}, tmp_path / "own")
    assert models.load_checkpoint(tmp_path / "own")["normalisation"] == own
