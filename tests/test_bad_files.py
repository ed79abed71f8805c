"""Checkpoints and images of others: damaged, larger in what they declare than they are, or made to run code."""

import io
import pickle
import random
import struct
import zipfile
import zlib

import pytest
import torch

from data.sources import load
from models.resnet_cifar import CifarResNet
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError

NAME = "checkpoint.resnet8.pth.tar"


def refused(path, pattern=""):
    with pytest.raises(UserError, match=pattern) as caught:
        checkpoints.read(path)
    assert "\n" not in str(caught.value) and f"'{path}'" in str(caught.value)


@pytest.mark.parametrize("is_zip", [True, False])
def test_truncated_files_are_named(tmp_path, is_zip):
    """In torch's present format, and in that before 1.6."""
    path = tmp_path / "cut.pth.tar"
    torch.save({"state_dict": CifarResNet(8).state_dict()}, path, _use_new_zipfile_serialization=is_zip)
    intact = path.read_bytes()
    lengths = random.Random(1).sample(range(len(intact)), 40)
    for length in [*range(5), *range(100, 106), *lengths, len(intact) - 1]:
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
        (b"", "damaged"),
        (b"accuracy 91.71\n" * 100, "damaged"),
        ([1, 2], "no state_dict"),
        ({}, "no state_dict"),
        ({"epoch": 3}, "no state_dict"),
        ({"state_dict": {}}, "no state_dict"),
        ({"state_dict": {"a": 1}}, "'a' in its state_dict"),
        ({"state_dict": {1: torch.zeros(2)}}, "no state_dict"),
        ({"state_dict": {"w": torch.ones(1).expand(10**9)}}, "no intact tensor"),  # stride 0
        ({"state_dict": {"w": torch.ones(0).expand(10**9, 0)}}, "no intact tensor"),
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


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "own format"])
def test_a_payload_never_runs(tmp_path, how):
    trap, path = tmp_path / "trap", tmp_path / "evil.pth.tar"
    content = {"state_dict": {"w": torch.ones(3)}, "settings": {"x": Payload(trap)}}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        content |= {"format": checkpoints.FORMAT} if how == "own format" else {}
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    refused(path, "could run code")
    assert not trap.exists()
    # The payload is a working one.
    pickle.loads(pickle.dumps(content["settings"]))
    assert trap.exists()


@pytest.mark.parametrize("how", ["compressed", "zip", "legacy"])
def test_a_file_that_declares_more_than_it_holds_is_refused(tmp_path, how):
    path, saved = tmp_path / "huge.pth.tar", io.BytesIO()
    torch.save({"state_dict": {"w": torch.zeros(12345)}}, saved, _use_new_zipfile_serialization=how != "legacy")
    # The pickle says 12345 twice: entries of the storage, and of the tensor.
    small, large = struct.pack("<BH", ord("M"), 12345), struct.pack("<Bi", ord("J"), 2**30)
    if how == "legacy":
        path.write_bytes(saved.getvalue().replace(small, large))
    else:
        compression = zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED
        with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w", compression) as new:
            for name in old.namelist():
                is_changed = how == "zip" and name.endswith("data.pkl")
                new.writestr(name, old.read(name).replace(small, large) if is_changed else old.read(name))
    refused(path, "damaged.*larger than the file" if how == "compressed" else "damaged")


def test_auto_names_a_damaged_checkpoint_and_uses_the_one_before(train, capsys):
    folder = train("--epochs", 2, "--save_path", "out", "--resume", "auto")
    intact = torch.load(folder / NAME, weights_only=True)
    (folder / NAME).write_bytes((folder / NAME).read_bytes()[:9999])
    capsys.readouterr()
    assert train("--epochs", 2, "--save_path", "out", "--resume", "auto") == folder
    printed = capsys.readouterr().out
    assert f"note: '{folder / NAME}' is damaged" in printed and "[Epoch=001/002]" in printed
    again = torch.load(folder / NAME, weights_only=True)
    assert all(torch.equal(again["state_dict"][name], value) for name, value in intact["state_dict"].items())
    # The damaged file did not take the place of the good one that was used.
    assert torch.load(folder / "previous.resnet8.pth.tar", weights_only=True)["epoch"] == 1


def test_auto_with_nothing_but_damage_is_refused(train):
    folder = train("--epochs", 1, "--save_path", "out")
    for file in folder.glob("*.pth.tar"):
        file.write_bytes(b"PK\x03\x04")
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match="'out' has no checkpoint that can be read"):
        train("--epochs", 2, "--save_path", "out", "--resume", "auto")
    assert sorted(folder.iterdir()) == before


def png(width, height):
    """The beginning of a PNG file that declares this size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("size", [(100_000, 100_000), (11_000, 11_000), (1, 3_000_000)], ids=str)
def test_an_image_that_declares_a_gigantic_size_is_refused(tmp_path, size):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "0.png").write_bytes(png(*size))
    with pytest.raises(UserError, match=r"0\.png.*pixels"):
        load("folder", tmp_path)
