"""The cache of images read once: it is used only while it fits its source, and no fault of it harms a run."""

import errno
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import cache, sources
from utils.base.errors import UserError

NAME = ".ahsg_cache_tree_32x32.npz"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The user's cache folder, in a place of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "ahsg-ht"


@pytest.fixture
def tree(tmp_path, home) -> Path:
    """Two classes, three training images and one test image each, every image of one colour."""
    root = tmp_path / "images"
    for split, count in (("train", 3), ("test", 1)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(count):
                paint(root / split / name / f"{i}.png", 10 + 100 * c + i)
    return root


def paint(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (level, 0, 0)).save(path)


def levels(root: Path) -> list[int]:
    """The red of every training image, as a run would read it."""
    return data.load("folder", root).train.images[:, 0, 0, 0].tolist()


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the images that were decoded."""
    names, read = [], sources._read_image
    monkeypatch.setattr(sources, "_read_image", lambda file: (names.append(Path(file).name), read(file))[1])
    return names


def test_the_second_read_decodes_nothing_and_gives_the_same(tree, decoded):
    first = data.load("folder", tree)
    assert len(decoded) == 8 and (tree / NAME).is_file()
    second = data.load("folder", tree)
    assert len(decoded) == 8
    for a, b in ((first.train, second.train), (first.test, second.test)):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std)
    assert first.classes == second.classes == ["cat", "dog"] and first.source == second.source


def test_the_first_read_says_where_the_cache_is_and_the_second_is_silent(tree, capsys):
    levels(tree)
    assert capsys.readouterr().out == f"8 images were read and are kept in {tree / NAME}\n"
    levels(tree)
    assert capsys.readouterr().out == ""


def change_pixels(tree):
    paint(tree / "train" / "cat" / "1.png", 99)
    return [10, 99, 12, 110, 111, 112]


def change_time_only(tree):
    """Same name, same size, other pixels: only the modification time tells."""
    path = tree / "train" / "cat" / "0.png"
    before = path.stat()
    path.write_bytes((tree / "train" / "dog" / "2.png").read_bytes())
    os.truncate(path, before.st_size) if path.stat().st_size > before.st_size else None
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    return None


def delete(tree):
    (tree / "train" / "dog" / "0.png").unlink()
    return [10, 11, 12, 111, 112]


def add(tree):
    paint(tree / "train" / "dog" / "9.png", 200)
    return [10, 11, 12, 110, 111, 112, 200]


def rename(tree):
    (tree / "train" / "cat" / "0.png").rename(tree / "train" / "cat" / "z.png")
    return [11, 12, 10, 110, 111, 112]


def change_the_test_images(tree):
    paint(tree / "test" / "cat" / "0.png", 7)
    return [10, 11, 12, 110, 111, 112]


@pytest.mark.parametrize("change", [change_pixels, change_time_only, delete, add, rename, change_the_test_images])
def test_a_source_that_changed_is_read_again_and_cached_again(tree, decoded, change):
    levels(tree)
    expected = change(tree)
    decoded.clear()
    found = levels(tree)
    assert decoded and (expected is None or found == expected)
    decoded.clear()
    assert levels(tree) == found and not decoded


def test_the_class_name_is_part_of_the_match(tree, decoded):
    levels(tree)
    for split in ("train", "test"):
        (tree / split / "dog").rename(tree / split / "ant")
    assert levels(tree) == [110, 111, 112, 10, 11, 12]


def test_a_deleted_cache_is_made_again(tree, decoded):
    levels(tree)
    (tree / NAME).unlink()
    levels(tree)
    assert len(decoded) == 16 and (tree / NAME).is_file()


def rewrite(tree, **changes):
    with np.load(tree / NAME) as stored:
        content = {**stored, **changes}
    np.savez(tree / NAME, **content)


def flip_a_pixel(tree):
    content = bytearray((tree / NAME).read_bytes())
    content[len(content) // 2] ^= 1
    (tree / NAME).write_bytes(content)


def leave_out_an_array(tree):
    with np.load(tree / NAME) as stored:
        content = {name: stored[name] for name in stored if name != "test_labels"}
    np.savez(tree / NAME, **content)


def say_it_is_encrypted(tree):
    content = bytearray((tree / NAME).read_bytes())
    # The first bit of the flags of the last entry in the archive's directory.
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    (tree / NAME).write_bytes(content)


class Bomb:
    """Pickled, it makes a reader run code."""

    def __reduce__(self):
        return os.mkdir, (os.environ["XDG_CACHE_HOME"] + "_exploded",)


DAMAGES = {
    "empty": lambda tree: (tree / NAME).write_bytes(b""),
    "noise": lambda tree: (tree / NAME).write_bytes(os.urandom(5000)),
    "cut": lambda tree: os.truncate(tree / NAME, (tree / NAME).stat().st_size // 2),
    "one bit": flip_a_pixel,
    "one bit says that it is encrypted": say_it_is_encrypted,
    "an array is missing": leave_out_an_array,
    "a plain array": lambda tree: np.save((tree / NAME).open("wb"), np.zeros(3)),
    "pickled objects": lambda tree: rewrite(tree, classes=np.array([Bomb()], dtype=object)),
    "another shape": lambda tree: rewrite(tree, train_images=np.zeros((6, 3, 8, 8), np.uint8)),
    "another type": lambda tree: rewrite(tree, train_images=np.zeros((6, 3, 32, 32), np.float32)),
    "fewer labels": lambda tree: rewrite(tree, train_labels=np.zeros(5, np.int64)),
    "label out of range": lambda tree: rewrite(tree, test_labels=np.array([0, 2])),
    "negative label": lambda tree: rewrite(tree, test_labels=np.array([0, -1])),
    "a folder": lambda tree: ((tree / NAME).unlink(), (tree / NAME).mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_not_used(tree, decoded, damage, home):
    levels(tree)
    DAMAGES[damage](tree)
    decoded.clear()
    assert levels(tree) == [10, 11, 12, 110, 111, 112]
    assert len(decoded) == 8 and not Path(f"{home.parent}_exploded").exists()
    decoded.clear()
    assert levels(tree) == [10, 11, 12, 110, 111, 112] and not decoded


def refuse_writing_in(folder, monkeypatch, number=errno.EROFS, keep=0):
    """Opening a file for writing in `folder` fails, or with `keep` its disk is full after so many bytes. Root may write everywhere."""
    real = open

    def guarded(file, mode="r", *rest, **options):
        if Path(file).parent == folder and set(mode) & set("wxa"):
            if not keep:
                raise OSError(number, os.strerror(number), str(file))
            opened = real(file, mode, *rest, **options)
            opened.write(b"x" * keep)
            opened.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return real(file, mode, *rest, **options)

    monkeypatch.setattr(cache, "open", guarded, raising=False)


def test_a_read_only_data_folder_is_cached_in_the_users_folder(tree, decoded, monkeypatch, capsys, home):
    refuse_writing_in(tree, monkeypatch)
    assert levels(tree) == levels(tree) == [10, 11, 12, 110, 111, 112]
    assert len(decoded) == 8 and not list(tree.glob(".*"))
    assert capsys.readouterr().out.count(str(home)) == 1


def test_two_data_folders_do_not_share_the_users_cache(tree, tmp_path, monkeypatch):
    other = tmp_path / "other"
    for split in ("train", "test"):
        paint(other / split / "bee" / "0.png", 55)
    refuse_writing_in(tree, monkeypatch)
    levels(tree)
    refuse_writing_in(other, monkeypatch)
    assert levels(other) == [55] and levels(tree) == [10, 11, 12, 110, 111, 112]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(tree, decoded, home):
    tree.chmod(0o555)
    try:
        assert levels(tree) == levels(tree) and len(decoded) == 8 and list(home.iterdir())
    finally:
        tree.chmod(0o755)


def test_where_nothing_can_be_written_each_run_reads_and_says_so_in_one_line(tree, monkeypatch, capsys, decoded):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree / "train" / "cat" / "0.png"))
    refuse_writing_in(tree, monkeypatch)
    assert levels(tree) == levels(tree) == [10, 11, 12, 110, 111, 112]
    assert len(decoded) == 16
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all(line.startswith("note: the images could not be cached") for line in said)


def test_a_full_disk_leaves_nothing_behind(tree, monkeypatch, home):
    refuse_writing_in(tree, monkeypatch, keep=100)
    assert levels(tree) == [10, 11, 12, 110, 111, 112]
    assert sorted(p.name for p in tree.iterdir()) == ["test", "train"]


def test_an_interrupted_write_leaves_nothing_behind(tree, monkeypatch):
    def interrupt(file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupt)
    with pytest.raises(KeyboardInterrupt):
        levels(tree)
    assert sorted(p.name for p in tree.iterdir()) == ["test", "train"]


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tree):
    old, new = (tree / f"{NAME}.{pid}_0.tmp" for pid in (1, 2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    levels(tree)
    assert not old.exists() and new.exists()


def test_a_change_during_the_read_is_noticed_next_time(tree, monkeypatch, decoded):
    read = sources._decode_tree

    def slow(*arguments):
        arrays = read(*arguments)
        change_pixels(tree)
        return arrays

    monkeypatch.setattr(sources, "_decode_tree", slow)
    assert levels(tree)[1] == 11
    monkeypatch.setattr(sources, "_decode_tree", read)
    assert levels(tree)[1] == 99


def read_at_once(barrier, tree, results):
    barrier.wait()
    results.put(levels(tree))


def test_processes_that_start_at_once(tree):
    """Four processes begin with no cache; each gets the images, one whole cache is left and no temporary file."""
    forks = multiprocessing.get_context("fork")
    barrier, results = forks.Barrier(4), forks.Queue()
    runs = [forks.Process(target=read_at_once, args=(barrier, tree, results)) for _ in range(4)]
    for run in runs:
        run.start()
    assert [results.get(timeout=60) for _ in runs] == [[10, 11, 12, 110, 111, 112]] * 4
    for run in runs:
        run.join()
    assert sorted(p.name for p in tree.iterdir()) == [NAME, "test", "train"]
    assert cache.load(tree / NAME, "another fingerprint", 32) is None
    with np.load(tree / NAME) as stored:
        assert cache.load(tree / NAME, str(stored["fingerprint"]), 32) is not None


def test_the_cache_does_not_hide_mistakes_in_the_tree(tree):
    levels(tree)
    (tree / "test" / "bird").mkdir()
    with pytest.raises(UserError, match="has no images"):
        levels(tree)
    with pytest.raises(UserError, match="2 class folders, cifar10 has 10"):
        (tree / "test" / "bird").rmdir()
        data.load("cifar10", tree)


def test_an_image_that_is_a_broken_link_is_named(tree):
    (tree / "train" / "cat" / "5.png").symlink_to(tree / "nowhere.png")
    with pytest.raises(UserError, match=r"cannot read the image .*5\.png"):
        levels(tree)
