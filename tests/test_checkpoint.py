"""Writing without loss and reading without trust. Networks from files are in test_models.py."""

import errno
import os
import pickle

import pytest
import torch

import models
from models.resnet_cifar import CifarResNet
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.small.filters import check_plan, count_zero_filters, format_plan, kept_filters, make_plan


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth.tar"
    checkpoints.write({"state_dict": {"w": torch.ones(2)}}, path)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoints.write({"state_dict": {"w": torch.zeros(2)}}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_that_would_run_code_is_refused(tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "evil.pth.tar"

    class Payload:
        def __reduce__(self):
            return open, (str(trap), "w")

    for save in (torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))):
        save({"state_dict": {"w": Payload()}}, path)
        with pytest.raises(UserError) as caught:
            checkpoints.read(path)
        assert "\n" not in str(caught.value)
        assert not trap.exists()


def test_random_states_come_back(tmp_path):
    import random

    import numpy as np

    path = tmp_path / "states.pth.tar"
    checkpoints.write({"state_dict": {"w": torch.ones(1)}, "random_states": checkpoints.random_states()}, path)
    first = torch.rand(3), random.random(), np.random.rand()
    checkpoints.restore_random_states(checkpoints.read(path)["random_states"])
    again = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(first[0], again[0]) and first[1:] == again[1:]


def of_training() -> dict:
    """A training checkpoint as the first versions of this project wrote it, without a mark."""
    return {
        "state_dict": {"w": torch.ones(1)},
        "epoch": 1,
        "arch": "resnet8",
        "best_prec1": 10.0,
        "optimizer": {"state": {}, "param_groups": []},
        "settings": {"recipe": "prune", "HTrate": 0.7, "manualSeed": 1},
        "history": [],
        "random_states": checkpoints.random_states(),
        "loader": {"seed": 1, "epoch": 1, "position": 0},
    }


def test_a_checkpoint_from_before_the_mark_keeps_its_settings(tmp_path):
    path = tmp_path / "old.pth.tar"
    torch.save(of_training(), path)
    assert checkpoints.read(path)["settings"] == of_training()["settings"]
    # What is not of the expected kind is a file of others: read, and its settings left out.
    torch.save({**of_training(), "loader": {"seed": 1}}, path)
    assert "settings" not in checkpoints.read(path)


def test_a_position_without_its_means_is_refused(tmp_path):
    path = tmp_path / "odd.pth.tar"
    checkpoints.write({**of_training(), "loader": {"seed": 1, "epoch": 1, "position": 3}}, path)
    with pytest.raises(UserError, match="missing entry 'running_means'"):
        checkpoints.read(path)


def test_the_plan_lists_every_convolution():
    plan = make_plan(CifarResNet(8), 0.7)
    assert [(layer.filters, layer.kept, layer.removed) for layer in plan] == [(16, 11, 5)] * 3 + [(32, 22, 10)] * 2 + [
        (64, 44, 20)
    ] * 2
    assert "7 convolutions, 240 filters: 165 kept, 75 removed" in format_plan(plan)


def test_a_network_that_breaks_its_plan_is_caught():
    net = CifarResNet(8)
    plan = make_plan(net, 0.7)
    with pytest.raises(UserError, match=r"conv_1_3x3\.weight has 16 filters.*plan keeps 11"):
        check_plan(plan, kept_filters(net))


def test_a_filter_is_zero_only_with_its_bias():
    net = CifarResNet(8)
    with torch.no_grad():
        net.conv_1_3x3.weight[[2, 5]] = 0
        net.bn_1.bias[5] = 0.1
    kept = kept_filters(net)
    assert kept["conv_1_3x3.weight"] == [i for i in range(16) if i != 2]
    assert (
        count_zero_filters(make_plan(net, 1.0), kept)
        == "1 of 16 (1 convolution), 0 of 16 (2 convolutions), 0 of 32 (2 convolutions), 0 of 64 (2 convolutions)"
    )


def test_complex_weights_are_refused_rather_than_halved(tmp_path):
    state = {name: value.to(torch.complex64) for name, value in models.build("resnet8").state_dict().items()}
    torch.save(state, tmp_path / "complex.pth")
    with pytest.raises(UserError, match="holds complex numbers"):
        models.load(tmp_path / "complex.pth", "resnet8")
