"""The cache of decoded image trees: it is used only while it fits its source, and no fault of it harms a run."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
from data import image_trees

NAME = ".ahsg_cache_32.pt"
LEVELS = [10, 11, 12, 110, 111, 112]


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two classes, three training images and one test image each, every image of one colour."""
    for split, count in (("train", 3), ("test", 1)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(count):
                paint(tmp_path / split / name / f"{i}.png", 10 + 100 * c + i)
    return tmp_path


def paint(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (level, 0, 0)).save(path)


@pytest.fixture
def levels(tree, monkeypatch):
    """levels() reads as a run would: (the red of every training image, how many images were decoded for it)."""
    decoded, read = [], image_trees.read_square
    monkeypatch.setattr(image_trees, "read_square", lambda file, size: (decoded.append(file), read(file, size))[1])

    def run(**options):
        decoded.clear()
        loaded = data.load("folder", tree, **options)
        assert loaded.test.labels.tolist() == [0, 1]
        return loaded.train.images[:, 0, 0, 0].tolist(), len(decoded)

    return run


def test_the_second_read_decodes_nothing_and_gives_the_same(tree, levels, capsys):
    assert levels() == (LEVELS, 8) and levels() == (LEVELS, 0)
    assert capsys.readouterr().out == f"the images are kept in {tree / NAME}\n"
    assert levels(size=48) == (LEVELS, 8) and levels() == (LEVELS, 0)


def touch(tree):
    """Same name, same size, other modification time."""
    path = tree / "train" / "cat" / "0.png"
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))


CHANGES = {
    "pixels": (lambda tree: paint(tree / "train/cat/1.png", 99), [10, 99, 12, 110, 111, 112]),
    "time": (touch, LEVELS),
    "deleted": (lambda tree: (tree / "train/dog/0.png").unlink(), [10, 11, 12, 111, 112]),
    "renamed": (lambda tree: (tree / "train/cat/0.png").rename(tree / "train/cat/z.png"), [11, 12, 10, 110, 111, 112]),
    "test image": (lambda tree: paint(tree / "test/cat/0.png", 7), LEVELS),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changed_is_decoded_again_and_cached_again(tree, levels, change):
    levels()
    CHANGES[change][0](tree)
    images = 7 if change == "deleted" else 8
    assert levels() == (CHANGES[change][1], images) and levels() == (CHANGES[change][1], 0)


def flip_a_pixel(path):
    content = bytearray(path.read_bytes())
    content[content.index(bytes([10] * 1024)) + 500] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a bit of a pixel": flip_a_pixel,
    "other content": lambda path: torch.save({"state_dict": {"w": torch.ones(1)}}, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_not_used(tree, levels, damage):
    levels()
    DAMAGES[damage](tree / NAME)
    assert levels() == (LEVELS, 8)


def test_where_nothing_can_be_written_each_run_decodes_and_says_so_in_one_line(tree, levels, monkeypatch, capsys):
    """A disk that is full after the first bytes; root may write everywhere."""

    def full(temporary, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert levels() == (LEVELS, 8) and sorted(p.name for p in tree.iterdir()) == ["test", "train"]
    printed = capsys.readouterr().out
    assert f"note: cannot write '{tree / NAME}' (No space left on device)" in printed and printed.count("\n") == 1
