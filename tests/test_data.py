"""Augmentation against torchvision image by image; image sets read from folders, torchvision's files and code."""

import pickle
import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import chisquare
from torch import nn

import data
from data import DataLoader, ImageArrays, sources, synthetic
from data.augment import crop_and_flip, draw_crops_and_flips, normalise
from utils.base.errors import UserError
from utils.base.torchvision_import import import_torchvision

MEAN, STD = [125.3 / 255, 123.0 / 255, 113.9 / 255], [63.0 / 255, 62.1 / 255, 66.7 / 255]
SPLITS = ("train", "test")


def pixels(n, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def image_set(n=60, augment=True, seed=0):
    return ImageArrays(pixels(n), torch.arange(n), MEAN, STD, augment=augment, seed=seed)


def pil(image):
    """A PIL image of uint8 (3, H, W)."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def naive_crop_and_flip(image, top, left, flip, pad=4):
    """By torchvision on a PIL image: what its RandomCrop(padding=pad) and RandomHorizontalFlip do with these numbers."""
    transforms = import_torchvision().transforms.functional
    padded = transforms.pad(pil(image), pad)
    cropped = transforms.crop(padded, top, left, *image.shape[1:])
    return transforms.hflip(cropped) if flip else cropped


def naive_normalise(image):
    """By torchvision's ToTensor and Normalize."""
    transforms = import_torchvision().transforms
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])(image)


def make_tree(base, classes=("a", "b"), splits=SPLITS, per_class=2):
    """An image tree of random 32x32 PNGs; returns {split: uint8 images in class order}."""
    images = {}
    for seed, split in enumerate(splits):
        images[split] = pixels(len(classes) * per_class, seed=seed)
        for i, image in enumerate(images[split]):
            folder = base / split / classes[i // per_class]
            folder.mkdir(parents=True, exist_ok=True)
            pil(image).save(folder / f"{i:03}.png")
    return images


def read_one(tmp_path, image, name="x.png"):
    """The first training image of a tree, after `image` was saved there."""
    make_tree(tmp_path, per_class=1)
    (tmp_path / "train" / "a" / "000.png").unlink()
    image.save(tmp_path / "train" / "a" / name)
    return data.load("folder", tmp_path).train.images[0]


@pytest.fixture
def tv_cifar10(tmp_path, monkeypatch):
    """torchvision's CIFAR-10 files with four images a batch; checksums are not compared. Returns (folder, pixels, labels)."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images, labels = pixels(24), torch.arange(24) % 10
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(names):
        part = slice(4 * i, 4 * i + 4)
        content = {"data": images[part].reshape(4, -1).numpy(), "labels": labels[part].tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    words = [f"word{9 - i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": words}))
    cifar10 = import_torchvision().datasets.CIFAR10
    monkeypatch.setattr(cifar10, "train_list", [[name, None] for name in names[:5]])
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(cifar10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    return folder, images, labels


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(sources, "answers", lambda url: False)


@pytest.fixture
def no_synthetic(monkeypatch):
    def refuse(n, seed):
        raise AssertionError("synthetic images were made")

    monkeypatch.setattr(sources, "make_images", refuse)


# Augmentation


def test_crops_and_flips_are_torchvisions():
    """Every offset with and without flip, on images that differ."""
    numbers = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    images = pixels(len(numbers))
    ours = crop_and_flip(images, numbers)
    naive = [np.array(naive_crop_and_flip(i, *n)) for i, n in zip(images, numbers.tolist(), strict=True)]
    assert torch.equal(ours, torch.from_numpy(np.stack(naive)).permute(0, 3, 1, 2))


def test_crops_of_other_shapes_and_padding():
    numbers = draw_crops_and_flips(30, seed=0, epoch=0, pad=2)
    images = pixels(30, 12, 20)
    naive = [np.array(naive_crop_and_flip(i, *n, pad=2)) for i, n in zip(images, numbers.tolist(), strict=True)]
    assert torch.equal(crop_and_flip(images, numbers, pad=2), torch.from_numpy(np.stack(naive)).permute(0, 3, 1, 2))


def test_normalisation_is_torchvisions_to_the_bit():
    """All 256 levels in every channel."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, -1, -1).contiguous()
    ours = normalise(levels, torch.tensor(MEAN), torch.tensor(STD))
    assert torch.equal(ours[0], naive_normalise(pil(levels[0])))


def test_augmented_batch_is_torchvisions_to_the_bit():
    images = image_set(seed=3)
    images.set_epoch(2)
    indices = [5, 59, 0, 17, 5]
    numbers = draw_crops_and_flips(60, seed=3, epoch=2)[indices].tolist()
    chosen = zip(images.images[indices], numbers, strict=True)
    naive = torch.stack([naive_normalise(naive_crop_and_flip(i, *n)) for i, n in chosen])
    assert torch.equal(images.__getitems__(indices)[0], naive)


def test_plain_batch_is_torchvisions_to_the_bit():
    images = image_set(augment=False)
    naive = torch.stack([naive_normalise(pil(image)) for image in images.images[[3, 1]]])
    assert torch.equal(images.__getitems__([3, 1])[0], naive)


def test_augmentation_leaves_the_images_alone():
    images = image_set()
    images.__getitems__(range(60))
    assert torch.equal(images.images, pixels(60))


def test_offsets_and_flips_are_uniform_and_independent():
    """Chi-square over the 9 x 9 x 2 combinations of 160,000 draws."""
    top, left, flip = draw_crops_and_flips(160_000, seed=0, epoch=0).unbind(1)
    counts = torch.bincount((top * 9 + left) * 2 + flip, minlength=162)
    assert len(counts) == 162 and chisquare(counts.numpy()).pvalue > 0.001


def test_numbers_of_two_epochs_are_independent():
    """Chi-square over pairs (top in epoch 0, top in epoch 1) and of the flips, sample by sample."""
    first, second = (draw_crops_and_flips(80_000, seed=0, epoch=e) for e in (0, 1))
    tops = torch.bincount(first[:, 0] * 9 + second[:, 0], minlength=81)
    flips = torch.bincount(first[:, 2] * 2 + second[:, 2], minlength=4)
    assert min(chisquare(tops.numpy()).pvalue, chisquare(flips.numpy()).pvalue) > 0.001


def test_numbers_depend_on_seed_and_epoch():
    drawn = {tuple(draw_crops_and_flips(50, s, e).flatten().tolist()) for s in range(5) for e in range(5)}
    assert len(drawn) == 25


def test_numbers_do_not_depend_on_torchs_generator():
    torch.manual_seed(1)
    first = draw_crops_and_flips(50, 0, 0)
    torch.manual_seed(2)
    assert torch.equal(draw_crops_and_flips(50, 0, 0), first)


def by_index(loader):
    """{sample: augmented image} of one epoch."""
    return {int(label): image for batch, labels in loader for image, label in zip(batch, labels, strict=True)}


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(persistent):
    """Two epochs, augmented in this process and in two others."""
    plain, spread = (
        DataLoader(image_set(), 8, 0.1, True, seed=1, num_workers=w, persistent_workers=persistent and w > 0)
        for w in (0, 2)
    )
    for _ in range(2):
        for ours, theirs in zip(plain, spread, strict=True):
            assert all(map(torch.equal, ours, theirs))


def test_augmentation_does_not_depend_on_order_and_sizes():
    first = by_index(DataLoader(image_set(), 8, 0.1, True, seed=1))
    second = by_index(DataLoader(image_set(), 13))
    assert all(torch.equal(first[i], second[i]) for i in range(60))


def test_augmentation_changes_with_the_epoch():
    loader = DataLoader(image_set(), 8)
    first, second = by_index(loader), by_index(loader)
    assert sum(torch.equal(first[i], second[i]) for i in range(60)) < 6


def test_ranks_augment_as_one_process_does():
    shares = [by_index(DataLoader(image_set(), 8, num_replicas=2, rank=r)) for r in range(2)]
    single = by_index(DataLoader(image_set(), 8))
    assert all(torch.equal((shares[0] | shares[1])[i], single[i]) for i in range(60))


# ImageArrays


def test_mini_batch_shapes_and_dtypes():
    images, labels = next(iter(DataLoader(image_set(), 8)))
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == (
        (8, 3, 32, 32),
        torch.float32,
        (8,),
        torch.int64,
    )


def test_one_sample():
    images = image_set()
    image, label = images[7]
    assert torch.equal(image, images.__getitems__([7])[0][0]) and label == 7


def test_length():
    assert len(image_set(13)) == 13


def test_to_moves_everything():
    images = image_set().to(torch.device("meta"))
    assert all(getattr(images, name).is_meta for name in ("images", "labels", "mean", "std"))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(4, 3, 8, 8), torch.arange(4)),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), torch.arange(4)),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(5)),
    ],
)
def test_bad_arrays_are_described(images, labels):
    with pytest.raises(ValueError, match=rf"{images.dtype} \({len(images)}, .*and {len(labels)} labels"):
        ImageArrays(images, labels, MEAN, STD, augment=False)


# Synthetic images


def test_synthetic_is_deterministic():
    torch.manual_seed(1)
    first = synthetic.make_images(50, seed=1)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, synthetic.make_images(50, seed=1)))


def test_synthetic_shapes_and_dtypes():
    images, labels = synthetic.make_images(50, seed=1)
    assert (images.shape, images.dtype, labels.dtype) == ((50, 3, 32, 32), torch.uint8, torch.int64)


@pytest.fixture(scope="module")
def small_synthetic():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SYNTHETIC_SIZES", {"train": 2000, "test": 500})
        return data.load("synthetic", "nowhere")


def test_synthetic_is_balanced(small_synthetic):
    counts = [torch.bincount(getattr(small_synthetic, split).labels).tolist() for split in SPLITS]
    assert counts == [[200] * 10, [50] * 10]


def test_synthetic_images_are_all_different(small_synthetic):
    """None twice, so no test image is a training image."""
    images = torch.cat([small_synthetic.train.images, small_synthetic.test.images])
    assert len(torch.unique(images.flatten(1), dim=0)) == 2500


def test_synthetic_splits_of_one_size_differ(monkeypatch):
    monkeypatch.setattr(sources, "SYNTHETIC_SIZES", {"train": 20, "test": 20})
    loaded = data.load("synthetic", "nowhere")
    images = torch.cat([loaded.train.images, loaded.test.images])
    assert len(torch.unique(images.flatten(1), dim=0)) == 40


def test_synthetic_uses_the_levels(small_synthetic):
    """Neither flat nor mostly clipped."""
    images = small_synthetic.train.images.float()
    assert images.std() > 30 and ((images == 0) | (images == 255)).float().mean() < 0.2


def test_synthetic_is_learnable_with_augmentation(small_synthetic):
    """One epoch of a linear classifier on 8x8 averages; chance is 10 %."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for images, labels in DataLoader(small_synthetic.train, 16, shuffle=True, seed=0):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    images, labels = small_synthetic.test.__getitems__(range(500))
    assert (net(images).argmax(1) == labels).float().mean() > 0.3


def test_synthetic_says_so(small_synthetic):
    assert "synthetic" in small_synthetic.source and small_synthetic.name == "synthetic"


# Image trees


def test_tree_is_read_in_class_order(tmp_path):
    """Pixels and labels exactly; classes sorted by name, whatever the order on the disk."""
    classes = sorted(["zebra", "Bee", "ant", "10", "9"])
    images = make_tree(tmp_path, classes[::-1], per_class=1)
    loaded = data.load("folder", tmp_path)
    assert loaded.classes == classes
    for split in SPLITS:
        arrays = getattr(loaded, split)
        assert torch.equal(arrays.images, images[split].flip(0)) and arrays.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("inside", ["", "cifar10"])
@pytest.mark.parametrize("test", ["test", "val"])
def test_tree_is_found(tmp_path, inside, test):
    images = make_tree(tmp_path / inside, "abcdefghij", ("train", test), per_class=1)
    assert torch.equal(data.load("cifar10", tmp_path).test.images, images[test])


def test_training_is_augmented_and_testing_is_not(tmp_path):
    make_tree(tmp_path)
    loaded = data.load("folder", tmp_path)
    assert (loaded.train.augment, loaded.test.augment) == (True, False)


def test_seed_is_that_of_the_augmentation(tmp_path):
    make_tree(tmp_path)
    assert data.load("folder", tmp_path, seed=5).train.seed == 5


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]),
        ("cifar100", [129.3, 124.1, 112.4], [68.2, 65.4, 70.4]),
    ],
)
def test_cifar_is_normalised_by_the_papers_constants(tmp_path, name, mean, std):
    make_tree(tmp_path, [f"{i:02}" for i in range(data.DATASETS[name].classes)], per_class=1)
    loaded = data.load(name, tmp_path)
    for arrays in (loaded.train, loaded.test):
        torch.testing.assert_close(torch.stack([arrays.mean, arrays.std]) * 255, torch.tensor([mean, std]))


def test_own_images_are_normalised_by_their_own_statistics(tmp_path):
    """Of the training images, for both splits."""
    images = make_tree(tmp_path)["train"].double() / 255
    loaded = data.load("folder", tmp_path)
    for arrays in (loaded.train, loaded.test):
        torch.testing.assert_close(arrays.mean, images.mean((0, 2, 3)).float())
        torch.testing.assert_close(arrays.std, images.std((0, 2, 3), correction=0).float())


def test_other_files_and_hidden_folders_are_ignored(tmp_path):
    images = make_tree(tmp_path)
    (tmp_path / "train" / "a" / "Thumbs.db").write_text("x")
    (tmp_path / "train" / "a" / "._000.png").write_text("x")
    (tmp_path / "train" / "readme.txt").write_text("x")
    (tmp_path / "train" / ".cache").mkdir()
    assert torch.equal(data.load("folder", tmp_path).train.images, images["train"])


def test_upper_case_suffix(tmp_path):
    image = pixels(1)[0]
    assert torch.equal(read_one(tmp_path, pil(image), "X.PNG"), image)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif"])
def test_other_formats(tmp_path, suffix):
    """A flat colour survives every compression."""
    image = read_one(tmp_path, Image.new("RGB", (32, 32), (200, 100, 50)), f"x{suffix}").float()
    assert (image.mean((1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 4


def test_grey_image(tmp_path):
    grey = pixels(1)[0, 0]
    assert torch.equal(read_one(tmp_path, Image.fromarray(grey.numpy())), grey.expand(3, -1, -1))


def test_transparent_image(tmp_path):
    image = pixels(1)[0]
    rgba = torch.cat([image, torch.full((1, 32, 32), 200, dtype=torch.uint8)])
    assert torch.equal(read_one(tmp_path, Image.fromarray(rgba.permute(1, 2, 0).numpy())), image)


def test_palette_image(tmp_path):
    indices = pixels(1)[0, 0] % 4
    palette = [[255, 0, 0], [0, 255, 0], [1, 2, 3], [90, 80, 70]]
    image = Image.fromarray(indices.numpy())
    image.putpalette([level for colour in palette for level in colour])
    expected = torch.tensor(palette, dtype=torch.uint8)[indices.long()].permute(2, 0, 1)
    assert torch.equal(read_one(tmp_path, image), expected)


@pytest.mark.parametrize(("height", "width"), [(32, 96), (96, 32)])
def test_long_image_is_cut_out_of_the_centre(tmp_path, height, width):
    image = pixels(1, height, width)[0]
    top, left = (height - 32) // 2, (width - 32) // 2
    assert torch.equal(read_one(tmp_path, pil(image)), image[:, top : top + 32, left : left + 32])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 200), (8, 8), (5, 40), (33, 32)])
def test_image_of_another_size_is_scaled(tmp_path, height, width):
    """Upper half dark, lower half bright: so it stays, to a pixel around the middle."""
    image = torch.full((3, height, width), 20, dtype=torch.uint8)
    image[:, (height + 1) // 2 :] = 220
    scaled = read_one(tmp_path, pil(image)).float()
    assert scaled.shape == (3, 32, 32) and scaled[:, :11].max() < 60 and scaled[:, 21:].min() > 180


# Trees that cannot be read: one line that names the culprit


def refused(match, name, path, **options):
    with pytest.raises(UserError, match=match) as error:
        data.load(name, path, **options)
    assert "\n" not in str(error.value)


def test_wrong_number_of_classes(tmp_path):
    make_tree(tmp_path, "abc", per_class=1)
    refused(r"3 class folders, cifar10 has 10.*--dataset folder", "cifar10", tmp_path)


@pytest.mark.parametrize("split", SPLITS)
def test_empty_class_folder_is_named(tmp_path, split):
    make_tree(tmp_path)
    (tmp_path / split / "empty").mkdir()
    refused(rf"{split}/empty' has no images", "folder", tmp_path)


def test_class_folders_that_differ_are_named(tmp_path):
    make_tree(tmp_path)
    make_tree(tmp_path, ["surplus"], ["test"])
    refused("surplus", "folder", tmp_path)


def test_tree_without_class_folders(tmp_path):
    for split in SPLITS:
        (tmp_path / split).mkdir()
    refused("train' has no class folders", "folder", tmp_path)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_corrupt_image_is_named(tmp_path, damage):
    make_tree(tmp_path)
    file = tmp_path / "test" / "b" / "003.png"
    content = file.read_bytes()
    middle = len(content) // 2
    damaged = {
        "empty": b"",
        "text": b"no image",
        "cut": content[:middle],
        "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
    }
    file.write_bytes(damaged[damage])
    refused(r"test/b/003\.png", "folder", tmp_path)


def test_path_without_a_tree(tmp_path):
    refused(rf"{re.escape(str(tmp_path))}.*train/<class>", "folder", tmp_path)


def test_half_a_tree_is_none(tmp_path):
    make_tree(tmp_path, splits=["train"])
    refused("no image tree", "folder", tmp_path)


def test_unknown_data_set_is_answered_with_the_choice(tmp_path):
    refused("cifar11.*cifar10, cifar100, folder, synthetic", "cifar11", tmp_path)


# torchvision's files


@pytest.mark.parametrize("above", [True, False])
def test_torchvision_files_are_read(tv_cifar10, above):
    """From the folder that holds them and from the one above; pixels, labels and class names exactly."""
    folder, images, labels = tv_cifar10
    loaded = data.load("cifar10", folder.parent if above else folder, download=False)
    assert torch.equal(torch.cat([loaded.train.images, loaded.test.images]), images)
    assert torch.equal(torch.cat([loaded.train.labels, loaded.test.labels]), labels)
    assert loaded.classes == [f"word{9 - i}" for i in range(10)]


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_missing_torchvision_file(tv_cifar10, no_network, name):
    (tv_cifar10[0] / name).unlink()
    refused("cifar-10-batches-py' are incomplete", "cifar10", tv_cifar10[0].parent)


def test_torchvision_files_are_not_unpickled_when_their_checksum_is_wrong(tmp_path, no_network):
    """A pickle can run code; this one would make a folder."""

    class Payload:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "trace",)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(pickle.dumps(Payload()))
    refused("cifar-10-batches-py' are incomplete or damaged", "cifar10", tmp_path)
    assert not (tmp_path / "trace").exists()


# Downloads, and what never happens instead


def test_absent_data_are_not_downloaded_when_not_asked_to(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "answers", lambda url: pytest.fail("the network was asked"))
    refused(re.escape(f"{tmp_path}/cifar-100-python"), "cifar100", tmp_path, download=False)


def test_no_network_is_one_line_with_remedies(tmp_path, no_network):
    refused(rf"{re.escape(str(tmp_path))}.*--dataset synthetic", "cifar10", tmp_path)


def test_failing_download_is_one_line(tmp_path, monkeypatch):
    def download(self, url=None):
        raise OSError("No space left on device")

    monkeypatch.setattr(sources, "answers", lambda url: True)
    monkeypatch.setattr(import_torchvision().datasets.CIFAR10, "download", download)
    refused("download.*No space left", "cifar10", tmp_path)


def test_download_leaves_no_socket_timeout_behind(tmp_path, monkeypatch):
    """Other sockets of the process wait as long as before."""
    within = []

    def download(self):
        within.append(socket.getdefaulttimeout())
        raise RuntimeError

    monkeypatch.setattr(sources, "answers", lambda url: True)
    monkeypatch.setattr(import_torchvision().datasets.CIFAR10, "download", download)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(77)
    try:
        refused("download", "cifar10", tmp_path)
        assert (within, socket.getdefaulttimeout()) == ([sources.PROBE_SECONDS], 77)
    finally:
        socket.setdefaulttimeout(before)


def test_download_goes_to_the_data_path(tv_cifar10, tmp_path, monkeypatch):
    """A stand-in for torchvision's download puts the files in place."""
    folder, images, _ = tv_cifar10
    target = tmp_path / "new"

    def download(self):
        folder.rename(Path(self.root) / folder.name)

    monkeypatch.setattr(sources, "answers", lambda url: True)
    monkeypatch.setattr(import_torchvision().datasets.CIFAR10, "download", download)
    loaded = data.load("cifar10", target)
    assert torch.equal(loaded.train.images, images[:20]) and (target / folder.name).is_dir()


def test_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    """It accepts the connection on this machine and says nothing."""
    monkeypatch.setattr("utils.base.files.PROBE_SECONDS", 0.3)
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cifar.tar.gz"
        monkeypatch.setattr(import_torchvision().datasets.CIFAR10, "url", url)
        begin = time.monotonic()
        refused("does not answer", "cifar10", tmp_path)
    assert time.monotonic() - begin < 5


def test_name_look_up_that_hangs_is_given_up(monkeypatch):
    """Look-ups obey no socket timeout."""
    monkeypatch.setattr("utils.base.files.PROBE_SECONDS", 0.3)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(3) or [])
    begin = time.monotonic()
    assert not sources.answers("http://hangs.invalid/")
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("path", ["missing/deeper", "file"])
def test_path_that_cannot_be_a_folder_is_named(tmp_path, no_network, path):
    (tmp_path / "file").write_text("x")
    refused(re.escape(f"{tmp_path / path}'"), "cifar10", tmp_path / path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "folder"])
@pytest.mark.parametrize("fault", ["absent", "empty", "cut tree", "damaged files"])
def test_synthetic_images_never_replace_others(tmp_path, no_network, no_synthetic, name, fault):
    if fault == "cut tree":
        make_tree(tmp_path, splits=["train"])
    elif fault == "damaged files":
        for folder in ("cifar-10-batches-py", "cifar-100-python"):
            (tmp_path / folder).mkdir()
    refused(re.escape(str(tmp_path)), name, tmp_path / "absent" if fault == "absent" else tmp_path)
