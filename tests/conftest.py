"""What several test files share: a tiny image tree, a small network, and the training script run in this process."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import cifar10_resnet_test as script
import models.registry
from data.augment import normalise
from data.sources import DATASETS
from data.synthetic import make_images
from models.resnet_cifar import CifarResNet

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """An image tree of 10 classes, 60 training and 20 test images of 32x32."""
    root = tmp_path_factory.mktemp("tree")
    for split, count, seed in (("train", 60, 1), ("test", 20, 2)):
        images, labels = make_images(count, seed)
        for i in range(count):
            folder = root / split / f"class{labels[i]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """Registers resnet8, one block per stage, for runs that take a second, and the same with dropout."""

    def with_dropout(num_classes=10):
        net = CifarResNet(8, num_classes)
        net.stage_1.append(torch.nn.Dropout(0.2))
        return net

    monkeypatch.setitem(
        models.registry.REGISTRY, "resnet8", lambda num_classes=10, **options: CifarResNet(8, num_classes, **options)
    )
    monkeypatch.setitem(models.registry.REGISTRY, "resnet8_dropout", with_dropout)


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
    """A checkpoint of a resnet8 that has learnt the tiny tree's test images by heart, well above chance."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    net = CifarResNet(8, 10).train()
    images, labels = make_images(20, seed=2)
    mean, std = (torch.tensor(v) / 255 for v in (DATASETS["cifar10"].mean, DATASETS["cifar10"].std))
    batch = normalise(images, mean, std)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(net(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = folder / "best.resnet8.pth.tar"
    torch.save({"epoch": 40, "arch": "resnet8", "state_dict": net.state_dict(), "best_prec1": 100.0}, path)
    return path
