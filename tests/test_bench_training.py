"""The loop in the release's manner does the same work as the project's, and the benchmark reports what it measured."""

import copy
import json
from typing import ClassVar

import pytest
import torch

import data
from AHSG_HT import AHSG_HT
from data.augment import crop_and_flip, normalise
from models.resnet_cifar import CifarResNet
from utils.base.errors import UserError
from utils.bench import accuracy as bench_accuracy
from utils.bench import operations as bench_operations
from utils.bench import training as bench_training
from utils.bench.loops import OPTIMIZER, Setup, take_share
from utils.bench.original_loop import PilImages, release_loader, train_epoch_as_released
from utils.bench.per_filter_loop import PerFilterLoop
from utils.train.distillation import Distillation
from utils.train.engine import train_epoch
from utils.train.objective import cross_entropy

CPU = torch.device("cpu")
SIZES = [8, 12, 16, 3]


class Batches(list):
    """The same mini-batches for both loops."""

    def sizes(self, epoch):
        return [len(labels) for _, labels in self]


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return Batches(
        (
            torch.randn(n, 3, 16, 16, generator=generator, dtype=torch.float64),
            torch.randint(0, 10, (n,), generator=generator),
        )
        for n in SIZES
    )


def image_set(n=40):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return data.ImageArrays(pixels, torch.arange(n) % 10, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4], augment=True)


@pytest.mark.parametrize("distilled", [False, True])
def test_both_loops_take_the_same_steps(batches, distilled):
    """In double precision: losses, accuracies, weights, BatchNorm statistics and removed filters after four steps."""
    torch.manual_seed(0)
    ours, teacher = CifarResNet(8).double(), CifarResNet(8).double()
    theirs = copy.deepcopy(ours)
    ours.to(memory_format=torch.channels_last)
    objectives = [cross_entropy, cross_entropy]
    if distilled:
        objectives = [Distillation(copy.deepcopy(teacher), net, batches[0][0][:2]) for net in (ours, theirs)]
    options = OPTIMIZER | {"lr": 0.05}
    found = train_epoch(ours, batches, objectives[0], AHSG_HT(ours.parameters(), **options), CPU, epoch=0)
    expected = train_epoch_as_released(
        theirs, batches, objectives[1], PerFilterLoop(list(theirs.parameters()), **options), CPU, epoch=0
    )
    assert (found.loss, found.top1, found.top5) == pytest.approx(expected, rel=1e-6)
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-6, atol=1e-9)
    zeros = [[not f.any() for f in net.stage_1[0].conv_a.weight] for net in (ours, theirs)]
    assert zeros[0] == zeros[1] and sum(zeros[0]) == 5


def test_the_released_transforms_make_our_crops_and_flips():
    """Every image they give is one of the 162 that crop_and_flip can give, and they vary."""
    images = image_set(3)
    numbers = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    torch.manual_seed(0)
    pil, seen = PilImages(images), set()
    for index in range(3):
        possible = normalise(
            crop_and_flip(images.images[index].expand(162, -1, -1, -1), numbers), images.mean, images.std
        )
        for _ in range(20):
            image, label = pil[index]
            matches = (possible == image).flatten(1).all(dim=1).nonzero().flatten().tolist()
            assert len(matches) == 1 and label == index
            seen.add(matches[0])
    assert len(seen) > 30


def test_the_released_loader_grows_and_gives_every_image_once_in_a_new_order_each_epoch():
    loader = release_loader(image_set(), 4, 12, seed=0, workers=0, pin_memory=False)
    epochs = [[labels for _, labels in loader] for _ in range(2)]
    for epoch in epochs:
        assert [len(labels) for labels in epoch] == [4, 8, 12, 12, 4]
        assert torch.cat(epoch).bincount().tolist() == [4] * 10
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


@pytest.mark.parametrize("count, expected", [(20, [2] * 10), (40, [4] * 10), (100, [4] * 10)])
def test_a_share_of_the_images_has_every_class_equally(count, expected):
    images = image_set()
    take_share(images, count, 10)
    assert images.labels.bincount().tolist() == expected and len(images.images) == len(images.labels)


def test_the_benchmark_reports_both_loops(tmp_path, capsys):
    flags = ["--dataset", "synthetic", "--nets", "resnet20", "--teacher", "no", "--loops", "release", "this"]
    sizes = ["--images", "32", "--batch_size", "16", "--rounds", "2", "--workers", "0", "--threads", "1", "--ngpu", "0"]
    bench_training.main([*flags, *sizes, "--save_path", str(tmp_path)])
    saved = json.loads((tmp_path / "speed_cpu_resnet20.json").read_text())
    (result,) = saved["results"]
    assert result["flops_per_image"] == 6 * 40_551_040
    assert [row["loop"] for row in result["rows"]] == ["release", "this"]
    for row in result["rows"]:
        assert len(row["rounds"]) == 2 and row["slowest"] <= row["images_per_s"] <= row["fastest"]
        assert sum(row["shares"].values()) == pytest.approx(1, abs=0.2) and min(row["shares"].values()) > 0
        assert row["memory"]["process"] > 100
    text = (tmp_path / "speed_cpu_resnet20.md").read_text()
    assert text in capsys.readouterr().out and "| resnet20 | - | this |" in text


def test_operations_add_up_to_the_step(tmp_path, capsys):
    """Per mini-batch: as many convolutions and their gradients as the network has, within the step's time."""
    flags = ["--operations", "--dataset", "synthetic", "--nets", "resnet20", "--teacher", "no", "--ngpu", "0"]
    sizes = ["--images", "48", "--batch_size", "16", "--rounds", "2", "--workers", "0", "--threads", "1"]
    bench_training.main([*flags, *sizes, "--save_path", str(tmp_path)])
    saved = json.loads((tmp_path / "operations_cpu_resnet20.json").read_text())
    assert [result["loop"] for result in saved["results"]] == ["release", "this"]
    for result in saved["results"]:
        calls = {row["name"]: row["calls"] for row in result["operations"]}
        assert calls["aten::convolution"] == calls["aten::convolution_backward"] == 19
        times = [row["ms"] for row in result["operations"]]
        assert times == sorted(times, reverse=True) and 0 < sum(times) < 1.5 * result["watched_ms"]
    text = (tmp_path / "operations_cpu_resnet20.md").read_text()
    assert text in capsys.readouterr().out and "| convolution_backward | 19 |" in text


def test_operations_reach_their_share_of_a_matrix_product():
    """By hand: 4 GFLOP in 20 ms are 200 GFLOP/s, half of 400."""
    rows = [{"name": "aten::convolution", "calls": 2.0, "ms": 20.0}, {"name": "aten::add", "calls": 3.0, "ms": 80.0}]
    rows.append({"name": "aten::view", "calls": 9.0, "ms": 0.5})
    result = {"loop": "this", "step_ms": 99.0, "watched_ms": 110.0, "matmul_flops": 400e9, "copy_bytes": 20e9}
    result |= {"operations": rows, "images": 8.0}
    lines = bench_operations.operations_table([result], {"aten::convolution": 5 * 10**8}, "heading").splitlines()
    assert "| convolution | 2 | 20.0 | 19.9 % | 50 % |" in lines
    assert lines[2].endswith("a matrix product reaches 400 GFLOP/s here, a copy 20 GB/s")
    assert "| add | 3 | 80.0 | 79.6 % | - |" in lines and "| 1 more | 9 | 0.5 | 0.5 % | - |" in lines


class FakeLoop:
    """Counts the runs; accuracy depends on loop and seed."""

    trained: ClassVar[list[str]] = []

    def __init__(self, setup):
        self.setup = setup
        self.rates = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, method, *arguments):
        if method == "set_learning_rate":
            self.rates.append(arguments[0])
        if method == "train":
            self.trained.append(self.setup.label)
            return {"seconds": 1.0, "loss": 1.5}
        return {"accuracy": 50.0 + self.setup.seed, "loss": 1.25} if method == "test" else None


def test_accuracy_accumulates_over_calls_and_repeats_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_accuracy, "LoopProcess", FakeLoop)
    FakeLoop.trained = []
    flags = ["--accuracy", "--nets", "resnet20", "--dataset", "synthetic", "--ngpu", "0", "--save_path", str(tmp_path)]
    bench_training.main([*flags, "--loops", "release", "--seeds", "1", "2"])
    bench_training.main([*flags, "--loops", "release", "this", "--seeds", "1", "2", "3"])
    assert FakeLoop.trained.count("release") == FakeLoop.trained.count("this") == 3 * 3
    text = (tmp_path / "accuracy_cpu_resnet20.md").read_text()
    assert text in capsys.readouterr().out
    assert "| release | 1 2 3 | 51.00 52.00 53.00 | 52.00 | 1.000 | 1.2500 | 0.000 |" in text
    assert len(json.loads((tmp_path / "accuracy_cpu_resnet20.json").read_text())["runs"]) == 6


def test_start_up_is_the_time_to_the_first_step(monkeypatch, capsys, tmp_path):
    script = tmp_path / "cifar10_resnet_test.py"
    script.write_text("print('settings'); print('  Epoch: [000][000/100]'); import time; time.sleep(60)")
    monkeypatch.setattr(bench_training, "ROOT", tmp_path)
    bench_training.main(["--startup", "--nets", "resnet20", "--ngpu", "0", "--save_path", str(tmp_path / "out")])
    saved = json.loads((tmp_path / "out" / "startup_cpu_resnet20.json").read_text())
    assert len(saved["seconds"]) == 3 and all(0 < s < 30 for s in saved["seconds"])
    assert "s from command to first step" in capsys.readouterr().out


def test_a_script_that_fails_is_no_start_up_time(monkeypatch, tmp_path):
    (tmp_path / "cifar10_resnet_test.py").write_text("raise SystemExit(2)")
    monkeypatch.setattr(bench_training, "ROOT", tmp_path)
    with pytest.raises(UserError, match="ended before its first step"):
        bench_training.main(["--startup", "--nets", "resnet20", "--ngpu", "0"])


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--nets", "resnet21"], "resnet21"),
        (["--images", "10"], "less than a mini-batch of 128"),
        (["--rounds", "0"], "--rounds"),
        (["--operations", "--startup"], "not allowed with"),
        (["--operations", "--loops", "this", "this --compile"], "eager loops.*'this --compile'"),
    ],
)
def test_bad_flags_are_one_line(flags, complaint):
    with pytest.raises(UserError, match=complaint):
        bench_training.main(flags)


def test_images_that_are_not_there_are_one_line_too(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        bench_training.main([str(tmp_path / "nowhere"), "--dataset", "folder", "--nets", "resnet20", "--ngpu", "0"])


def test_a_setup_is_named_by_its_options():
    common = dict(arch="resnet20", teacher=None, dataset="cifar10", data_path="", images=1, batch_size=1, k=None)
    common |= dict(workers=0, seed=0, device="cpu", threads=None)
    assert Setup(loop="this", **common, compile=True, amp=True).label == "this --amp --compile"
