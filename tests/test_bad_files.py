"""Checkpoints and images of others: damaged, too large in what they declare, or made to run code. None is followed."""

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


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.pth.tar"
    net = CifarResNet(8, 10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    checkpoints.write({"state_dict": net.state_dict(), "optimizer": optimizer.state_dict(), "arch": "resnet8"}, path)
    return path


def refused(path, pattern=""):
    with pytest.raises(UserError, match=pattern) as caught:
        checkpoints.read(path)
    assert "\n" not in str(caught.value)


def test_truncated_at_fifty_lengths(good, tmp_path):
    whole, path = good.read_bytes(), tmp_path / "cut.pth.tar"
    draw = random.Random(1)
    for length in sorted(draw.sample(range(len(whole)), 50)):
        path.write_bytes(whole[:length])
        refused(path, "damaged")


def test_flipped_bytes_are_noticed_or_harmless(good, tmp_path):
    """Padding and dates of the archive are the only places where a byte may be anything."""
    whole, path = good.read_bytes(), tmp_path / "flipped.pth.tar"
    expected = checkpoints.read(good)["state_dict"]
    draw, noticed = random.Random(2), 0
    for _ in range(50):
        position = draw.randrange(len(whole))
        content = bytearray(whole)
        content[position] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            weights = checkpoints.read(path)["state_dict"]
        except UserError as error:
            noticed += 1
            assert "\n" not in str(error)
        else:
            assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert noticed > 35


def test_one_bit_of_a_weight_is_noticed(good, tmp_path):
    with zipfile.ZipFile(good) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
        content = bytearray(good.read_bytes())
        begin = content.find(archive.read(entry))
    content[begin + entry.file_size // 2] ^= 1
    path = tmp_path / "bit.pth.tar"
    path.write_bytes(content)
    refused(path, "checksum")


class Payload:
    def __init__(self, trap):
        self.trap = str(trap)

    def __reduce__(self):
        return open, (self.trap, "w")


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle", "beside the weights"])
def test_a_payload_never_runs(tmp_path, how):
    trap, path = tmp_path / "trap", tmp_path / "evil.pth.tar"
    content = {"state_dict": {"w": Payload(trap)}}
    if how == "beside the weights":
        content = {"state_dict": {"w": torch.ones(3)}, "settings": {"x": Payload(trap)}, "format": checkpoints.FORMAT}
    if how == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    refused(path, "could run code|no PyTorch")
    assert not trap.exists()


def rewritten(source, path, change, compression=zipfile.ZIP_STORED):
    """A copy of a zip checkpoint whose data.pkl went through `change`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, change(content) if entry.filename.endswith("data.pkl") else content)
    return path


def test_an_archive_that_unpacks_to_more_is_refused(good, tmp_path):
    path = tmp_path / "bomb.pth.tar"
    refused(rewritten(good, path, lambda content: content, zipfile.ZIP_DEFLATED), "compressed")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tensor_larger_than_its_file_is_refused(tmp_path, legacy):
    path, huge = tmp_path / "huge.pth.tar", 2**30
    saved = io.BytesIO()
    torch.save({"state_dict": {"w": torch.zeros(12345)}}, saved, _use_new_zipfile_serialization=not legacy)
    # The pickle says 12345 twice: entries of the storage, and of the tensor.
    small, large = struct.pack("<BH", ord("M"), 12345), struct.pack("<Bi", ord("J"), huge)
    if legacy:
        path.write_bytes(saved.getvalue().replace(small, large))
    else:
        source = tmp_path / "small.pth.tar"
        source.write_bytes(saved.getvalue())
        rewritten(source, path, lambda content: content.replace(small, large))
    refused(path, "more than the file holds")


@pytest.mark.parametrize(
    "value", [torch.ones(1).expand(10**9), torch.ones(0).expand(10**9, 0)], ids=["stride 0", "empty"]
)
def test_a_shape_without_content_is_refused(tmp_path, value):
    path = tmp_path / "wide.pth.tar"
    torch.save({"state_dict": {"classifier.weight": value}}, path)
    refused(path, "tensor")


@pytest.mark.parametrize(
    "entries",
    [
        dict(num_classes=10**9),
        dict(input_shape=[3, 10**6, 10**6]),
        dict(pads={"stage_2.0.shortcut": 10**9}),
        dict(loader={"seed": 1, "epoch": 0, "position": "x"}),
        dict(history=[{"epoch": 1}]),
        dict(settings={"epochs": {"a": 1}}),
        dict(settings={"epochs": 3}),
    ],
    ids=str,
)
def test_our_mark_on_entries_that_are_not_ours(tmp_path, entries):
    path = tmp_path / "marked.pth.tar"
    checkpoints.write({"state_dict": CifarResNet(8, 10).state_dict(), "arch": "resnet8", **entries}, path)
    refused(path, "entry")


@pytest.mark.parametrize("change", [dict(momentum="much"), dict(HTrate=7.0), dict(schedule=3), dict(v=[1.0])], ids=str)
def test_settings_that_no_command_line_could_give(train, tmp_path, change):
    saved = torch.load(train("--epochs", 1) / NAME, weights_only=True)
    saved["settings"].update(change)
    path = tmp_path / "odd.pth.tar"
    torch.save(saved, path)
    with pytest.raises(UserError, match=r"no such setting|entry 'settings'"):
        train("--resume", path, "--epochs", 2)


def test_auto_names_a_damaged_checkpoint_and_uses_the_one_before(train, capsys):
    folder = train("--epochs", 2, "--save_path", "out", "--resume", "auto")
    whole = torch.load(folder / NAME, weights_only=True)
    (folder / NAME).write_bytes((folder / NAME).read_bytes()[:9999])
    capsys.readouterr()
    assert train("--epochs", 2, "--save_path", "out", "--resume", "auto") == folder
    printed = capsys.readouterr().out
    assert f"note: '{folder / NAME}' is damaged" in printed and "[Epoch=001/002]" in printed
    again = torch.load(folder / NAME, weights_only=True)
    assert all(torch.equal(again["state_dict"][name], value) for name, value in whole["state_dict"].items())
    # The damaged file did not take the place of the good one that was used.
    assert torch.load(folder / "previous.resnet8.pth.tar", weights_only=True)["epoch"] == 1


def test_auto_with_nothing_but_damage_is_refused(train):
    folder = train("--epochs", 1, "--save_path", "out")
    for file in folder.glob("*.pth.tar"):
        file.write_bytes(b"PK\x03\x04")
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match="none in 'out' can be read"):
        train("--epochs", 2, "--save_path", "out", "--resume", "auto")
    assert sorted(folder.iterdir()) == before


def png(width, height):
    """The beginning of a PNG file that declares this size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("size", [(100_000, 100_000), (11_000, 11_000), (1, 3_000_000)], ids=str)
def test_an_image_that_declares_a_gigantic_size_is_refused(tmp_path, size):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "0.png").write_bytes(png(*size))
    with pytest.raises(UserError, match=r"0\.png.*pixels"):
        load("folder", tmp_path)
