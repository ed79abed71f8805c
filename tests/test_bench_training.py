"""The original-style loop does the same work as the project's, and the benchmark reports what it measured."""

import argparse
import copy
import json

import pytest
import torch

import data
from AHSG_HT import AHSG_HT
from data.augment import crop_and_flip, normalise
from models.resnet_cifar import CifarResNet
from utils.base.errors import UserError
from utils.bench import gpu, training
from utils.bench.optimizer import HT_RECIPE
from utils.bench.original_loop import PerFilterLoop, PilImages, train_epoch_original
from utils.train.engine import RunningMeans, train_step
from utils.train.objective import cross_entropy

CPU = torch.device("cpu")


def image_set(n=40):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return data.ImageArrays(pixels, torch.arange(n) % 10, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4], augment=True)


def test_both_loops_take_the_same_steps():
    """In double precision: losses, accuracies, weights, BatchNorm statistics and removed filters after four steps."""
    generator = torch.Generator().manual_seed(0)
    shape = dict(generator=generator, dtype=torch.float64)
    sizes = [8, 12, 16, 3]
    batches = [(torch.randn(n, 3, 16, 16, **shape), torch.randint(0, 10, (n,), generator=generator)) for n in sizes]
    torch.manual_seed(0)
    ours = CifarResNet(8).double()
    theirs = copy.deepcopy(ours)
    ours.to(memory_format=torch.channels_last).train()
    recipe = HT_RECIPE | {"lr": 0.05}
    optimizer, means = AHSG_HT(ours.parameters(), **recipe), RunningMeans(CPU)
    for t, (x, y) in enumerate(batches):
        train_step(ours, x, y, cross_entropy, optimizer, means, t=t, sizes=sizes, epoch=0)
    loop = PerFilterLoop(list(theirs.parameters()), **recipe)
    expected = train_epoch_original(theirs, batches, cross_entropy, loop, CPU)
    found = means.read()
    assert (found.loss, found.top1, found.top5) == pytest.approx(expected, rel=1e-6)
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-6, atol=1e-9)
    zeros = [[not f.any() for f in net.stage_1[0].conv_a.weight] for net in (ours, theirs)]
    assert zeros[0] == zeros[1] and sum(zeros[0]) == 5


def test_the_original_transforms_make_our_crops_and_flips():
    """Every image they give is one of the 162 that crop_and_flip can give, and they vary."""
    images = image_set(3)
    numbers = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    torch.manual_seed(0)
    pil, seen = PilImages(images), set()
    for index in range(3):
        crops = crop_and_flip(images.images[index].expand(162, -1, -1, -1), numbers)
        possible = normalise(crops, images.mean, images.std)
        for _ in range(20):
            image, label = pil[index]
            matches = (possible == image).flatten(1).all(dim=1).nonzero().flatten().tolist()
            assert len(matches) == 1 and label == index
            seen.add(matches[0])
    assert len(seen) > 30


@pytest.mark.parametrize("name", ["original", "this", "amp"])
def test_a_loop_trains_the_images_asked_for(name, tree):
    args = argparse.Namespace(dataset="folder", data_path=str(tree), images=24, batch_size=16, workers=0)
    args.device, args.teacher = CPU, "resnet8"
    train = training.make_loop(name, "resnet8", args)
    losses = [train()[0] for _ in range(4)]
    assert losses[-1] < losses[0]
    args.images = 61
    with pytest.raises(UserError, match="--images 61: the data set has 60"):
        training.make_loop(name, "resnet8", args)


def test_the_command_for_a_gpu_runs_with_small_numbers(tmp_path, capsys):
    """It runs training and optimizer benchmark, too: each loop in its own process."""
    gpu.main(["--quick", "--out", str(tmp_path)])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert " passed" in (tmp_path / "tests.txt").read_text()
    saved = json.loads((tmp_path / f"training_{device}_resnet20.json").read_text())
    assert [row["loop"] for row in saved["timings"]] == ["original", "this"]
    for row in saved["timings"]:
        assert 0 < row["slowest"] <= row["images/s"] <= row["fastest"]
        assert row["times original"] == row["images/s"] / saved["timings"][0]["images/s"]
    text = (tmp_path / f"training_{device}_resnet20.md").read_text()
    assert text in capsys.readouterr().out and "| resnet20 | - | this | " in text
    assert {f"optimizer_{device}_{layout}.md" for layout in ("contiguous", "channels_last")} <= {
        path.name for path in tmp_path.iterdir()
    }


@pytest.mark.parametrize("flags, message", [(["--arch", "resnet21"], "resnet21"), (["--images", "0"], "--images")])
def test_bad_flags_are_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        training.main(flags)
