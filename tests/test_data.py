"""Augmentation and normalisation against torchvision; image sets read from folders, CIFAR's files and code."""

import pickle
import re
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import chisquare
from torch import nn

import data
from data import DataLoader, ImageArrays, Spec, image_trees, sources, synthetic
from data.image_files import read_rgb
from data.images import crop_and_flip, draw_crops_and_flips, normalise
from utils.base import files
from utils.base.errors import UserError
from utils.base.torchvision_import import import_torchvision

MEAN, STD = [125.3 / 255, 123.0 / 255, 113.9 / 255], [63.0 / 255, 62.1 / 255, 66.7 / 255]


def pixels(n, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def image_set(n=60, size=32, augment=True, seed=0):
    return ImageArrays(pixels(n, size, size), torch.arange(n), MEAN, STD, augment=augment, seed=seed)


def pil(image):
    """A PIL image of uint8 (3, H, W)."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def naive_crop_and_flip(image, top, left, flip, pad=4):
    """What torchvision's RandomCrop(padding=pad) and RandomHorizontalFlip do with these numbers."""
    transforms = import_torchvision().transforms.functional
    cropped = transforms.crop(transforms.pad(pil(image), pad), top, left, *image.shape[1:])
    return transforms.hflip(cropped) if flip else cropped


def naive_normalise(image):
    """By torchvision's ToTensor and Normalize."""
    transforms = import_torchvision().transforms
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])(image)


def make_tree(base, classes=("a", "b"), splits=("train", "test"), per_class=2, size=32):
    """An image tree of random PNGs; returns {split: uint8 images in class order}."""
    images = {}
    for seed, split in enumerate(splits):
        images[split] = pixels(len(classes) * per_class, size, size, seed)
        for i, image in enumerate(images[split]):
            folder = base / split / classes[i // per_class]
            folder.mkdir(parents=True, exist_ok=True)
            pil(image).save(folder / f"{i:03}.png")
    return images


def read_one(tmp_path, image, name="x.png", **options):
    """The first training image of a tree, after `image` was saved there."""
    make_tree(tmp_path, per_class=1)
    (tmp_path / "train" / "a" / "000.png").unlink()
    image.save(tmp_path / "train" / "a" / name)
    return data.load("folder", tmp_path, **options).train.images[0]


def refused(match, name, path, **options):
    with pytest.raises(UserError, match=match) as error:
        data.load(name, path, **options)
    assert "\n" not in str(error.value)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)


# Augmentation


def test_crops_and_flips_are_torchvisions():
    """Every offset with and without flip, on images that differ."""
    numbers = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    images = pixels(len(numbers))
    naive = [np.array(naive_crop_and_flip(i, *n)) for i, n in zip(images, numbers.tolist(), strict=True)]
    assert torch.equal(crop_and_flip(images, numbers), torch.from_numpy(np.stack(naive)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalisation_is_torchvisions_to_the_bit_and_leaves_its_input_alone(layout):
    """All 256 levels in every channel, in a mini-batch of either layout."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, -1, -1)
    images = levels.contiguous(memory_format=layout)
    ours = normalise(images, torch.tensor(MEAN), torch.tensor(STD))
    assert torch.equal(ours[1], naive_normalise(pil(levels[0]))) and torch.equal(images, levels)
    assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="uint8"):
        normalise(ours, torch.tensor(MEAN), torch.tensor(STD))


@pytest.mark.parametrize(("size", "pad"), [(32, 4), (48, 6), (64, 8)])
def test_augmented_batch_is_torchvisions_to_the_bit(size, pad):
    images = image_set(size=size, seed=3)
    images.set_epoch(2)
    indices = [5, 59, 0, 17, 5]
    batch, labels = images.__getitems__(indices)
    numbers = draw_crops_and_flips(60, seed=3, epoch=2, pad=pad)[indices].tolist()
    chosen = zip(images.images[indices], numbers, strict=True)
    naive = torch.stack([naive_normalise(naive_crop_and_flip(i, *n, pad=pad)) for i, n in chosen])
    assert batch.dtype == torch.uint8 and torch.equal(images.normalise(batch), naive) and labels.tolist() == indices
    assert torch.equal(images.images, pixels(60, size, size)) and torch.equal(images[59][0], batch[1])
    images.augment = False
    naive = torch.stack([naive_normalise(pil(image)) for image in images.images[:4]])
    assert torch.equal(data.first_images(images, 4), naive)


def test_offsets_and_flips_are_uniform_and_independent():
    """Chi-square over the 9 x 9 x 2 combinations of 160,000 draws, and over the tops of two epochs."""
    top, left, flip = draw_crops_and_flips(160_000, seed=0, epoch=0).unbind(1)
    counts = torch.bincount((top * 9 + left) * 2 + flip, minlength=162)
    other = draw_crops_and_flips(160_000, seed=0, epoch=1)[:, 0]
    tops = torch.bincount(top * 9 + other, minlength=81)
    assert min(chisquare(counts.numpy()).pvalue, chisquare(tops.numpy()).pvalue) > 0.001
    drawn = {tuple(draw_crops_and_flips(50, s, e).flatten().tolist()) for s in range(5) for e in range(5)}
    assert len(drawn) == 25


def by_index(*loaders):
    """{sample: augmented image} of one epoch."""
    return {int(y): x for loader in loaders for batch in loader for x, y in zip(*batch, strict=True)}


def test_augmentation_depends_on_neither_workers_nor_ranks_nor_order():
    """Two epochs; persistent workers see the epoch change."""
    plain = DataLoader(image_set(), 13)
    workers = DataLoader(image_set(), 8, 0.1, True, seed=1, num_workers=2, persistent_workers=True)
    ranks = [DataLoader(image_set(), 8, num_replicas=2, rank=r) for r in range(2)]
    epochs = []
    for _ in range(2):
        epochs.append(by_index(plain))
        for other in (by_index(workers), by_index(*ranks)):
            assert all(torch.equal(epochs[-1][i], other[i]) for i in range(60))
    assert sum(torch.equal(epochs[0][i], epochs[1][i]) for i in range(60)) < 6


# Synthetic images


def test_synthetic_images_are_deterministic_balanced_distinct_and_learnable(monkeypatch):
    """One epoch of a linear classifier on 8x8 averages of augmented images; chance is 10 %."""
    monkeypatch.setattr(synthetic, "COUNTS", {"train": 2000, "test": 500})
    loaded = data.load("synthetic", "nowhere")
    train, test = loaded.train, loaded.test
    assert len(torch.unique(torch.cat([train.images, test.images]).flatten(1), dim=0)) == 2500
    assert torch.bincount(test.labels).tolist() == [50] * 10 and loaded.source.startswith("synthetic images")
    torch.manual_seed(0)
    assert torch.equal(synthetic.make_images(2000, seed=1)[0], train.images)
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for images, labels in DataLoader(train, 16, shuffle=True, seed=0):
        optimizer.zero_grad()
        F.cross_entropy(net(train.normalise(images)), labels).backward()
        optimizer.step()
    assert (net(test.normalise(test.images)).argmax(1) == test.labels).float().mean() > 0.3


# Records and image trees


def test_a_tree_of_images_of_another_size_is_one_record(tmp_path, monkeypatch):
    """Images made by code: test_extending."""
    spec = Spec("tiny64", size=64, classes=20, mean=(120, 110, 100), std=(60, 60, 60))
    monkeypatch.setitem(sources.DATASETS, "tiny64", spec)
    images = make_tree(tmp_path / "tiny64", [f"{i:02}" for i in range(20)], per_class=1, size=64)
    loaded = data.load("tiny64", tmp_path)
    assert torch.equal(loaded.train.images, images["train"]) and len(loaded.classes) == 20
    assert loaded.train.mean.tolist() == pytest.approx([120 / 255, 110 / 255, 100 / 255])


def test_tree_is_read_in_class_order(tmp_path):
    """Pixels and labels exactly; classes sorted by name; training augmented; other and hidden files left out."""
    classes = sorted(["zebra", "Bee", "ant", "10", "9"])
    images = make_tree(tmp_path, classes[::-1], per_class=1)
    for name in ("ant/Thumbs.db", "ant/._000.png", "readme.txt"):
        (tmp_path / "train" / name).write_text("x")
    (tmp_path / "train" / ".cache").mkdir()
    loaded = data.load("folder", tmp_path, seed=5)
    assert loaded.classes == classes
    for split, arrays in (("train", loaded.train), ("test", loaded.test)):
        assert torch.equal(arrays.images, images[split].flip(0)) and arrays.labels.tolist() == [0, 1, 2, 3, 4]
        assert arrays.augment is (split == "train") and arrays.seed == 5


@pytest.mark.parametrize("inside", ["", "cifar10"])
@pytest.mark.parametrize("test", ["test", "val"])
def test_tree_is_found_and_normalised(tmp_path, inside, test):
    """By CIFAR-10's statistics, or by those of one's own training images."""
    images = make_tree(tmp_path / inside, "abcdefghij", ("train", test), per_class=1)
    loaded, own = data.load("cifar10", tmp_path), data.load("folder", tmp_path / inside)
    assert torch.equal(loaded.test.images, images[test])
    assert torch.equal(loaded.train.mean, torch.tensor(MEAN)) and torch.equal(loaded.test.std, torch.tensor(STD))
    shares = images["train"].double() / 255
    for arrays in (own.train, own.test):
        torch.testing.assert_close(arrays.mean, shares.mean((0, 2, 3)).float())
        torch.testing.assert_close(arrays.std, shares.std((0, 2, 3), correction=0).float())
    loaded.normalise_as(**own.normalisation)
    assert torch.equal(loaded.train.std, own.train.std) and torch.equal(loaded.test.mean, own.test.mean)


def test_grey_images_of_16_bits_keep_their_high_bytes(tmp_path):
    """And ordinary grey is what it was."""
    grey = pixels(1)[0, 0]
    for path, image in (("8", grey.numpy()), ("16", grey.numpy().astype(np.uint16) * 256 + 7)):
        assert torch.equal(read_one(tmp_path / path, Image.fromarray(image)), grey.expand(3, -1, -1))
    # These Pillow reads as 32-bit grey.
    wide = Image.fromarray(grey.numpy().astype(np.int32))
    assert torch.equal(read_one(tmp_path / "32", wide, "x.tif"), grey.expand(3, -1, -1))
    pgm = b"P5 32 32 65535\n" + (grey.numpy().astype(np.uint16) * 256 + 7).astype(">u2").tobytes()
    (tmp_path / "x.pgm").write_bytes(pgm)
    assert np.array_equal(np.array(read_rgb(str(tmp_path / "x.pgm")))[..., 0], grey.numpy())


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 200), (8, 8), (5, 40), (33, 32)])
def test_image_of_another_size_is_scaled_on_its_shorter_side_and_cut(tmp_path, height, width, size):
    image = pil(pixels(1, height, width)[0])
    scale = size / min(height, width)
    # torchvision truncates the longer side to a whole number.
    scaled = image.resize((int(width * scale + 1e-9), int(height * scale + 1e-9)), Image.Resampling.BILINEAR)
    left, top = round((scaled.width - size) / 2), round((scaled.height - size) / 2)
    expected = torch.from_numpy(np.array(scaled.crop((left, top, left + size, top + size)))).permute(2, 0, 1)
    assert torch.equal(read_one(tmp_path, image, size=size), expected)


# What cannot be read: one line that names the culprit


@pytest.mark.parametrize(
    ("name", "size", "match"),
    [
        ("folder", 31, r"--image_size must be in 32\.\.1024, got 31"),
        ("cifar10", 64, "64: the images of cifar10 are 32x32"),
        ("cifar10", None, r"2 class folders, cifar10 has 10.*--dataset folder"),
        ("cifar11", None, "cifar11.*cifar10, cifar100, folder, synthetic"),
    ],
)
def test_name_and_size_that_do_not_fit(tmp_path, name, size, match):
    make_tree(tmp_path)
    refused(match, name, tmp_path, size=size)


def test_more_than_fits_into_memory_names_the_imagenet_script(tmp_path, monkeypatch):
    make_tree(tmp_path)
    monkeypatch.setattr(image_trees, "MEMORY_LIMIT", 8 * 3 * 64 * 64)
    data.load("folder", tmp_path, size=64)
    refused(r"8 images .* at 65x65.*imagenet_resnet_test\.py", "folder", tmp_path, size=65)


def test_class_folders_that_differ_or_are_empty_or_absent_are_named(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "test" / "surplus").mkdir()
    refused(r"surplus: no images .*test/<class>/<image>", "folder", tmp_path)
    pil(pixels(1)[0]).save(tmp_path / "test" / "surplus" / "x.png")
    refused("only one has: surplus", "folder", tmp_path)
    for split in ("train", "test"):
        (tmp_path / "none" / split).mkdir(parents=True)
    refused(r"find any class folder.*train/<class>/<image>", "folder", tmp_path / "none")


def huge_png():
    """The beginning of a PNG file that declares 11,000 x 11,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 11_000, 11_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "huge", "broken link"])
def test_corrupt_image_is_named(tmp_path, damage):
    make_tree(tmp_path)
    file = tmp_path / "test" / "b" / "003.png"
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 255
    damages = {"empty": b"", "text": b"no image", "cut": content[:middle], "huge": huge_png()}
    file.write_bytes(damages.get(damage, content))
    if damage == "broken link":
        file.unlink()
        file.symlink_to(tmp_path / "nowhere")
    refused(r"test/b/003\.png' \(.*repair or remove it", "folder", tmp_path)


# CIFAR in torchvision's files


BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
# {data set: (folder, training and test files, key of the labels, key of the class names, number of classes)}.
FILES = {
    "cifar10": ("cifar-10-batches-py", [*BATCHES, "test_batch"], "labels", "label_names", 10),
    "cifar100": ("cifar-100-python", ["train", "test"], "fine_labels", "fine_label_names", 100),
}


def write_files(name, tmp_path, monkeypatch):
    """torchvision's files with 20 training and 4 test images, checksums not compared: (folder, pixels, labels)."""
    inside, files, key, meta, classes = FILES[name]
    folder, images, labels = tmp_path / inside, pixels(24), torch.arange(24) % 10
    folder.mkdir()
    sizes = [20 // len(files[:-1])] * len(files[:-1]) + [4]
    for file, own, of_own in zip(files, images.split(sizes), labels.split(sizes), strict=True):
        content = {"data": own.reshape(len(own), -1).numpy(), key: of_own.tolist()}
        (folder / file).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({meta: [f"word{classes - i}" for i in range(classes)]}))
    dataset = getattr(import_torchvision().datasets, name.upper())
    monkeypatch.setattr(dataset, "train_list", [[file, None] for file in files[:-1]])
    monkeypatch.setattr(dataset, "test_list", [[files[-1], None]])
    monkeypatch.setattr(dataset, "meta", {"filename": "meta", "key": meta, "md5": None})
    return folder, images, labels


@pytest.fixture
def cifar10_files(tmp_path, monkeypatch):
    return write_files("cifar10", tmp_path, monkeypatch)


# Those that everybody normalises by.
STATISTICS = {
    "cifar10": ([0.4914, 0.4824, 0.4467], [0.2471, 0.2435, 0.2616]),
    "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
}


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("above", [True, False])
def test_torchvisions_files_are_read(name, above, tmp_path, monkeypatch):
    """From the folder that holds them and from the one above; pixels, labels and class names exactly."""
    folder, images, labels = write_files(name, tmp_path, monkeypatch)
    loaded = data.load(name, folder.parent if above else folder, download=False)
    assert torch.equal(torch.cat([loaded.train.images, loaded.test.images]), images)
    assert torch.equal(torch.cat([loaded.train.labels, loaded.test.labels]), labels)
    assert loaded.classes == [f"word{FILES[name][-1] - i}" for i in range(FILES[name][-1])]
    mean, std = STATISTICS[name]
    assert loaded.train.mean.tolist() == pytest.approx(mean, abs=1e-3)
    assert loaded.test.std.tolist() == pytest.approx(std, abs=1e-3)
    (folder / FILES[name][1][0]).unlink()
    refused(f"{folder.name}' are incomplete", name, folder.parent)


# Downloads, and what never happens instead


def test_download_goes_to_the_data_path(cifar10_files, tmp_path, monkeypatch):
    folder, images, _ = cifar10_files
    cifar10 = import_torchvision().datasets.CIFAR10
    monkeypatch.setattr(cifar10, "download", lambda self: folder.rename(Path(self.root) / folder.name))
    assert torch.equal(data.load("cifar10", tmp_path / "new").train.images, images[:20])
    assert (tmp_path / "new" / folder.name).is_dir()


def test_a_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    """It accepts the connection on this machine and sends nothing."""
    monkeypatch.setattr(files, "PROBE_SECONDS", 0.3)
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cifar.tar.gz"
        monkeypatch.setattr(import_torchvision().datasets.CIFAR10, "url", url)
        refused("download of cifar10 into.*timed out", "cifar10", tmp_path)
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "folder"])
@pytest.mark.parametrize("fault", ["absent", "below a file", "empty", "half a tree", "damaged files"])
def test_synthetic_images_never_replace_others(tmp_path, no_network, monkeypatch, name, fault):
    """Refused in one line with the data path; without download the network is not used."""
    monkeypatch.setattr(synthetic, "make_images", lambda n, seed: pytest.fail("synthetic images were made"))
    if fault == "half a tree":
        make_tree(tmp_path, splits=["train"])
    elif fault == "damaged files":
        for folder in ("cifar-10-batches-py", "cifar-100-python"):
            (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("x")
    path = {"absent": tmp_path / "absent", "below a file": tmp_path / "file" / "deeper"}.get(fault, tmp_path)
    refused(re.escape(str(path)), name, path)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("the network was used"))
    refused(re.escape(str(path)), name, path, download=False)
