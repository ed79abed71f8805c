"""From a pruned checkpoint to its small network: `python -m utils.get_small_model CHECKPOINT`.

    python -m utils.get_small_model runs/.../checkpoint.resnet20.pth.tar
    python -m utils.get_small_model best.resnet20.pth.tar --data DATA      # and its accuracy, beside that of the pruned network
    python -m utils.get_small_model best.resnet20.pth.tar --round_to 8 --export torch

Writes small.<arch>.pth.tar beside the checkpoint or into --save_path; `models.load` gives the network of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import data
import models
from models.small import pack
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError, run_main
from utils.base.files import replace_file
from utils.small.counts import Counts, count
from utils.small.cut import Report, make_small
from utils.train.device import flush_denormals
from utils.train.options import OneLineParser
from utils.train.options import count as whole_number
from utils.train.run_folder import check_writable

EVALUATION_BATCH = 500
# Real images on which masked and small network are compared, where there is data.
COMPARED = 500


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="a checkpoint with zeroed filters, or a small network's file")
    parser.add_argument("--save_path", help="folder for what is written (default: the checkpoint's)")
    parser.add_argument("--arch", help="the network, for files that do not name it")
    parser.add_argument("--data", help="data path: compares on its test images, all of them, and prints the accuracy")
    parser.add_argument(
        "--dataset", choices=[*data.DATASETS, "imagenet"], help="of --data (default: the checkpoint's, or cifar10)"
    )
    parser.add_argument(
        "--round_to", type=whole_number, default=1, help="fill channels up to a multiple of this (default 1)"
    )
    parser.add_argument(
        "--export", choices=("torch", "onnx"), help="also write it as a torch.export or ONNX program, any batch size"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    flush_denormals()
    folder = Path(args.save_path) if args.save_path else Path(args.checkpoint).parent
    check_writable(folder)
    if args.export:
        check_export(args.export)
    checkpoint = checkpoints.read(args.checkpoint)
    arch, net = models.load_with_name(args.checkpoint, args.arch)
    shape = tuple(checkpoint.get("input_shape", models.input_shape(arch, checkpoint)))
    test, images = None, None
    if args.data:
        test = load_test_images(args.dataset or checkpoint.get("dataset", "cifar10"), args.data, shape[1])
        images = data.first_images(test, COMPARED)
    small, report = make_small(net, torch.zeros(1, *shape), images, round_to=args.round_to)
    path, facts = write_small(
        net, small, report, arch, shape, folder, checkpoint=checkpoint, overwrites=Path(args.checkpoint)
    )
    print(table(arch, facts, report))
    if test is not None:
        print(compare_predictions(net, small, test))
    print(f"written: {path}")
    if args.export:
        print(f"written: {export(small, torch.zeros(2, *shape), path, args.export)}")
    return path


def load_test_images(dataset: str, path: str, size: int):
    """The test images of a data set; `size` is the height and width that ImageNet's are scaled to."""
    if dataset == "imagenet":
        return data.load_imagenet(path, size=size).test
    return data.load(dataset, path, download=False).test


def write_small(
    net: nn.Module,
    small: nn.Module,
    report: Report,
    arch: str,
    shape: tuple[int, ...],
    folder: Path,
    *,
    checkpoint: dict,
    overwrites: Path | None = None,
) -> tuple[Path, dict]:
    """Writes small.<arch>.pth.tar into `folder`.

    Args:
        net, small, report: given to and by make_small.
        checkpoint: of `net`; where it is a small network itself, the kept filters are numbered as in the first, full network.
        overwrites: the file that `net` came from, which is not replaced.

    Returns:
        (the path; for results.json: counts before and after, bytes of the file).
    """
    path = folder / f"small.{arch}.pth.tar"
    if overwrites is not None and path.exists() and path.samefile(overwrites):
        raise UserError(f"'{path}' would be replaced by what is made of it; choose another --save_path")
    folder.mkdir(parents=True, exist_ok=True)
    first = checkpoint.get("kept", {})
    kept = {name: [first[name][i] for i in at] if name in first else at for name, at in report.kept.items()}
    known = {key: checkpoint[key] for key in ("library", "dataset") if key in checkpoint}
    if "state_dict" in checkpoint and models.is_torchvisions(checkpoint, arch):
        known["library"] = "torchvision"
    classes = output_width(small, shape)
    checkpoints.write(pack(small, arch, classes, shape, kept, pads=report.pads, **known), path)
    example = torch.zeros(1, *shape)
    before, after = count(net, example), count(small, example)
    return path, {
        "file": path.name,
        "file_bytes": path.stat().st_size,
        "before": before.as_dict(),
        "after": after.as_dict(),
        "widths": {name: len(at) for name, at in kept.items()},
        "largest_logit_difference": report.difference,
        "images_compared": report.images,
        "kept_whole": report.kept_whole,
    }


@torch.no_grad()
def output_width(net: nn.Module, shape: tuple[int, ...]) -> int:
    return net(torch.zeros(1, *shape)).shape[1]


def table(arch: str, facts: dict, report: Report) -> str:
    """Layers with fewer filters, the costs before and after, and what was kept whole."""
    width = max(map(len, report.kept))
    lines = [f"{arch}", f"{'layer':{width}}  filters  kept"]
    lines += [f"{name:{width}}  {report.filters[name]:7d}  {len(kept):4d}" for name, kept in report.kept.items()]
    before, after = (Counts(layers={}, **facts[when]) for when in ("before", "after"))
    rows = (
        ("parameters", before.parameters, after.parameters),
        ("multiply-adds", before.multiply_adds, after.multiply_adds),
        ("peak activations", before.peak_activation_bytes, after.peak_activation_bytes),
    )
    lines += ["", f"{'one image':{width}}  {'before':>14}  {'after':>14}  change"]
    for name, a, b in rows:
        unit = " B" if name == "peak activations" else ""
        lines.append(f"{name:{width}}  {f'{a:,}{unit}':>14}  {f'{b:,}{unit}':>14}  {100 * (b / a - 1):+5.1f} %")
    lines.append(
        f"file {facts['file_bytes']:,} B; logits differ by at most {report.difference:.1e} on {report.images} images"
    )
    if report.merged:
        lines.append(
            f"{report.merged} channels were constant but not zero: their effect moved into a bias or one constant channel"
        )
    lines += [f"kept whole: {layer}: {reason}" for layer, reason in report.kept_whole.items()]
    return "\n".join(lines)


@torch.no_grad()
def compare_predictions(net: nn.Module, small: nn.Module, test: data.ImageArrays | data.ImageFiles) -> str:
    """Accuracy of both and how many predictions agree, over a whole test set, in one line."""
    n, same, hits = 0, 0, [0, 0]
    for images, labels in data.DataLoader(test, EVALUATION_BATCH):
        before, after = net(images).argmax(1), small(images).argmax(1)
        same += int((before == after).sum())
        hits = [hits[0] + int((before == labels).sum()), hits[1] + int((after == labels).sum())]
        n += len(labels)
    return f"{n} test images: {same} predictions agree; accuracy {100 * hits[0] / n:.2f} % before, {100 * hits[1] / n:.2f} % after"


def check_export(kind: str) -> None:
    """Raises UserError when a package that the export needs is not installed."""
    missing = [n for n in ("onnx", "onnxscript") if kind == "onnx" and importlib.util.find_spec(n) is None]
    if missing:
        raise UserError(f"--export onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def export(small: nn.Module, example: Tensor, path: Path, kind: str) -> Path:
    """Writes the network as a program that needs none of this project's code, for any batch size.

    Args:
        example: images (2, C, H, W).
        path: of the small network's file; the program goes beside it, as .pt2 (torch.export) or .onnx.
    """
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(small, (example,), dynamic_shapes=batch)
    # torch writes both kinds by itself, so they go to a temporary file first.
    target = path.with_name(path.name.removesuffix(".pth.tar") + (".pt2" if kind == "torch" else ".onnx"))
    temporary = target.with_name(f".tmp.{target.name}")
    if kind == "torch":
        torch.export.save(program, temporary)
    else:
        torch.onnx.export(program, f=temporary, external_data=False, verbose=False)
    replace_file(target, temporary.read_bytes())
    temporary.unlink()
    return target


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
