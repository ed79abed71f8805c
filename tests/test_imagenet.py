"""imagenet_resnet_test.py on a small tree of JPEGs, and the data that it reads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import imagenet_resnet_test as script
import models
from data import DataLoader, ImageFiles, load_imagenet
from data.image_files import MEAN, STD, BadImage, UnreadableFile, draw_part, image_generator
from models import pretrained
from utils.base.errors import UserError
from utils.base.torchvision_import import import_torchvision

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


@pytest.fixture(scope="session")
def teacher(jpegs, tmp_path_factory) -> Path:
    """Bare weights, as torchvision's files are, of a resnet18 that has learnt the validation images by heart."""
    torch.manual_seed(0)
    net = models.build_torchvision("resnet18", 4).train()
    images, labels = load_imagenet(jpegs, size=SIZE).test.__getitems__(range(16))
    for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.momentum = 0.5
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for _ in range(12):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("teacher") / "resnet18.pth"
    torch.save(net.state_dict(), path)
    return path


def load(path):
    return torch.load(path, weights_only=True)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_from_scratch_resumed_evaluated_and_small(train, jpegs, capsys):
    whole = train("--epochs", 2, "--save_dir", "whole")
    part = train("--epochs", 1, "--save-path", "part", "-j", 2)
    assert script.main(["--resume", str(part / NAME), "--epochs", "2", "-j", "1"]) == part
    one, two = load(whole / NAME), load(part / NAME)
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    for key, state in one["optimizer"]["state"].items():
        assert all(torch.equal(value, two["optimizer"]["state"][key][n]) for n, value in state.items())
    assert (one["arch"], one["library"], one["input_shape"]) == ("resnet18", "torchvision", [3, SIZE, SIZE])
    found = results(whole)
    assert found["dataset"] == "imagenet" and len(found["filters"]) == 20
    assert {(f["shape"][0], f["kept"]) for f in found["filters"]} == {(64, 44), (128, 89), (256, 179), (512, 358)}

    assert found["small"]["largest_logit_difference"] <= 1e-4
    small, masked = models.load(whole / "small.resnet18.pth.tar"), models.load(whole / NAME)
    images, _ = load_imagenet(jpegs, size=SIZE).test.__getitems__(range(16))
    assert (small(images) - masked(images)).abs().max() <= 1e-4
    assert small.layer1[0].conv1.out_channels < 64

    capsys.readouterr()
    assert (
        script.main([str(jpegs), "-a", "resnet18", "-e", "--image_size", str(SIZE), "--resume", str(whole / NAME)])
        is None
    )
    assert f"**Test** Prec@1 {found['last_epoch_accuracy']:.3f}" in capsys.readouterr().out


def test_with_a_teacher_and_from_its_weights(train, teacher, capsys):
    folder = train("--arch_small", "resnet18", "--teacher", teacher, "--use_pretrain", teacher, "--epochs", 2)
    found = results(folder)
    assert found["recipe"] == "prune_distill" and found["teacher"]["accuracy"] >= 60
    assert found["pretrained"] == f"'{teacher}'"
    assert "of the filters removed, pretrained: " in capsys.readouterr().out
    saved, start = load(folder / NAME)["state_dict"], load(teacher)
    # Three steps at a small learning rate leave the filters that are kept near where they came from.
    kept = saved["layer4.1.conv2.weight"].flatten(1).ne(0).any(dim=1)
    assert (saved["layer4.1.conv2.weight"] - start["layer4.1.conv2.weight"])[kept].abs().max() < 0.02


def test_the_numbers_of_the_recipe():
    args = script.parse_args(["DATA", "-a", "resnet50"])
    assert (args.epochs, args.learning_rate, args.schedule, args.gammas) == (100, 0.1, [30, 60, 90], [0.1] * 3)
    assert (args.batch_size, args.decay, args.momentum, args.nesterov, args.image_size) == (256, 1e-4, 0.9, False, 224)
    assert (args.HTrate, args.v, args.k, args.recipe) == (0.7, 0.1, None, "prune")
    assert script.parse_args(["DATA", "-a", "inception_v3"]).image_size == 299


def test_flags_of_soft_filter_pruning():
    line = "DATA -a resnet34 -j 3 -b 64 --lr 0.01 --epochs 7 --print-freq 5 --save_dir out --resume x -e --use_pretrain"
    args = script.parse_args(line.split())
    got = (args.arch, args.workers, args.batch_size, args.learning_rate, args.epochs, args.print_freq, args.save_path)
    assert got == ("resnet34", 3, 64, 0.01, 7, 5, "out")
    assert (args.resume, args.evaluate, args.use_pretrain) == ("x", True, "torchvision")


def test_use_pretrain_before_the_data_path_takes_no_file(jpegs):
    args = script.parse_args(["-a", "resnet18", "--use-pretrain", str(jpegs)])
    assert (args.data_path, args.use_pretrain) == (str(jpegs), "torchvision")


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ([], "name the folder of the images"),
        (["DATA", "-a", "resnet20"], "unknown network 'resnet20'; choose resnet18"),
        (["DATA", "--image_size", "7"], "32..1024"),
        (["DATA", "--head_width", "20"], "cifar10_resnet_test.py"),
        (["DATA", "--on_bad_image", "cry"], "skip"),
        (["DATA", "-e"], "--resume"),
        (["DATA", "--nesterov", "maybe"], "on or off"),
    ],
)
def test_bad_flags_give_one_clear_line(flags, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        script.parse_args(flags)
    assert "\n" not in str(caught.value)


def test_without_a_network_pretrained_weights_are_one_clear_line(train, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "answers", lambda url: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(
        UserError, match=r"trained weights of resnet18 .* does not answer .*--use_pretrain FILE"
    ) as caught:
        train("--use_pretrain")
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_pretrained_weights_for_other_classes_keep_the_new_last_layer(teacher):
    net = models.build_torchvision("resnet18", 7)
    head = net.fc.weight.clone()
    assert "except the last layer" in pretrained.load_pretrained(net, "resnet18", str(teacher))
    assert torch.equal(net.fc.weight, head) and torch.equal(net.conv1.weight, load(teacher)["conv1.weight"])
    with pytest.raises(UserError, match=r"layer1\.0\.conv3"):
        pretrained.load_pretrained(models.build_torchvision("resnet50", 4), "resnet50", str(teacher))


# The data


def test_random_parts_are_torchvisions_number_for_number():
    get_params = import_torchvision().transforms.RandomResizedCrop.get_params
    for seed, (width, height) in enumerate([(500, 375), (333, 500), (1000, 20), (20, 1000), (64, 64)] * 4):
        torch.manual_seed(seed)
        wanted = get_params(Image.new("RGB", (width, height)), (0.08, 1.0), (3 / 4, 4 / 3))
        assert draw_part(height, width, torch.Generator().manual_seed(seed)) == tuple(wanted)


def test_images_are_those_of_torchvisions_transforms(jpegs):
    transforms = import_torchvision().transforms
    images = load_imagenet(jpegs, size=SIZE, seed=3)
    images.train.set_epoch(2)
    end = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    test = transforms.Compose([transforms.Resize(int(SIZE * 256 / 224)), transforms.CenterCrop(SIZE), *end])
    for index in range(4):
        picture = Image.open(images.test.path(index)).convert("RGB")
        assert torch.equal(images.test[index][0], test(picture))
        picture = Image.open(images.train.path(index)).convert("RGB")
        numbers = image_generator(3, 2, index)
        top, left, height, width = draw_part(picture.height, picture.width, numbers)
        picture = transforms.functional.resized_crop(picture, top, left, height, width, [SIZE, SIZE])
        if torch.rand(1, generator=numbers) < 0.5:
            picture = transforms.functional.hflip(picture)
        assert torch.equal(images.train[index][0], transforms.Compose(end)(picture))


def test_numbers_of_an_image_depend_on_seed_epoch_and_index_alone(jpegs):
    def pixels(epoch, **options):
        loader = DataLoader(load_imagenet(jpegs, size=32, seed=1).train, 5, shuffle=True, seed=1, **options)
        loader.set_epoch(epoch)
        return torch.cat([images for images, _ in loader])

    assert torch.equal(pixels(1), pixels(1, num_workers=2, persistent_workers=True))
    assert not torch.equal(pixels(1), pixels(2))
    shares = [pixels(1, num_replicas=2, rank=rank) for rank in range(2)]
    assert torch.equal(torch.cat(shares).sum(dim=(1, 2, 3)).sort().values, pixels(1).sum(dim=(1, 2, 3)).sort().values)
    seeds = {
        image_generator(s, e, i).initial_seed() & 0xFFFFFFFF for s in range(3) for e in range(10) for i in range(300)
    }
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
    assert log.count("**Skipped** 2 images") == 2
    assert results(folder)["images_skipped"] == 2


def test_a_share_without_an_image_that_can_be_read_is_empty(damaged):
    copy, cut, _ = damaged
    images = ImageFiles(copy, [str(cut)] * 2, [0, 0], size=32, augment=True)
    batch, labels = images.__getitems__([0, 1])
    assert batch.shape == (0, 3, 32, 32) and labels.shape == (0,)
    assert images.newly_bad() == [str(cut)] * 2 and images.newly_bad() == []


def test_a_bad_image_stops_the_run_where_that_is_asked_for(train, damaged):
    copy, cut, _ = damaged
    with pytest.raises(BadImage) as caught:
        train("--on_bad_image", "stop", "-j", 1, "--epochs", 1, data=copy)
    assert str(caught.value).startswith(f"cannot read the image '{cut}' (") and "\n" not in str(caught.value)


def test_a_file_system_that_fails_is_no_bad_image(tmp_path):
    images = ImageFiles(tmp_path, ["gone.jpg"], [0], augment=False, on_bad_image="skip")
    with pytest.raises(UnreadableFile, match=r"gone\.jpg.*No such file"):
        images.__getitems__([0])


def test_archives_are_refused_with_the_command_that_unpacks_them(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    (tmp_path / "train/n01440764.tar").write_bytes(b"")
    with pytest.raises(UserError, match=rf"one per class.*cd {tmp_path}/train && for f in .*tar -xf"):
        load_imagenet(tmp_path)
    (tmp_path / "train/n01440764.tar").unlink()
    (tmp_path / "val/ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(UserError, match="images themselves"):
        load_imagenet(tmp_path)


def test_a_folder_without_a_tree_is_named(tmp_path):
    with pytest.raises(UserError, match=f"no image tree at '{tmp_path}': expected {tmp_path}/train/<class>"):
        load_imagenet(tmp_path)
