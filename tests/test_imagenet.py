"""imagenet_resnet_test.py on a small tree of JPEGs, and the data that it reads."""

import shutil
import socket

import pytest
import torch
from PIL import Image
from tiny import load, results, settings_of

import imagenet_resnet_test as script
import models
from data import DataLoader, ImageFiles, first_images, load_imagenet
from data.image_files import MEAN, STD, BadImage, UnreadableFile, image_seed
from models.load import OF_HALF
from utils.base.errors import UserError
from utils.base.torchvision_import import import_torchvision
from utils.train import setup
from utils.train.resume import Start

NAME = "checkpoint.resnet18.pth.tar"
SIZE = 64


@pytest.fixture
def train(jpegs, tmp_path, monkeypatch):
    """train("--epochs", 2, ...) runs the script with resnet18 on the tree, in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, data=jpegs):
        # A small learning rate: logits of a network that has seen three mini-batches stay of order one.
        defaults = ["-a", "resnet18", "-b", "8", "--lr", "0.002", "--image-size", str(SIZE), "-j", "0"]
        return script.main([str(data), *defaults, *map(str, flags)])

    return run


def test_from_scratch_resumed_evaluated_and_small(train, jpegs, capsys):
    whole = train("--epochs", 2, "--save_dir", "whole")
    part = train("--epochs", 1, "--save-path", "part", "-j", 2)
    assert script.main(["--resume", str(part / NAME), "--epochs", "2", "-j", "1"]) == part
    one, two = load(whole / NAME), load(part / NAME)
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    for key, state in one["optimizer"]["state"].items():
        assert all(torch.equal(value, two["optimizer"]["state"][key][n]) for n, value in state.items())
    assert (one["arch"], one["library"], one["input_shape"]) == ("resnet18", "torchvision", [3, SIZE, SIZE])
    found = results(whole)
    assert {(f["shape"][0], f["kept"]) for f in found["filters"]} == {(64, 44), (128, 89), (256, 179), (512, 358)}
    small, masked = models.load(whole / "small.resnet18.pth.tar"), models.load(whole / NAME)
    images = first_images(load_imagenet(jpegs, size=SIZE).test, 16)
    assert (small(images) - masked(images)).abs().max() <= 1e-4 and small.layer1[0].conv1.out_channels < 64
    capsys.readouterr()
    script.main([str(jpegs), "-a", "resnet18", "-e", "--image_size", str(SIZE), "--resume", str(whole / NAME)])
    assert f"**Test** Prec@1 {found['last_epoch_accuracy']:.3f}" in capsys.readouterr().out


def test_flags_and_the_numbers_of_the_recipe():
    args = settings_of(script, ["DATA", "-a", "resnet50"])
    assert (args.epochs, args.learning_rate, args.schedule, args.gammas) == (100, 0.1, [30, 60, 90], [0.1] * 3)
    assert (args.batch_size, args.decay, args.nesterov) == (256, 1e-4, False)
    line = "DATA -a resnet34 -j 3 -b 64 --lr 0.01 --epochs 7 --print-freq 5 --save_dir out --resume x -e --use_pretrain"
    args = settings_of(script, line.split())
    assert (args.workers, args.batch_size, args.learning_rate, args.print_freq) == (3, 64, 0.01, 5)
    assert (args.save_path, args.resume, args.evaluate, args.use_pretrain) == ("out", "x", True, "torchvision")


def test_use_pretrain(train, jpegs, tmp_path, monkeypatch):
    """From a file, whose last layer may differ; another network's file and a server without an answer are one line."""
    start = models.build_torchvision("resnet18", 7).state_dict()
    torch.save(start, tmp_path / "trained.pth")
    folder = train("--use_pretrain", tmp_path / "trained.pth", "--epochs", 1)
    saved = load(folder / NAME)["state_dict"]
    # Three steps at a small learning rate leave the filters that are kept near where they came from.
    kept = saved["layer4.1.conv2.weight"].flatten(1).ne(0).any(dim=1)
    assert (saved["layer4.1.conv2.weight"] - start["layer4.1.conv2.weight"])[kept].abs().max() < 0.02
    assert results(folder)["pretrained"].startswith(f"'{tmp_path / 'trained.pth'}'")
    args = settings_of(script, ["-a", "resnet18", "--use-pretrain", str(jpegs)])
    assert (args.data_path, args.use_pretrain) == (str(jpegs), "torchvision")
    with pytest.raises(UserError, match=r"layer1\.0\.conv1.*\[64, 64, 1, 1\]"):
        train("-a", "resnet50", "--use_pretrain", tmp_path / "trained.pth")
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: (_ for _ in ()).throw(OSError("unreachable")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"trained weights of resnet18 failed .*--use_pretrain FILE"):
        train("--use_pretrain")


def test_torchvisions_weights_get_images_of_the_mean_and_std_that_they_were_trained_with(jpegs, tmp_path, monkeypatch):
    """Two networks of torchvision turn ImageNet's into 0.5 by themselves, where torchvision loads their weights."""
    torchvision, usual = import_torchvision(), {}
    for arch in torchvision.models.list_models(torchvision.models):
        for weights in list(torchvision.models.get_model_weights(arch))[:1]:
            usual[arch] = weights.transforms()
    other = {arch for arch, transforms in usual.items() if tuple(transforms.mean) != MEAN}
    assert other | {"googlenet", "inception_v3"} == set(OF_HALF)
    assert all(tuple(usual[arch].mean) == tuple(usual[arch].std) == (0.5,) * 3 for arch in other)
    net = models.build_torchvision("googlenet", 3)
    torch.save(net.state_dict(), tmp_path / "googlenet.pth")
    flags = ["-a", "googlenet", "-j", "0", "--image_size", "64", "--use_pretrain", str(tmp_path / "googlenet.pth")]
    args = settings_of(script, [str(jpegs), *flags])
    images = script.load_images(args)
    start = Start(None)
    script.load_trained(net, args, images, start)
    assert "normalised as those of" in start.notes[0] and "googlenet.pth" in start.notes[0]
    pixels = images.test[0][0][None]
    transformed = torchvision.models.GoogLeNet(transform_input=True, aux_logits=False, init_weights=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    expected = transformed._transform_input((pixels / 255 - mean) / std)
    assert torch.allclose(images.test.normalise(pixels), expected, atol=1e-6)
    assert models.load_checkpoint(tmp_path / "googlenet.pth", "googlenet")["normalisation"] == images.normalisation


def test_images_are_scaled_to_224_or_what_the_network_is_for(jpegs):
    for flags, size in ((["-a", "resnet50"], 224), (["-a", "inception_v3"], 299), (["--image_size", "64"], 64)):
        args = settings_of(script, [str(jpegs), *flags])
        assert script.load_images(args).train.image_shape == (3, size, size)


def test_as_many_workers_as_cores(monkeypatch):
    monkeypatch.setattr(script, "usable_cores", lambda: 40)
    monkeypatch.setattr(script, "local_world_size", lambda: 2)
    assert settings_of(script, ["DATA"]).workers == 20 and settings_of(script, ["DATA", "-j", "3"]).workers == 3


def test_workers_of_both_loaders_must_fit_into_shared_memory(jpegs, monkeypatch):
    """Test mini-batches are as large as those of training, and are counted as they are."""
    args = settings_of(script, [str(jpegs), "-a", "resnet18", "-b", "12", "--image_size", "32", "-j", "2"])
    images, cpu = script.load_images(args), torch.device("cpu")
    needed = (2 * 2 + 1) * 12 * 3 * 32 * 32
    for build in (setup.build_train_loader, setup.build_test_loader):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, needed))
        build(images, args, cpu)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, needed - 1))
        with pytest.raises(UserError, match="workers with 2 mini-batches of 12 images"):
            build(images, args, cpu)


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ([], "name the folder of the images"),
        (["DATA", "-a", "resnet20"], "unknown network 'resnet20'; choose resnet18"),
        (["DATA", "--image_size", "7"], "32..1024"),
        (["DATA", "--on_bad_image", "cry"], "skip"),
        (["DATA", "-e"], "--resume"),
    ],
)
def test_bad_flags_give_one_line(flags, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        settings_of(script, flags)
    assert "\n" not in str(caught.value)


# The data


def test_images_are_those_of_torchvisions_transforms(jpegs):
    """Naive: its transforms with ToTensor and Normalize, after torch's generator was seeded for the image."""
    transforms = import_torchvision().transforms
    end = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    test = transforms.Compose([transforms.Resize(int(SIZE * 256 / 224)), transforms.CenterCrop(SIZE), *end])
    train = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), *end])
    images = load_imagenet(jpegs, size=SIZE, seed=3)
    images.train.set_epoch(2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    batches = [part.normalise(part.__getitems__(range(8))[0]) for part in (images.test, images.train)]
    assert torch.equal(torch.get_rng_state(), state) and images.train[0][0].dtype == torch.uint8
    for index in range(8):
        assert torch.equal(batches[0][index], test(Image.open(images.test.path(index)).convert("RGB")))
        torch.manual_seed(image_seed(3, 2, index))
        assert torch.equal(batches[1][index], train(Image.open(images.train.path(index)).convert("RGB")))


def test_pixels_of_an_image_depend_on_seed_epoch_and_index_alone(jpegs):
    def pixels(epoch, **options):
        loader = DataLoader(load_imagenet(jpegs, size=32, seed=1).train, 5, shuffle=True, seed=1, **options)
        loader.set_epoch(epoch)
        return torch.cat([images for images, _ in loader])

    alone = pixels(1)
    assert torch.equal(alone, pixels(1, num_workers=2, persistent_workers=True)) and not torch.equal(alone, pixels(2))
    shares = torch.cat([pixels(1, num_replicas=2, rank=rank) for rank in range(2)])
    assert sorted(shares.flatten(1).sum(1).tolist()) == sorted(alone.flatten(1).sum(1).tolist())
    seeds = {image_seed(s, e, i) & 0xFFFFFFFF for s in range(3) for e in range(10) for i in range(300)}
    assert len(seeds) > 8990


@pytest.fixture
def damaged(jpegs, tmp_path):
    """A copy of the tree with a training image cut short and a validation image that is none."""
    copy = tmp_path / "damaged"
    shutil.copytree(jpegs, copy)
    cut = sorted((copy / "train/n00000001").iterdir())[0]
    cut.write_bytes(cut.read_bytes()[:700])
    no_image = sorted((copy / "val/n00000002").iterdir())[0]
    no_image.write_bytes(b"not an image")
    return copy, cut, no_image


def test_bad_images_are_named_counted_and_left_out(train, damaged):
    copy, cut, no_image = damaged
    folder = train("--epochs", 2, "--recipe", "baseline", "-j", 1, data=copy)
    log = (folder / "log_seed_1.txt").read_text()
    assert log.count(f"skipped, cannot be read: {cut}") == log.count(f"skipped, cannot be read: {no_image}") == 1
    assert log.count("**Skipped** 2 images") == 2 and results(folder)["images_skipped"] == 2
    # The answers to the others would be those to other images.
    assert results(folder)["test_hits"] is None


def test_no_image_that_can_be_read_is_one_line(train, jpegs, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(jpegs / split, tmp_path / "broken" / split)
    for file in (tmp_path / "broken/val").rglob("*.JPEG"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="not one image of the data can be read"):
        train("--epochs", 1, "--recipe", "baseline", data=tmp_path / "broken")
    trained = train("--epochs", 1, "--recipe", "baseline", data=jpegs)
    with pytest.raises(UserError, match="not one test image can be read"):
        train("--evaluate", "--resume", trained / NAME, data=tmp_path / "broken")


def test_a_mini_batch_without_a_readable_image_is_empty(damaged):
    copy, cut, _ = damaged
    images = ImageFiles(copy, [str(cut)] * 2, [0, 0], size=32, augment=True)
    batch, labels = images.__getitems__([0, 1])
    assert images.normalise(batch).shape == (0, 3, 32, 32) and labels.shape == (0,)
    assert images.newly_bad() == [str(cut)] * 2 and images.newly_bad() == []
    with pytest.raises(ValueError, match="image 1 cannot be read"):
        images[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_in_one_line_where_that_is_chosen(damaged, workers):
    copy, cut, _ = damaged
    images = load_imagenet(copy, size=32, on_bad_image="stop").train
    with pytest.raises(BadImage) as caught:
        list(DataLoader(images, 4, num_workers=workers))
    message = str(caught.value)
    assert message.startswith(f"cannot read the image '{cut}' (") and "\n" not in message.strip()
    assert message.strip().endswith("or use --on_bad_image skip")


def test_a_file_system_that_fails_is_no_bad_image(tmp_path):
    images = ImageFiles(tmp_path, ["gone.jpg"], [0], augment=False, on_bad_image="skip")
    with pytest.raises(UnreadableFile, match=r"gone\.jpg.*No such file"):
        images.__getitems__([0])
    with pytest.raises(UserError, match=f"no image tree at '{tmp_path}': expected {tmp_path}/train/<class>"):
        load_imagenet(tmp_path)
