"""The networks against naive forward passes, torchvision's layouts and the parameter counts of the papers; reading files."""

import math
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from utils.base.errors import UserError
from utils.base.torchvision_import import import_torchvision

RELEASED = Path(__file__).parents[2] / "shared" / "released" / "best.cifar10_resnet20.pth.tar"
RESNETS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}  # blocks per stage
PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
}
CONFIGURATIONS = {11: "A", 13: "B", 16: "D", 19: "E"}
VGGS = {f"vgg{depth}{bn}": (letter, bool(bn)) for depth, letter in CONFIGURATIONS.items() for bn in ("", "_bn")}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def images(n=2):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(arch, **options):
    """A network in eval mode whose every parameter and statistic differs from its initial value."""
    torch.manual_seed(0)
    net = models.build(arch, **options)
    for name, value in net.state_dict().items():
        if value.dim() == 1:
            value.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else value.normal_(0, 0.1)
    return net.eval()


def saved(path, content, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def naive_option_a(x, channels):
    """The shortcut pixel by pixel: every second one, zeros in the channels that x lacks."""
    batch, have, height, width = x.shape
    y = torch.zeros(batch, channels, (height + 1) // 2, (width + 1) // 2, dtype=x.dtype)
    for c in range(have):
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                y[:, c, i, j] = x[:, c, 2 * i, 2 * j]
    return y


def naive_resnet(weights, x, blocks):
    """Logits, features and stage outputs, from the state dict and the paper's figure alone."""

    def convolution(x, name, norm, stride=1):
        x = F.conv2d(x, weights[f"{name}.weight"], stride=stride, padding=1)
        mean, var, weight, bias = (
            weights[f"{norm}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = convolution(x, "conv_1_3x3", "bn_1").relu()
    stages = []
    for stage in (1, 2, 3):
        for i in range(blocks):
            down = stage > 1 and i == 0
            block = f"stage_{stage}.{i}"
            y = convolution(x, f"{block}.conv_a", f"{block}.bn_a", 2 if down else 1).relu()
            y = convolution(y, f"{block}.conv_b", f"{block}.bn_b")
            x = (y + (naive_option_a(x, y.shape[1]) if down else x)).relu()
        stages.append(x)
    features = x.mean((2, 3))
    logits = features
    for layer in ("classifier", "classifier1", "classifier2"):
        if f"{layer}.weight" in weights:
            logits = logits @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
    return logits, features, stages


def resnet_names(blocks):
    names = ["conv_1_3x3.weight", *(f"bn_1.{n}" for n in BATCH_NORM)]
    for stage in (1, 2, 3):
        for i in range(blocks):
            for half in "ab":
                names.append(f"stage_{stage}.{i}.conv_{half}.weight")
                names += [f"stage_{stage}.{i}.bn_{half}.{n}" for n in BATCH_NORM]
    return [*names, "classifier.weight", "classifier.bias"]


def torchvision_features(arch):
    letter, batch_norm = VGGS[arch]
    vgg = import_torchvision().models.vgg
    return vgg.make_layers(vgg.cfgs[letter], batch_norm)


# The registry


def test_registry_has_the_papers_networks():
    assert {*RESNETS, *VGGS} <= set(models.REGISTRY)


@pytest.mark.parametrize("arch", [*RESNETS, *VGGS])
def test_every_name_is_a_function_of_the_package(arch):
    assert getattr(models, arch) is models.REGISTRY[arch] and arch in models.__all__


@pytest.mark.parametrize("arch", ["resnet20", "vgg11_bn"])
@pytest.mark.parametrize("classes", [10, 100])
def test_number_of_classes(arch, classes):
    assert getattr(models, arch)(classes).eval()(images()).shape == (2, classes)


def test_unknown_name_is_answered_with_the_choice():
    with pytest.raises(UserError, match=r"alexnet.*resnet20.*vgg19_bn"):
        models.build("alexnet")


@pytest.mark.parametrize("depth", [2, 21, 0, -4])
def test_impossible_resnet_depth_is_named(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2.* {depth}$"):
        models.resnet_cifar.CifarResNet(depth)


def test_impossible_vgg_depth_is_named():
    with pytest.raises(ValueError, match=r"11, 13, 16, 19.* 12$"):
        models.vgg_cifar.CifarVGG(12)


# ResNet


@pytest.mark.parametrize(("arch", "count"), PARAMETERS.items())
def test_resnet_parameters(arch, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in models.build(arch).parameters()) == count


@pytest.mark.parametrize(("arch", "blocks"), RESNETS.items())
def test_resnet_names_in_order(arch, blocks):
    with torch.device("meta"):
        assert list(models.build(arch).state_dict()) == resnet_names(blocks)


def test_resnet_convolutions_have_no_bias():
    assert all(m.bias is None for m in models.resnet20().modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("arch", RESNETS)
def test_resnet_shapes(arch):
    with torch.device("meta"):
        logits, features, stages = models.build(arch)(torch.empty(2, 3, 32, 32), return_features=True)
    assert [logits.shape, features.shape, *(s.shape for s in stages)] == [
        (2, 10),
        (2, 64),
        (2, 16, 32, 32),
        (2, 32, 16, 16),
        (2, 64, 8, 8),
    ]


@pytest.mark.parametrize(("arch", "head_width"), [("resnet20", None), ("resnet20", 20), ("resnet32", None)])
def test_resnet_is_the_naive_one(arch, head_width):
    """Logits, features and stage outputs, in float64; with two layers in the head no activation between them."""
    net = trained(arch, head_width=head_width).double()
    with torch.no_grad():
        ours = net(images().double(), return_features=True)
        naive = naive_resnet(net.state_dict(), images().double(), RESNETS[arch])
    torch.testing.assert_close(ours, naive)


@pytest.mark.parametrize("size", [8, 7])
def test_shortcut_is_option_a(size):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(models.resnet_cifar.OptionA(2)(x), naive_option_a(x, 5))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradient_of_the_shortcut(layout):
    """The naive one's, and in the layout of the images: another one makes every operation before it slow."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, 8, generator=generator).to(memory_format=layout).requires_grad_()
    weight = torch.randn(2, 5, 4, 4, generator=generator).to(memory_format=layout)
    (ours,) = torch.autograd.grad((models.resnet_cifar.OptionA(2)(x) * weight).sum(), x)
    (naive,) = torch.autograd.grad((naive_option_a(x, 5) * weight).sum(), x)
    assert torch.equal(ours, naive) and ours.is_contiguous(memory_format=layout)


def test_two_layer_head():
    net = models.resnet20(10, head_width=20)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters() if name.startswith("classifier")}
    assert shapes == {
        "classifier1.weight": (20, 64),
        "classifier1.bias": (20,),
        "classifier2.weight": (10, 20),
        "classifier2.bias": (10,),
    }


# VGG


@pytest.mark.parametrize("arch", VGGS)
def test_vgg_features_are_torchvisions(arch):
    """The same layers under the same names, in order and in shape."""
    with torch.device("meta"):
        ours, theirs = models.build(arch).features.state_dict(), torchvision_features(arch).state_dict()
    assert [(n, v.shape) for n, v in ours.items()] == [(n, v.shape) for n, v in theirs.items()]


@pytest.mark.parametrize("arch", ["vgg11", "vgg13_bn"])
def test_vgg_computes_what_torchvisions_layers_do(arch):
    net = trained(arch)
    layers = torchvision_features(arch).eval()
    layers.load_state_dict(net.features.state_dict())
    with torch.no_grad():
        _, features, _ = net(images(), return_features=True)
        torch.testing.assert_close(features, layers(images()).flatten(1))


@pytest.mark.parametrize("arch", ["vgg11", "vgg16_bn"])
def test_vgg_stages_end_in_the_poolings(arch):
    net = trained(arch)
    with torch.no_grad():
        _, _, stages = net(images(), return_features=True)
        pooled = []
        x = images()
        for layer in net.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                pooled.append(x)
    assert all(torch.equal(ours, naive) for ours, naive in zip(stages, pooled, strict=True))


@pytest.mark.parametrize("arch", VGGS)
def test_vgg_shapes(arch):
    with torch.device("meta"):
        logits, features, stages = models.build(arch)(torch.empty(2, 3, 32, 32), return_features=True)
    stage_shapes = [(2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4), (2, 512, 2, 2), (2, 512, 1, 1)]
    assert [logits.shape, features.shape, *(s.shape for s in stages)] == [(2, 10), (2, 512), *stage_shapes]


def test_vgg_head_names_and_shapes():
    with torch.device("meta"):
        net = models.vgg16(100)
    head = {name: tuple(p.shape) for name, p in net.named_parameters() if "classifier" in name}
    assert head == {
        "classifier.0.weight": (512, 512),
        "classifier.0.bias": (512,),
        "classifier.3.weight": (512, 512),
        "classifier.3.bias": (512,),
        "classifier.6.weight": (100, 512),
        "classifier.6.bias": (100,),
    }


def test_vgg_head_is_the_naive_one():
    net = trained("vgg11")
    with torch.no_grad():
        logits, x, _ = net(images(), return_features=True)
        for i in (0, 3, 6):
            x = x @ net.classifier[i].weight.T + net.classifier[i].bias
            x = x.relu() if i < 6 else x
    torch.testing.assert_close(logits, x, rtol=1e-4, atol=1e-4)


def test_vgg_head_drops_half():
    assert [m.p for m in models.vgg11().classifier if isinstance(m, nn.Dropout)] == [0.5, 0.5]


# Any of them


@pytest.mark.parametrize("arch", ["resnet20", "vgg11_bn"])
def test_logits_are_the_same_with_and_without_features(arch):
    net = trained(arch)
    with torch.no_grad():
        assert torch.equal(net(images()), net(images(), return_features=True)[0])


@pytest.mark.parametrize("arch", ["resnet20", "vgg11", "vgg11_bn"])
def test_losses_on_features_and_stages_reach_every_layer(arch):
    """Distillation backpropagates through what the network returns; activations made in place must not spoil that."""
    net = models.build(arch)
    logits, features, stages = net(images(), return_features=True)
    sum(x.square().mean() for x in (logits, features, *stages)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("arch", ["resnet20", "resnet110", "vgg11_bn"])
def test_convolutions_start_from_their_fan_out(arch):
    """Normal with mean 0 and std sqrt(2/(kh*kw*C_out)); bounds of five standard errors."""
    torch.manual_seed(0)
    for conv in (m for m in models.build(arch).modules() if isinstance(m, nn.Conv2d)):
        count = conv.weight.numel()
        z = conv.weight.detach() / math.sqrt(2 / (conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels))
        assert abs(z.mean()) < 5 / math.sqrt(count) and abs(z.std() - 1) < 5 / math.sqrt(2 * count)


@pytest.mark.parametrize("arch", ["resnet20", "vgg11_bn"])
def test_batch_norm_starts_as_the_identity(arch):
    for norm in (m for m in models.build(arch).modules() if isinstance(m, nn.BatchNorm2d)):
        assert norm.weight.eq(1).all() and norm.bias.eq(0).all()


def test_linear_layers_start_kaiming_normal():
    """std sqrt(2/fan_in), tails that a uniform distribution lacks, and zero bias."""
    torch.manual_seed(0)
    layer = models.resnet20(1000).classifier
    z = layer.weight.detach() * math.sqrt(64 / 2)
    assert abs(z.mean()) < 5 / math.sqrt(64_000) and abs(z.std() - 1) < 5 / math.sqrt(128_000) and z.abs().max() > 3.5
    assert layer.bias.eq(0).all()


@pytest.mark.parametrize("arch", RESNETS)
def test_resnet_can_be_traced(arch):
    """By torch.fx, with return_features fixed, as it chooses a branch."""
    net = trained(arch)
    traced = torch.fx.symbolic_trace(net, concrete_args={"return_features": False})
    with torch.no_grad():
        assert torch.equal(traced(images(1)), net(images(1)))


# Files


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("resnet20", {}),
        ("resnet32", {"num_classes": 100}),
        ("resnet20", {"head_width": 20}),
        ("resnet20", {"num_classes": 7, "head_width": 5}),
        ("vgg11_bn", {"num_classes": 100}),
        ("vgg13", {}),
    ],
)
def test_checkpoint_gives_its_network(tmp_path, arch, options):
    """Classes and head are read off the weights; the outputs are those of the network that was saved."""
    net = trained(arch, **options)
    path = saved(tmp_path / "c.pth.tar", {"arch": arch, "epoch": 3, "state_dict": net.state_dict()})
    with torch.no_grad():
        assert torch.equal(models.load(path)(images()), net(images()))


def test_loaded_network_is_in_eval_mode(tmp_path):
    path = saved(tmp_path / "c.pth.tar", {"arch": "resnet20", "state_dict": models.resnet20().state_dict()})
    assert not any(m.training for m in models.load(path).modules())


def same_weights(net, other):
    pairs = zip(net.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("legacy", [False, True])
def test_bare_state_dict(tmp_path, legacy):
    net = trained("resnet20")
    path = saved(tmp_path / "bare.pth", net.state_dict(), legacy)
    assert same_weights(models.load(path, arch="resnet20"), net)


@pytest.mark.parametrize("bare", [False, True])
def test_module_prefix_is_taken_off(tmp_path, bare):
    net = trained("resnet20", head_width=20)
    weights = {f"module.{name}": value for name, value in net.state_dict().items()}
    path = saved(tmp_path / "dp.pth", weights if bare else {"arch": "resnet20", "state_dict": weights})
    assert same_weights(models.load(path, arch="resnet20"), net)


def test_num_batches_tracked_may_be_missing(tmp_path):
    net = trained("resnet20")
    weights = {name: value for name, value in net.state_dict().items() if "num_batches_tracked" not in name}
    loaded = models.load(saved(tmp_path / "old.pth", {"arch": "resnet20", "state_dict": weights}))
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in weights.items())


def test_file_without_a_name_needs_arch(tmp_path):
    path = saved(tmp_path / "bare.pth", models.resnet20().state_dict())
    with pytest.raises(UserError, match=r"bare\.pth.*resnet20"):
        models.load(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth"):
        models.load(tmp_path / "nowhere.pth")


def test_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        models.load(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_truncated_file_is_named(tmp_path, share, legacy):
    """Cut at several places, a few bytes apart as well: between, within and before numbers."""
    content = {"arch": "resnet20", "state_dict": models.resnet20().state_dict()}
    path = saved(tmp_path / "cut.pth", content, legacy)
    whole = path.read_bytes()
    for more in (0, 1, 2, 5):
        path.write_bytes(whole[: int(share * len(whole)) + more])
        with pytest.raises(UserError, match=r"cut\.pth"):
            models.load(path)


def test_file_with_a_wrong_byte_is_named(tmp_path):
    """In the last storage key of the old format, to which torch's reader answers with an AssertionError."""
    path = saved(tmp_path / "flip.pth", models.resnet20().state_dict(), legacy=True)
    content = path.read_bytes()
    at = content.rindex(re.findall(rb"\d{12,16}", content)[-1])
    path.write_bytes(content[:at] + b"x" + content[at + 1 :])
    with pytest.raises(UserError, match=r"flip\.pth.*damaged"):
        models.load(path, arch="resnet20")


def test_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "notes.pth"
    path.write_text("accuracy 91.71\n" * 100)
    with pytest.raises(UserError, match=r"notes\.pth"):
        models.load(path)


@pytest.mark.parametrize("content", [[1, 2], {}, 5, {"epoch": 3}, {"state_dict": {}}, {"state_dict": {"a": 1}}])
def test_file_without_weights_is_named(tmp_path, content):
    path = saved(tmp_path / "empty.pth", content)
    with pytest.raises(UserError, match=r"empty\.pth.*state_dict"):
        models.load(path, arch="resnet20")


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_file_never_runs(tmp_path, kind):
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    content = {"arch": "resnet20", "state_dict": models.resnet20().state_dict(), "extra": Payload(trace)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        saved(path, content, legacy=kind == "legacy")
    with pytest.raises(UserError, match=r"evil\.pth"):
        models.load(path)
    assert not trace.exists()
    if kind == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()  # so the payload was a working one


@pytest.mark.parametrize(
    ("arch", "options", "other", "named"),
    [
        ("resnet20", {}, "resnet32", "stage_1.3.conv_a.weight"),
        ("resnet32", {}, "resnet20", "stage_1.3.conv_a.weight"),
        ("resnet20", {}, "vgg11", "features.0.weight"),
        ("vgg11", {}, "vgg11_bn", "features.1.weight"),
        ("vgg13", {}, "vgg11", "features"),
    ],
)
def test_weights_of_another_network_are_named(tmp_path, arch, options, other, named):
    path = saved(tmp_path / "other.pth", models.build(arch, **options).state_dict())
    with pytest.raises(UserError, match=rf"other\.pth.*{named}"):
        models.load(path, arch=other)


def test_weights_without_a_classifier(tmp_path):
    path = saved(tmp_path / "parts.pth", {"conv_1_3x3.weight": torch.zeros(16, 3, 3, 3)})
    with pytest.raises(UserError, match="classifier"):
        models.load(path, arch="resnet20")


def test_weights_of_another_shape_are_named(tmp_path):
    weights = models.resnet20().state_dict() | {"conv_1_3x3.weight": torch.zeros(16, 1, 3, 3)}
    path = saved(tmp_path / "grey.pth", {"arch": "resnet20", "state_dict": weights})
    with pytest.raises(UserError, match=r"grey\.pth.*conv_1_3x3\.weight.*\(16, 1, 3, 3\).*\(16, 3, 3, 3\)"):
        models.load(path)


def test_unknown_network_in_a_file(tmp_path):
    path = saved(tmp_path / "c.pth", {"arch": "alexnet", "state_dict": models.resnet20().state_dict()})
    with pytest.raises(UserError, match="alexnet"):
        models.load(path)


# The released checkpoint


@pytest.fixture(scope="module")
def released():
    if not RELEASED.is_file():
        pytest.skip(f"the released checkpoint is not at {RELEASED}")
    return models.load(RELEASED, arch="resnet20")


def test_released_head_has_two_layers(released):
    assert (released.classifier1.weight.shape, released.classifier2.weight.shape) == ((20, 64), (10, 20))


def test_released_filters_are_removed(released):
    """30 % removed: 11, 22 and 44 filters of 16, 32 and 64 are left in every convolution."""
    convolutions = [m.weight for m in released.modules() if isinstance(m, nn.Conv2d)]
    kept = [int(w.flatten(1).any(1).sum()) for w in convolutions]
    assert kept == [{16: 11, 32: 22, 64: 44}[len(w)] for w in convolutions]


@pytest.mark.parametrize("weights", [{1: torch.zeros(2)}, {("a",): torch.zeros(2)}])
def test_names_that_are_no_strings(tmp_path, weights):
    torch.save({"arch": "resnet20", "state_dict": weights}, tmp_path / "odd.pth")
    with pytest.raises(UserError):
        models.load(tmp_path / "odd.pth")


def test_two_layer_head_is_no_vgg(tmp_path):
    torch.save(models.resnet20(head_width=20).state_dict(), tmp_path / "two.pth")
    with pytest.raises(UserError):
        models.load(tmp_path / "two.pth", arch="vgg11")


@pytest.mark.parametrize("arch", [["resnet20"], {"a": 1}])
def test_odd_arch_entry(tmp_path, arch):
    torch.save({"arch": arch, "state_dict": models.resnet20().state_dict()}, tmp_path / "odd.pth")
    with pytest.raises(UserError):
        models.load(tmp_path / "odd.pth")


@pytest.mark.parametrize("arch", ["resnet20", "vgg11", "vgg11_bn"])
def test_network_can_be_traced(arch):
    torch.manual_seed(0)
    net = models.build(arch).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


@pytest.mark.parametrize("arch", ["vgg11", "vgg11_bn"])
def test_vgg_can_be_traced_with_concrete_args(arch):
    torch.manual_seed(0)
    net = models.build(arch).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        traced = torch.fx.symbolic_trace(net, concrete_args={"return_features": False})
        assert torch.equal(traced(x), net(x))
