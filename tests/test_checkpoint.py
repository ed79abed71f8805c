"""Checkpoints: written without loss; damaged, of others, or made to run code. Errors of a write: test_full_disk."""

import errno
import os
import pickle
import random

import numpy as np
import pytest
import torch

from models.resnet_cifar import CifarResNet
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError

NAME = "checkpoint.resnet8.pth.tar"


def refused(path, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        checkpoints.read(path)
    assert "\n" not in str(caught.value) and f"'{path}'" in str(caught.value)


@pytest.mark.parametrize("links", [True, False])
def test_the_file_before_is_kept(tmp_path, monkeypatch, links):
    """Also on file systems without hard links."""
    path, previous = tmp_path / "checkpoint.pth.tar", tmp_path / "previous.pth.tar"
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
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
    good = {"arch": "resnet8", "epoch": 3, "optimizer": optimizer}
    bad = {"arch": ["resnet8"], "epoch": "3", "optimizer": {"state": 1}}
    for entries, read in ((good, good), (bad, {})):
        content = {
            "state_dict": {"module.w": torch.ones(1)},
            "settings": {"HTrate": 1},
            "best_prec1": torch.ones(1),
            **entries,
        }
        torch.save(content, tmp_path / "file.pth")
        assert checkpoints.read(tmp_path / "file.pth") == {"state_dict": {"w": torch.ones(1)}, **read}


@pytest.mark.parametrize("is_zip", [True, False])
def test_truncated_files_are_named(tmp_path, is_zip):
    """In torch's present format, and in that before 1.6."""
    path = tmp_path / "cut.pth.tar"
    torch.save({"state_dict": CifarResNet(8).state_dict()}, path, _use_new_zipfile_serialization=is_zip)
    intact = path.read_bytes()
    for length in [0, 4, *random.Random(1).sample(range(len(intact)), 20), len(intact) - 1]:
        path.write_bytes(intact[:length])
        refused(path, "damaged")


def test_flipped_bits_are_noticed_or_harmless(tmp_path):
    """A zip file has checksums; its padding and dates are the only places where a byte may be anything."""
    path, net = tmp_path / "flipped.pth.tar", CifarResNet(8, 10).state_dict()
    checkpoints.write({"state_dict": net}, path)
    intact, draw, noticed = path.read_bytes(), random.Random(2), 0
    for position in draw.sample(range(len(intact)), 40):
        content = bytearray(intact)
        content[position] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            weights = checkpoints.read(path)["state_dict"]
        except UserError:
            noticed += 1
        else:
            assert all(torch.equal(weights[name], net[name]) for name in net)
    assert noticed > 30


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no checkpoint at"),
        (b"accuracy 91.71\n" * 100, "damaged"),
        ([1, 2], "no state_dict"),
        ({"epoch": 3}, "no state_dict"),
        ({"state_dict": {}}, "no state_dict"),
        ({"state_dict": {"a": 1}}, "'a' in its state_dict"),
        ({"state_dict": {"w": torch.ones(1).expand(10**9)}}, "no intact tensor"),  # stride 0
        ({"state_dict": {"w": torch.ones(2).to_sparse()}}, "no intact tensor"),
    ],
)
def test_files_without_weights_are_named(tmp_path, content, named):
    path = tmp_path / "empty.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    refused(path, named)


class Payload:
    def __init__(self, trap):
        self.trap = str(trap)

    def __reduce__(self):
        return open, (self.trap, "w")


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_payload_never_runs(tmp_path, how):
    trap, path = tmp_path / "trap", tmp_path / "evil.pth.tar"
    content = {"format": checkpoints.FORMAT, "state_dict": {"w": torch.ones(3)}, "settings": {"x": Payload(trap)}}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    refused(path, "could run code")
    assert not trap.exists()
    pickle.loads(pickle.dumps(content["settings"]))  # the payload is a working one
    assert trap.exists()


def test_auto_names_a_damaged_checkpoint_and_uses_the_one_before(train, capsys):
    folder = train("--epochs", 2, "--save_path", "out", "--resume", "auto")
    intact = torch.load(folder / NAME, weights_only=True)
    (folder / NAME).write_bytes((folder / NAME).read_bytes()[:9999])
    capsys.readouterr()
    train("--epochs", 2, "--save_path", "out", "--resume", "auto", "--evaluate")
    assert capsys.readouterr().out.count(f"note: '{folder / NAME}' is damaged") == 1
    assert train("--epochs", 2, "--save_path", "out", "--resume", "auto") == folder
    printed = capsys.readouterr().out
    assert printed.count(f"note: '{folder / NAME}' is damaged") == 1 and "[Epoch=001/002]" in printed
    again = torch.load(folder / NAME, weights_only=True)
    assert all(torch.equal(again["state_dict"][name], value) for name, value in intact["state_dict"].items())
    # The damaged file did not take the place of the good one that was used.
    assert torch.load(folder / "previous.resnet8.pth.tar", weights_only=True)["epoch"] == 1
    for file in folder.glob("*.pth.tar"):
        file.write_bytes(b"PK\x03\x04")
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match="'out' has no checkpoint that can be read"):
        train("--epochs", 2, "--save_path", "out", "--resume", "auto")
    assert sorted(folder.iterdir()) == before
