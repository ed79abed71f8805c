"""From a pruned checkpoint to its small network: `python -m utils.get_small_model CHECKPOINT`.

    python -m utils.get_small_model runs/.../checkpoint.resnet20.pth.tar
    python -m utils.get_small_model best.resnet20.pth.tar --data DATA      # and the accuracy of both networks
    python -m utils.get_small_model best.resnet20.pth.tar --round_to 8 --export torch

Writes small.<arch>.pth.tar beside the checkpoint or into --save_path; `models.load` gives the network of it.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import data
import models
from utils.base.arguments import COUNT, OneLineParser
from utils.base.errors import UserError, run_main
from utils.small.cut import make_small
from utils.small.output import COMPARED, check_export, export, small_table, write_small
from utils.train.device import flush_denormals
from utils.train.run_folder import check_writable
from utils.train.setup import evaluation_batch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", help="a checkpoint with zeroed filters, or a small network's file")
    add("--save_path", help="folder for what is written (the checkpoint's), or a file that ends in .pth.tar or .pth")
    add("--arch", help="the network, for files that do not name it")
    add("--data", help="data path: compares the predictions for all its test images and prints the accuracy")
    add("--dataset", choices=[*data.DATASETS, "imagenet"], help="of --data (the checkpoint's, or cifar10)")
    add("--round_to", type=COUNT, default=1, help="fill channels up to a multiple of this (1)")
    add("--export", choices=("torch", "onnx"), help="also write a torch.export or ONNX program, for any batch size")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    flush_denormals()
    source = Path(args.checkpoint)
    folder, name = Path(args.save_path or source.parent), None
    if folder.name.endswith((".pth", ".pth.tar")) and not folder.is_dir():
        folder, name = folder.parent, folder.name
    check_writable(folder)
    check_export(args.export)
    net, checkpoint = models.load_with_checkpoint(source, args.arch)
    arch, shape = checkpoint["arch"], tuple(checkpoint["input_shape"])
    path = folder / (name or f"small.{arch}.pth.tar")
    if path.exists() and path.samefile(source):
        raise UserError(f"'{path}' would be replaced by what is made of it; choose another --save_path")
    test, images = None, None
    if args.data:
        loaded = load_images(args.dataset or checkpoint.get("dataset", "cifar10"), args.data, shape[1])
        if checkpoint.get("normalisation"):
            loaded.normalise_as(**checkpoint["normalisation"])
        test = loaded.test
        images = data.first_images(test, COMPARED)
    small, report = make_small(net, torch.zeros(1, *shape), images, round_to=args.round_to)
    _, facts = write_small(net, small, report, arch, shape, folder, checkpoint=checkpoint, name=path.name)
    print(small_table(arch, facts, report))
    print(f"written: {path}")
    if args.export:
        print(f"written: {export(small, torch.zeros(2, *shape), path, args.export)}")
    if test is not None:
        print(compare_predictions(net, small, test))
    return path


def load_images(dataset: str, path: str, size: int) -> data.Data:
    """A data set; `size` is the height and width that images of free size are scaled to."""
    if dataset == "imagenet":
        return data.load_imagenet(path, size=size)
    return data.load(dataset, path, size=size if dataset == "folder" else None, download=False)


@torch.no_grad()
def compare_predictions(net: nn.Module, small: nn.Module, test: data.ImageArrays | data.ImageFiles) -> str:
    """Accuracy of both and how many predictions agree, over a whole test set, in one line."""
    n = same = before = after = 0
    for images, labels in data.DataLoader(test, evaluation_batch(test)):
        images = test.normalise(images)
        of_net, of_small = net(images).argmax(1), small(images).argmax(1)
        same += int((of_net == of_small).sum())
        before += int((of_net == labels).sum())
        after += int((of_small == labels).sum())
        n += len(labels)
    accuracy = f"accuracy {100 * before / n:.2f} % before, {100 * after / n:.2f} % after"
    return f"{n} test images: {same} predictions agree; {accuracy}"


if __name__ == "__main__":
    run_main(main)
