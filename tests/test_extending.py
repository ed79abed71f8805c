"""What the README's "Extending" says, done with toys: a network, a data set of other images, a loss, a ranking of
filters.
"""

from collections import OrderedDict

import pytest
import tiny
import torch
from torch import nn

import AHSG_HT
import cifar10_resnet_test as script
import data
import models
from data import DATASETS, Spec
from data.synthetic import make_images
from utils.base.errors import UserError
from utils.prune.scores import SCORES, Score
from utils.train.features import with_features
from utils.train.losses import LOSSES, Loss, parse_term


class ToyNetwork(nn.Module):
    """Two convolutions; the head is a 1x1 convolution with a name of its own."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, 4),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 10, 3, 2),
            nn.BatchNorm2d(10),
            nn.ReLU(),
        )
        self.decide = nn.Conv2d(10, num_classes, 1)

    def forward(self, images):
        return self.decide(self.body(images).mean((2, 3), keepdim=True)).flatten(1)


class Power(Loss):
    """Mean of |student - teacher|^p."""

    def __init__(self, *, p: float = 3.0):
        super().__init__()
        self.p = p

    def forward(self, student, teacher, labels):
        return (student - teacher).abs().pow(self.p).mean()


def make_large(path):
    """Synthetic images of 64x64 in three classes, tested on those that are trained on: well above chance."""
    arrays = {}
    for split, count, seed in (("train", 90, 1), ("test", 90, 1)):
        images, labels = make_images(count, seed)
        chosen = labels < 3
        arrays[split] = images[chosen].repeat_interleave(2, 2).repeat_interleave(2, 3), labels[chosen]
    return arrays, ["a", "b", "c"]


def spread(weight):
    """Standard deviation of a filter's entries."""
    return weight.flatten(1).std(1)


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setitem(models.REGISTRY, "toy", ToyNetwork)
    monkeypatch.setitem(DATASETS, "large", Spec("large", 64, classes=3, make=make_large))
    monkeypatch.setitem(LOSSES, "Power", Power)
    monkeypatch.setitem(AHSG_HT.NORMS, "spread", spread)


def test_toys_work_together_from_the_command_line(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["data", "--dataset", "large", "--arch", "toy", "--batch_size", "8", "--k", "none", "--lr", "0.05"]
    teacher = script.main([*common, "--recipe", "baseline", "--epochs", "8", "--schedule", "9", "--gammas", "1"])
    flags = ["--teacher", str(teacher / "checkpoint.toy.pth.tar"), "--kd", "logits:Power:0.5:p=4", "--norm", "spread"]
    folder = script.main([*common, *flags, "--HTrate", "0.5", "--epochs", "1"])
    results = tiny.results(folder)
    assert results["settings"]["kd"] == ["logits:Power:0.5:p=4"] and results["settings"]["norm"] == "spread"
    assert [layer["kept"] for layer in results["filters"]] == [6, 5, 3] and results["num_classes"] == 3
    small = models.load(folder / "small.toy.pth.tar")
    assert small.body[0].out_channels <= 6 and small(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_a_loss_needs_a_class_and_a_registry_entry(toys):
    loss = parse_term("feature:Power:2:p=4").make_loss()
    assert loss(torch.full((2, 3), 2.0), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)).item() == 16
    with pytest.raises(UserError, match=r"its options: p$"):
        parse_term("feature:Power:2:q=4")


def test_a_score_for_gradual_pruning(train, monkeypatch):
    """The sum over entries, which for these weights ranks in another way than their norm."""
    monkeypatch.setitem(SCORES, "sum", Score(lambda filters: filters.weight.flatten(1).sum(1)))
    common = ["--recipe", "prune_gradual", "--epochs", 1, "--HTrate", 0.5, "--prune_begin", 0, "--prune_end", 0]
    folders = [train(*common, "--prune_score", score, "--save_path", score) for score in ("sum", "norm")]
    first, second = (tiny.results(folder)["filters"] for folder in folders)
    assert first != second and [f["kept"] for f in first] == [f["kept"] for f in second]


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            lambda arrays, classes: (dict(arrays, train=(arrays["train"][0].float(), arrays["train"][1])), classes),
            "uint8",
        ),
        (lambda arrays, classes: (dict(arrays, test=(arrays["test"][0], arrays["test"][1] + 1)), classes), "labels"),
        (lambda arrays, classes: (arrays, [*classes, "d"]), "3 classes, got train, test with 4"),
    ],
)
def test_a_data_set_that_breaks_its_record_is_refused(change, pattern, monkeypatch):
    monkeypatch.setitem(DATASETS, "large", Spec("large", 64, classes=3, make=lambda path: change(*make_large(path))))
    with pytest.raises(UserError, match=pattern):
        data.load("large", "nowhere")


def test_a_network_that_cannot_be_traced_is_thresholded_and_kept_whole(train, monkeypatch):
    class Branching(ToyNetwork):
        def forward(self, images):
            return super().forward(images) if images.mean() > -1e9 else images

    monkeypatch.setitem(models.REGISTRY, "branching", Branching)
    folder = train("--epochs", 1, "--HTrate", 0.5, arch="branching")
    results = tiny.results(folder)
    assert results["finished"] and "the network" in "".join(results["small"]["kept_whole"])
    with pytest.raises(UserError, match=r"torch\.fx cannot trace its forward"):
        train("--epochs", 1, "--recipe", "prune_gradual", arch="branching")


def test_stages_are_found_by_their_names():
    net = ToyNetwork()
    net.body = nn.Sequential(OrderedDict(block1=net.body[:3], block2=net.body[3:]))
    _, _, stages = with_features(net)(torch.zeros(2, 3, 32, 32), return_features=True)
    assert [stage.shape[1] for stage in stages] == [12, 10]


class HeadFirst(nn.Module):
    """The head is registered before the layers that run before it."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.decide = nn.Linear(12, num_classes)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.ReLU())

    def forward(self, images):
        return self.decide(self.body(images).mean((2, 3)))


def test_the_head_is_what_runs_last_not_what_is_registered_last(train, monkeypatch):
    monkeypatch.setitem(models.REGISTRY, "head_first", HeadFirst)
    folder = train("--epochs", 1, "--HTrate", 0.5, arch="head_first")
    filters = tiny.results(folder)["filters"]
    assert [layer["kept"] for layer in filters] == [4, 6]
    net, images = HeadFirst(), torch.zeros(2, 3, 32, 32)
    assert with_features(net)(images, return_features=True)[1].shape == (2, 12)


@pytest.mark.parametrize(
    ("end", "pattern"),
    [
        (lambda x: x.view(x.size(0), -1)[:, :10], "view size is not compatible"),
        (lambda x: x, r"must return logits .*got shape \(2, 12, 3, 3\)"),
        (lambda x: {"out": x.mean((2, 3))[:, :10]}, "must return logits .*got dict"),
    ],
)
def test_a_network_without_logits_is_refused_before_anything_is_written(end, pattern, train, monkeypatch):
    class Bodiless(HeadFirst):
        def forward(self, images):
            return end(self.body(images))

    monkeypatch.setitem(models.REGISTRY, "bodiless", Bodiless)
    with pytest.raises(UserError, match=pattern):
        train("--epochs", 1, "--recipe", "baseline", arch="bodiless")


def test_the_ranking_decides_what_is_kept(toys):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 6, 3, bias=False)
    with torch.no_grad():
        conv.weight[3] = 5.0  # the largest norm, no spread
    expected = spread(conv.weight).topk(3).indices.sort().values
    AHSG_HT.hard_threshold([conv.weight], 0.5, norm="spread")
    assert torch.equal(conv.weight.flatten(1).any(1).nonzero().flatten(), expected)
