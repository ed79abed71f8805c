"""What several test files share: a tiny image tree, a small network, and the training script run in this process."""

from pathlib import Path

import pytest
import torch
from tiny import NETWORKS, make_teacher, make_tree

import cifar10_resnet_test as script
import models.registry

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """See tiny.make_tree."""
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """Registers resnet8, one block per stage, for runs that take a second, and the same with dropout."""

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
    """A checkpoint of a resnet8 that has learnt the tiny tree's test images by heart, well above chance."""
    return make_teacher(tmp_path_factory.mktemp("teacher") / "best.resnet8.pth.tar")
