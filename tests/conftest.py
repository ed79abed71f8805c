"""What several test files share: a tiny image tree, a small network, and the training script run in this process."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import NETWORKS, make_teacher, make_tree

import cifar10_resnet_test as script
import models.registry
from data.synthetic import make_images

torch.set_num_threads(1)
GPUS = pytest.MonkeyPatch()
ON_GPUS = ("test_optimizer.py", "test_optimizer_on_gpus.py", "test_bench_optimizer.py")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Hides the GPUs from runs and processes of tests that expect the bits of a CPU."""
    GPUS.undo()
    if item.path.name not in ON_GPUS:
        GPUS.setenv("CUDA_VISIBLE_DEVICES", "")
        GPUS.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """See tiny.make_tree."""
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory) -> Path:
    """4 classes, 24 training and 16 validation images of several sizes."""
    root = tmp_path_factory.mktemp("jpegs")
    for split, count, seed in (("train", 24, 1), ("val", 16, 2)):
        pixels, labels = make_images(60, seed=seed)
        chosen = [i for i in range(60) if labels[i] < 4][:count]
        for i in chosen:
            folder = root / split / f"n{int(labels[i]):08d}"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels[i].permute(1, 2, 0).numpy()).resize((70 + 5 * (i % 4), 64 + 7 * (i % 3)))
            # As in ImageNet, where some are grey and some CMYK.
            image.convert(["RGB", "RGB", "L", "CMYK"][i % 4]).save(folder / f"{i:03d}.JPEG", quality=90)
    return root


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """Registers resnet8, one block per stage, for runs that take a second, and the same with dropout. A run before has
    made tiny numbers zero for the whole process.
    """
    torch.set_flush_denormal(False)
    for name, make in NETWORKS.items():
        monkeypatch.setitem(models.registry.REGISTRY, name, make)


@pytest.fixture
def train(tree, tmp_path, monkeypatch):
    """train("--epochs", "2", ...) runs the CIFAR script on the tiny tree with resnet8 in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, arch="resnet8", data=tree):
        defaults = [] if "--batch_size" in flags else ["--batch_size", "16"]
        if not any(f in flags for f in ("--k", "--recipe")):
            defaults += ["--k", "24"]
        return script.main([str(data), "--arch", arch, *defaults, *map(str, flags)])

    return run


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """A checkpoint of a resnet8 trained on the tiny tree's test images, well above chance."""
    return make_teacher(tmp_path_factory.mktemp("teacher") / "best.resnet8.pth.tar")
