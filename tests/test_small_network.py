"""The small network against the masked one: exactness, that nothing removable is left, files, and what refuses."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from random_nets import SIZE, RandomNet, needed_labels, zero_filters
from torch import nn

import data
import models
import utils.small.cut as small_network
from AHSG_HT import AHSG_HT, following_additives
from models.resnet_cifar import CifarResNet, OptionA
from utils import get_small_model
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.base.torchvision_import import import_torchvision
from utils.bench import torchvision_networks
from utils.small.counts import count
from utils.small.cut import make_small, narrow
from utils.small.output import export, write_small

RELEASED = Path(__file__).parents[2] / "shared" / "released" / "best.cifar10_resnet20.pth.tar"


class Net(nn.Module):
    """Layers by their names, and its forward pass as a function of itself and the images."""

    def __init__(self, steps, **layers):
        super().__init__()
        self.steps = steps
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.steps(self, x)


def images(n=4, size=32, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(first, second, x):
    return float((first.eval()(x) - second.eval()(x)).abs().max())


def cut(net, size=32, **options):
    """(the small network, the report), after a comparison on images that make_small has not seen."""
    small, report = make_small(net, images(1, size), **options)
    assert difference(net, small, 2 * images(8, size)) <= 1e-5
    return small, report


def pruned(net, HTrate=0.7, steps=1):
    """After some AHSG_HT steps on random images."""
    optimizer = AHSG_HT(net.parameters(), lr=0.01, momentum=0.9, HTrate=HTrate)
    net.train()
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(images(4, 32, step)), torch.arange(4) % 10).backward()
        optimizer.update_HSG(1)
        optimizer.step()
    return net.eval()


@torch.no_grad()
def zero(layers, dead):
    """Filters `dead` of these layers, with their biases."""
    for layer in layers:
        for parameter in layer.parameters():
            parameter[dead] = 0


def widths(net):
    return {name: m.out_channels for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}


# -- the released network --


def check_released_widths(net, small, report):
    counts = [count(each, images(1)).multiply_adds for each in (net, small)]
    assert counts == [40_551_880, 20_327_048] and not report.kept_whole and report.merged == 0
    assert [c.out_channels for c in (small.conv_1_3x3, small.stage_2[2].conv_b, small.stage_3[2].conv_b)] == [
        11,
        24,
        48,
    ]


def test_filters_of_the_released_network_halve_its_multiply_adds():
    """The filters that the released checkpoint keeps, without its file: random weights, the published count."""
    torch.manual_seed(0)
    net = models.build("resnet20", head_width=20).eval()
    kept = json.loads((Path(__file__).parent / "released_filters.json").read_text())
    names, parameters = zip(*net.named_parameters(), strict=True)
    with torch.no_grad():
        for name, indices in kept.items():
            at = names.index(name)
            dead = [i for i in range(len(parameters[at])) if i not in indices]
            for parameter in (parameters[at], *following_additives(list(parameters), at)):
                parameter[dead] = 0
    small, report = make_small(net, images(1))
    check_released_widths(net, small, report)
    assert difference(net, small, images()) < 5e-5


@pytest.mark.skipif(not RELEASED.is_file(), reason=f"no released checkpoint at {RELEASED}")
def test_released_checkpoint_halves_its_multiply_adds(tmp_path, capsys):
    net = models.load(RELEASED, "resnet20")
    check_released_widths(net, *make_small(net, images(1)))
    path = tmp_path / "released.pth.tar"
    assert get_small_model.main([str(RELEASED), "--arch", "resnet20", "--save_path", str(path)]) == path
    assert "-49.9 %" in capsys.readouterr().out and path.is_file()
    small, x = models.load(path), images(300, seed=1)
    with torch.no_grad():
        assert torch.equal(net(x).argmax(1), small(x).argmax(1))
    assert difference(net, small, x) < 5e-5


# -- random architectures --


@pytest.mark.parametrize("constants", [True, False])
def test_random_networks_are_equal(constants):
    for seed in range(30):
        net = RandomNet(seed + 1000 * constants)
        zero_filters(net, constants=constants)
        small, report = cut(net, SIZE)
        assert not report.kept_whole, (seed, report.kept_whole)
        if seed < 10:
            assert widths(make_small(small, images(1, SIZE))[0]) == widths(small), seed


def test_nothing_removable_is_left():
    """Widths are those that are measured: a channel stays only if some layer finds it to be other than zero."""
    strict = 0
    for seed in range(50):
        net = RandomNet(seed, leaky=True)
        zero_filters(net, constants=False)
        needed = needed_labels(net, images(32, SIZE))
        if needed is None:
            continue
        small, _ = make_small(net, images(1, SIZE))
        layers = [(name, module) for name, module in net.named_modules() if module in net.makes]
        expected = {name: sum(label in needed for label in net.makes[m]) for name, m in layers}
        if 0 in expected.values():
            continue  # a layer of which nothing is needed keeps one channel, and what that one is coupled to
        assert {name: len(small.get_submodule(name).weight) for name, _ in layers} == expected, seed
        strict += 1
    assert strict >= 15


def grouped(padding):
    """A grouped convolution between two others, as in ResNeXt."""

    def steps(net, x):
        x = F.relu(net.bn_b(net.b(F.relu(net.bn_a(net.a(x))))))
        return net.head(x.mean((2, 3)))

    a, b = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, 1, padding, groups=6)
    return Net(steps, a=a, bn_a=nn.BatchNorm2d(24), b=b, bn_b=nn.BatchNorm2d(24), head=nn.Linear(24, 5))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("constant", [0, 0.5])
def test_grouped_convolutions_take_fewer_groups(padding, constant, tmp_path, monkeypatch):
    found = []
    for seed in range(12):
        torch.manual_seed(seed)
        net, dead = grouped(padding).eval(), torch.randperm(24)
        zero([net.a, net.bn_a], dead[:10])
        zero([net.b, net.bn_b], dead[5:15])
        with torch.no_grad():
            net.bn_a.weight.fill_(1)
            net.bn_a.bias[dead[:10]] = constant
        small, report = cut(net, 8, images=images(4, 8))
        assert not report.kept_whole
        assert small.b.in_channels == small.b.out_channels == small.a.out_channels == small.head.in_features <= 24
        found.append(small.b.out_channels)
    if not constant or not padding:  # else one constant channel stays in each group
        assert sum(found) < 0.85 * 12 * 24
    monkeypatch.setitem(models.REGISTRY, "grouped", lambda num_classes: grouped(padding))
    net.num_classes = 5
    file, _ = write_small(net, small, report, "grouped", (3, 8, 8), tmp_path, checkpoint={})
    assert difference(models.load(file), small, images(4, 8)) == 0


def test_torchvision_networks_are_equal_and_smaller(tmp_path):
    least = {"mobilenet_v3_small": 30, "regnet_y_400mf": 15}
    torchvision_networks.main([*least, "--save_path", str(tmp_path)])
    for row in json.loads((tmp_path / "networks.json").read_text())["timings"]:
        assert (row["result"], row["kept whole"]) == ("equal", "-") and row["saved (%)"] > least[row["network"]]


# -- constants --


@torch.no_grad()
def chain(constant, padding=1, bias=False, act=F.relu):
    """The first layer's filters 2 to 5 are zero; what BatchNorm makes of them is `constant`."""

    def steps(net, x):
        x = net.second(act(net.bn(net.first(x))))
        return net.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.Conv2d(6, 4, 3, padding=padding, bias=bias)
    net = Net(steps, first=first, bn=nn.BatchNorm2d(6), second=second, head=nn.Linear(4, 2))
    net.first.weight[2:] = 0
    net.bn.running_mean[2:] = -torch.tensor(constant)
    net.bn.running_var.fill_(1 - net.bn.eps)
    return net.eval()


@pytest.mark.parametrize(
    "constant, options, width, moved",
    [
        ([0.0, 0, 0, 0], {}, 2, 0),
        ([-1.0, -2, -3, -1e-3], {}, 2, 0),  # below zero: ReLU makes them zero
        ([-1.0, -2, -3, -1e-3], {"act": torch.relu_}, 2, 0),
        ([-1.0, 2, 3, 0], {}, 3, 1),  # zero padding: two positive constants become one
        ([-1.0, 2, 3, 0], {"act": F.leaky_relu}, 3, 2),
        ([-1.0, 2, 3, 0], {"padding": 0, "bias": True}, 2, 2),  # they move into the bias
        ([1e-42, 0, 0, 0], {}, 2, 0),  # a running mean that decayed to nothing
    ],
)
def test_batch_norm_constants(constant, options, width, moved):
    small, report = cut(chain(constant, **options), 8)
    assert (small.first.out_channels, report.merged) == (width, moved)


# -- operations without a rule --


class Shuffle(nn.Module):
    """An operation that the analysis does not know, and one that torch.fx cannot trace."""

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return x.flip(1)


class ThreeConvs(nn.Module):
    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 5, 3)
        self.middle, self.head = middle, nn.Linear(5, 2)
        zero([self.a, self.b, self.c], slice(1, 4))

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x))))
        x = F.relu(self.c(self.middle(x)))
        return self.head(x.mean((2, 3)))


GROUPED_TWICE = nn.Sequential(*[nn.Conv2d(6, 6, 1, groups=3)] * 2)
INTO_ITSELF, ROWS = Net(lambda net, x: torch.add(x, x, out=x)), Net(lambda net, x: torch.cat(tensors=[x, x], dim=2))


@pytest.mark.parametrize(
    "middle", [Shuffle(), nn.GroupNorm(3, 6), nn.PixelShuffle(1), nn.Softmax(1), GROUPED_TWICE, INTO_ITSELF]
)
def test_unknown_operation_keeps_its_channels(middle):
    small, report = cut(ThreeConvs(middle), 12)
    assert (small.a.out_channels, small.b.out_channels, small.c.out_channels) == (3, 6, 2)
    assert "middle" in report.kept_whole["b"] and "a" not in report.kept_whole


def test_rows_of_tensors_by_keyword_are_no_channels():
    assert cut(ThreeConvs(ROWS), 12)[0].b.out_channels == 6


def adds_to(view):
    def change(x):
        y = view(x)
        y += 1

    return change


VIEWS = [lambda x: x, lambda x: x.detach(), nn.Dropout(), lambda x: x[:, :, 1:], lambda x: x.flatten(1)]


@pytest.mark.parametrize("change", [torch.sigmoid_, lambda x: x.view(-1).add_(1), *map(adds_to, VIEWS)])
def test_constants_changed_in_place(change):
    """The first layer's removed channels become another constant, which only the removed filters' weights read."""

    def steps(net, x):
        x = net.a(x)
        change(x)
        return net.head(net.c(F.relu(net.b(x))).mean((2, 3)))

    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(3, 8, 3, bias=False), "b": nn.Conv2d(8, 6, 3, bias=False), "c": nn.Conv2d(6, 4, 1)}
    net = Net(steps, head=nn.Linear(4, 10), **layers)
    with torch.no_grad():
        net.a.weight[:4] = net.b.weight[:3, 4:] = 0
        net.b.weight[:3, :4].abs_()
    cut(net, 12)


def test_stochastic_depth_and_depthwise_convolutions_are_followed():
    depth = import_torchvision().ops.StochasticDepth(0.5, "row")
    small, report = cut(ThreeConvs(nn.Sequential(depth, nn.Conv2d(6, 6, 3, groups=6))), 12)
    assert (small.b.out_channels, small.middle[1].groups, report.kept_whole) == (3, 3, {})


def conv(made, read, kernel=3, stride=1, padding=1):
    return nn.Conv2d(read, made, kernel, stride, padding)


def test_shared_layers_and_fixed_widths():
    """Shared layers, shared weights, a hard-coded width, a shortcut written by hand."""

    def steps(net, x):
        x = F.relu(net.stem(x))
        x = F.relu(net.twice(F.relu(net.twice(x))))
        x = F.relu(net.next(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        x = F.relu(net.mix(x))
        x = net.last(F.relu(net.tied_b(F.relu(net.tied_a(x)))))
        return net.head(F.adaptive_max_pool2d(x, 1).view(-1, 4))

    torch.manual_seed(0)
    layers = {"tied_a": conv(10, 10), "tied_b": conv(10, 10), "mix": conv(10, 10), "last": conv(4, 10)}
    net = Net(steps, stem=conv(6, 3), twice=conv(6, 6), next=conv(10, 6, stride=2), head=nn.Linear(4, 2), **layers)
    net.tied_b.weight = net.tied_a.weight
    zero([net.next], slice(3, 5))  # two channels of zeros come first in the shortcut
    zero([net.stem, net.twice, net.tied_a, net.tied_b, net.mix, net.last], slice(1, 3))
    small, report = cut(net, 8)
    assert small.stem.out_channels == small.twice.out_channels == small.twice.in_channels == 4
    assert small.next.out_channels == 8 and small.mix.out_channels == 10
    assert small.last.out_channels == 4 and "last" in report.kept_whole and "tied_a" in report.kept_whole


@pytest.mark.parametrize("features_first", [True, False])
def test_a_layer_called_on_two_ranks_of_input_keeps_its_shape(features_first):
    """A linear layer called on features and on positions, in either order; BatchNorm without weights."""

    def steps(net, x):
        x = F.relu(net.next(F.relu(net.bn(net.conv(x)))))
        inputs = [x.mean((2, 3)), x.permute(0, 2, 3, 1)]
        results = [net.linear(y) for y in (inputs if features_first else inputs[::-1])]
        features, positions = results if features_first else results[::-1]
        return net.head(F.relu(features)) + positions.mean((1, 2))[:, 2:4]

    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(3, 6, 3, bias=False), "bn": nn.BatchNorm2d(6, affine=False), "next": conv(6, 6)}
    net = Net(steps, linear=nn.Linear(6, 6), head=nn.Linear(6, 2), **layers)
    zero([net.conv, net.next, net.linear], slice(0, 3))
    small, report = cut(net, 8)
    assert (small.conv.out_channels, small.next.out_channels, small.linear.out_features) == (3, 6, 6)
    assert {"linear", "next"} <= report.kept_whole.keys()


@pytest.mark.parametrize("end, order", [(nn.Identity(), [1, 3, 0, 5]), (nn.GroupNorm(2, 6), [0, 1, 2, 3, 4, 5])])
def test_option_a_stays_a_plain_zero_pad(end, order):
    """Channels that arrive come first; where the order may not change, the first stage keeps its dead channels."""

    def steps(net, x):
        x = F.relu(net.stem(x))
        x = F.relu(net.conv(x) + net.shortcut(x))
        return net.head(F.relu(net.last(net.end(x))).mean((2, 3)))

    torch.manual_seed(0)
    layers = {"stem": conv(4, 3), "conv": conv(6, 4, stride=2), "shortcut": OptionA(2), "last": conv(6, 6)}
    net = Net(steps, end=end, head=nn.Linear(6, 2), **layers)
    zero([net.stem], [0, 2])
    zero([net.conv], [1, 2, 4])
    small, report = cut(net, 8)
    assert report.kept["conv.weight"] == order and small.shortcut.new_channels == report.pads["shortcut"] == 2
    assert small.stem.out_channels == len(order) - 2


# -- refusals --


def test_a_network_that_differs_is_refused_after_a_trial_without_merging(monkeypatch):
    def spoil(function):
        def spoilt(channels):
            channels.readers[1].module.weight.data.zero_()
            return function(channels)

        return spoilt

    net = chain([-1.0, 2, 3, 0])
    monkeypatch.setattr(small_network, "merge_constants", spoil(lambda channels: 0))
    small, report = cut(net, 8)
    assert (small.first.out_channels, report.merged) == (4, 0)
    monkeypatch.setattr(small_network, "narrow", spoil(narrow))
    with pytest.raises(UserError, match=r"differs by .* in a logit .*: report this network"):
        make_small(net, images(1, 8))
    net.head.weight.data *= 1e9
    with pytest.raises(UserError, match="too large for float32; train longer"):
        make_small(net, images(1, 8))


def test_command_line_errors(tmp_path):
    file = tmp_path / "small.resnet8.pth.tar"
    torch.save({"arch": "resnet8", "state_dict": CifarResNet(8).state_dict()}, file)
    for flags, message in (
        ([tmp_path / "nothing"], "no checkpoint at"),
        ([], "the following arguments are required"),
        ([file], "would be replaced"),
        ([file, "--save_path", file], "would be replaced"),
        ([file, "--round_to", "0"], r"round_to.*whole number >= 1"),
        ([file, "--data", tmp_path, "--save_path", tmp_path / "out"], "no images of cifar10 at"),
    ):
        with pytest.raises(UserError, match=message):
            get_small_model.main([str(flag) for flag in flags])


def test_command_compares_predictions_and_exports(tree, teacher, tmp_path, monkeypatch, capsys):
    """In the checkpoint's own normalisation of the images."""
    flags = ["--data", str(tree), "--save_path", str(tmp_path / "out")]
    get_small_model.main([str(teacher), *flags, "--export", "torch"])
    assert "20 test images: 20 predictions agree; accuracy 100.00 % before, 100.00 % after" in capsys.readouterr().out
    assert (tmp_path / "out/small.resnet8.pt2").is_file()
    own = {"mean": [0.9] * 3, "std": [0.1] * 3}
    checkpoints.write({**checkpoints.read(teacher), "normalisation": own}, tmp_path / "other.pth.tar")
    test = data.load("cifar10", tree).test
    right = (models.load(teacher)((test.images / 255 - 0.9) / 0.1).argmax(1) == test.labels).float().mean()
    get_small_model.main([str(tmp_path / "other.pth.tar"), *flags])
    assert right < 1 and f"accuracy {100 * right:.2f} % before, {100 * right:.2f} % after" in capsys.readouterr().out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--export onnx needs onnx and onnxscript: pip install onnx onnxscript"):
        get_small_model.main([str(teacher), "--export", "onnx", "--save_path", str(tmp_path)])


# -- files, and small networks that are trained on --


def test_command_makes_a_small_network_smaller_and_a_file_of_the_given_name(tmp_path, capsys):
    torch.manual_seed(0)
    net = pruned(CifarResNet(8), steps=3)
    small, report = make_small(net, images(1))
    loaded = models.load(write_small(net, small, report, "resnet8", (3, 32, 32), tmp_path, checkpoint={})[0])
    assert all(p.requires_grad for p in loaded.parameters())
    again = pruned(loaded, HTrate=0.5, steps=3)
    content = {"arch": "resnet8", "state_dict": again.state_dict(), "kept": report.kept}
    checkpoints.write(content, tmp_path / "pruned.pth.tar")
    for given, file in (("a", "a/small.resnet8.pth.tar"), ("x.pth.tar", "x.pth.tar"), ("new/x.pth", "new/x.pth")):
        get_small_model.main([str(tmp_path / "pruned.pth.tar"), "--save_path", str(tmp_path / given)])
        assert f"written: {tmp_path / file}\n" in capsys.readouterr().out
        smallest = models.load(tmp_path / file)
        assert count(smallest, images()).multiply_adds < count(small, images()).multiply_adds
        assert difference(again, smallest, images()) < 1e-4
        kept = checkpoints.read(tmp_path / file)["kept"]
        assert all(set(at) <= set(report.kept[name]) for name, at in kept.items())


@pytest.mark.parametrize("multiple", [2, 8])
def test_widths_are_rounded_up_with_the_strongest(multiple):
    torch.manual_seed(0)
    net = pruned(CifarResNet(8), HTrate=0.6).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    small, report = make_small(net, images(1), round_to=multiple)
    assert net.training and all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(len(at) % multiple == 0 for name, at in report.kept.items() if "conv" in name)
    assert difference(net, small, images()) <= 1e-4
    net = chain([0.0, 0, 0, 0])
    net.second.weight.data[:, 4] *= 10
    _, report = make_small(net, images(1, 8), round_to=3)
    assert report.kept["first.weight"] == [0, 1, 4]


def test_pruned_run_writes_its_small_network_which_trains_on(train, teacher):
    folder = train("--epochs", "1", "--HTrate", "0.5")
    facts = json.loads((folder / "results.json").read_text())["small"]
    small = models.load(folder / facts["file"])
    assert difference(small, models.load(folder / "checkpoint.resnet8.pth.tar"), images()) < 1e-4
    assert facts["after"]["multiply_adds"] == count(small, images()).multiply_adds < facts["before"]["multiply_adds"]
    resume = ("--epochs", "1", "--resume", folder / facts["file"])
    tuned = train("--recipe", "finetune", *resume, "--HTrate", "0.8")
    assert widths(models.load(tuned / "checkpoint.resnet8.pth.tar")) == widths(small)
    teaching = ("--arch_small", "resnet8", "--teacher", teacher, "--recipe", "prune_distill")
    distilled = train(*teaching, *resume, "--HTrate", "0.5")
    assert widths(models.load(distilled / "checkpoint.resnet8.pth.tar")) == widths(small)
    smaller = models.load(distilled / "small.resnet8.pth.tar")
    assert count(smaller, images()).multiply_adds < count(small, images()).multiply_adds


def test_small_network_from_scratch_has_the_widths_and_new_weights(train):
    """And what does not fit is refused."""
    file = train("--epochs", "1", "--HTrate", "0.5") / "small.resnet8.pth.tar"
    flags = ("--recipe", "baseline", "--widths_of", file)
    folder = train(*flags, "--epochs", "2")
    small, scratch = models.load(file), models.load(folder / "checkpoint.resnet8.pth.tar")
    assert widths(scratch) == widths(small) != widths(CifarResNet(8, 10))
    assert difference(scratch, small, images()) > 0.1
    assert json.loads((folder / "results.json").read_text())["widths_from"] == "AHSG-HT 50 %, batch_size 16, k 24"
    weights = models.build_with_widths(file, "resnet8", 10).stage_3[0].conv_b.weight
    assert weights.std().item() == pytest.approx((2 / (9 * len(weights))) ** 0.5, rel=0.05)
    # In two runs, the second of which finds the widths in its checkpoint.
    first = train(*flags, "--epochs", "1", "--save_path", "first")
    train("--recipe", "baseline", "--epochs", "2", "--resume", first / "checkpoint.resnet8.pth.tar")
    assert difference(models.load(first / "checkpoint.resnet8.pth.tar"), scratch, images()) == 0
    small = file
    for flags, message in (
        (["--widths_of", "nowhere.pth.tar"], "nowhere.pth.tar"),
        (["--widths_of", small, "--evaluate", "--resume", small], "leave --evaluate out"),
        (["--widths_of", small, "--recipe", "baseline", "--resume", small], "leave one out"),
    ):
        with pytest.raises(UserError, match=message):
            train(*flags)
    with pytest.raises(UserError, match=r"is a resnet8.*--arch resnet8"):
        train("--recipe", "baseline", "--widths_of", small, arch="resnet8_dropout")
    with pytest.raises(UserError, match=r"10 classes.*3"):
        models.build_with_widths(small, "resnet8", 3)


def test_export_takes_any_batch_size(tmp_path):
    small, _ = make_small(pruned(CifarResNet(8)), images(1))
    path = export(small, images(2), tmp_path / "small.resnet8.pth.tar", "torch")
    program = torch.export.load(path).module()
    for n in (1, 3):
        assert torch.allclose(program(images(n)), small(images(n)), atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["small.resnet8.pt2"]


def test_torchvisions_vgg_is_told_from_the_projects():
    """Both libraries have a vgg11; the file's widths tell which it is."""
    with torch.device("meta"):
        for make, expected in ((models.build_torchvision, True), (models.build, False)):
            assert models.is_torchvisions({"state_dict": make("vgg11").state_dict()}, "vgg11") is expected
