"""Tiny data and networks that several test files share."""

import json
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from data.images import normalise
from data.sources import DATASETS
from data.synthetic import make_images
from models.resnet_cifar import CifarResNet
from utils.train import command_line, engine


def load(path: Path) -> dict:
    """The content of a checkpoint."""
    return torch.load(path, weights_only=True)


def results(folder: Path) -> dict:
    """A run's results.json."""
    return json.loads((folder / "results.json").read_text())


def make_tree(root: Path) -> Path:
    """An image tree of 10 classes, 60 training and 20 test images of 32x32."""
    for split, count, seed in (("train", 60, 1), ("test", 20, 2)):
        images, labels = make_images(count, seed)
        for i in range(count):
            folder = root / split / f"class{labels[i]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    return root


def train_epoch(net, loader, objective, optimizer, device, *, epoch, max_images=None, before_step=None):
    """A pass over the loader with the engine's steps, without a Trainer; the means over it."""
    net.train()
    means, sizes = engine.RunningMeans(device), loader.sizes(epoch)
    for t, (images, labels) in enumerate(loader):
        options = dict(
            device=device,
            normalise=loader.dataset.normalise,
            size=sizes[t],
            growth=sizes[t] / sizes[0],
            epoch=epoch,
            max_images=max_images,
        )
        if before_step:
            options["before_update"] = partial(before_step, epoch * len(sizes) + t)
        engine.train_step(objective, net, images, labels, optimizer, means, **options)
    return means.read()


def settings_of(script, argv):
    """The settings of a script's command line."""
    return script.settings(command_line.parse(script.parser(), argv), {})


def resnet8(num_classes=10, **options):
    """One block per stage."""
    return CifarResNet(8, num_classes, **options)


def resnet8_dropout(num_classes=10):
    net = CifarResNet(8, num_classes)
    net.stage_1.append(torch.nn.Dropout(0.2))
    return net


NETWORKS = {"resnet8": resnet8, "resnet8_dropout": resnet8_dropout}


def make_teacher(path: Path) -> Path:
    """A checkpoint of a resnet8 trained on the tiny tree's test images, well above chance."""
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
    torch.save({"epoch": 40, "arch": "resnet8", "state_dict": net.state_dict(), "best_prec1": 100.0}, path)
    return path
