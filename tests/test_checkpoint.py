"""Writing without loss, and what is read of files of this project and of others. Errors of a write: test_full_disk."""

import errno
import os
import random

import numpy as np
import pytest
import torch

from AHSG_HT import AHSG_HT
from models.resnet_cifar import CifarResNet
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.small.filters import check_plan, count_zero_filters, format_plan, kept_filters, make_plan


@pytest.mark.parametrize("links", [True, False])
def test_the_file_before_is_kept(tmp_path, monkeypatch, links):
    """Also on file systems without hard links."""
    path, previous = tmp_path / "checkpoint.pth.tar", tmp_path / "previous.pth.tar"
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    checkpoints.write({"state_dict": {"w": torch.tensor(0.0)}}, tmp_path / "best.pth.tar")
    for value in (1.0, 2.0, 3.0):
        assert previous.exists() == (value > 2)
        checkpoints.write({"state_dict": {"w": torch.tensor(value)}}, tmp_path / "best.pth.tar", path, keep=previous)
    kinds = {file.name: float(checkpoints.read(file)["state_dict"]["w"]) for file in tmp_path.iterdir()}
    assert kinds == {"best.pth.tar": 3.0, "checkpoint.pth.tar": 3.0, "previous.pth.tar": 2.0}


def test_random_states_come_back(tmp_path):
    path = tmp_path / "states.pth.tar"
    checkpoints.write({"state_dict": {"w": torch.ones(1)}, "random_states": checkpoints.random_states()}, path)
    first = float(torch.rand(1)), random.random(), np.random.rand(), np.random.randn()
    states = checkpoints.read(path)["random_states"]
    checkpoints.restore_random_states(states)
    assert first == (float(torch.rand(1)), random.random(), np.random.rand(), np.random.randn())
    with pytest.raises(UserError, match="random states are damaged"):
        checkpoints.restore_random_states({**states, "numpy": [1, 2]})


def test_entries_of_others_are_read_where_they_are_what_their_names_say(tmp_path):
    optimizer = {"state": {}, "param_groups": []}
    good = {"arch": "resnet8", "epoch": 3, "best_prec1": torch.tensor([91.5]), "optimizer": optimizer}
    bad = {"arch": ["resnet8"], "epoch": "3", "best_prec1": float("nan"), "optimizer": {"state": 1}}
    for entries, read in ((good, {**good, "best_prec1": 91.5}), (bad, {})):
        content = {"state_dict": {"module.w": torch.ones(1)}, "settings": {"HTrate": 1}, "num_classes": 3, **entries}
        torch.save(content, tmp_path / "file.pth")
        assert checkpoints.read(tmp_path / "file.pth") == {"state_dict": {"w": torch.ones(1)}, **read}


@pytest.mark.parametrize(
    "entries",
    [
        dict(num_classes=10**9),
        dict(input_shape=[3, 10**6, 10**6]),
        dict(epoch=-1),
        dict(optimizer={"state": 1}),
        dict(normalisation={"mean": [0.5]}),
    ],
    ids=str,
)
def test_own_entries_of_another_kind_are_named(tmp_path, entries):
    path = tmp_path / "own.pth.tar"
    checkpoints.write({"state_dict": CifarResNet(8, 10).state_dict(), **entries}, path)
    with pytest.raises(UserError, match=f"entry '{next(iter(entries))}' in"):
        checkpoints.read(path)


def test_the_plan_lists_every_convolution():
    net = CifarResNet(8)
    plan = make_plan(net, AHSG_HT(net.parameters(), HTrate=0.7))
    expected = [(16, 11, 5)] * 3 + [(32, 22, 10)] * 2 + [(64, 44, 20)] * 2
    assert [(layer.filters, layer.kept, layer.removed) for layer in plan] == expected
    assert "7 convolutions, 240 filters: 165 kept, 75 removed" in format_plan(plan)
    with pytest.raises(UserError, match=r"conv_1_3x3\.weight has 16 filters.*plan keeps 11"):
        check_plan(plan, kept_filters(net))


def test_a_filter_is_zero_only_with_its_bias():
    net = CifarResNet(8)
    with torch.no_grad():
        net.conv_1_3x3.weight[[2, 5]] = 0
        net.bn_1.bias[5] = 0.1
    kept = kept_filters(net, {net.conv_1_3x3.weight: [net.bn_1.bias]})
    assert kept["conv_1_3x3.weight"] == [i for i in range(16) if i != 2]
    plan = make_plan(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert count_zero_filters(plan, kept).startswith("1 of 16 (1 convolution), 0 of 16 (2 convolutions)")
