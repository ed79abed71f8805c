"""A small network's file, the table of what was kept and saved, and its export without this project's code."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

import models
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.base.files import replace_file
from utils.small.counts import count
from utils.small.cut import Report

# Entries of a checkpoint that the small network's file takes over.
INHERITED = ("library", "dataset", "normalisation")
# Images of the test set on which the small network is compared with the network that it was made from.
COMPARED = 500


def write_small(
    net: nn.Module,
    small: nn.Module,
    report: Report,
    arch: str,
    shape: tuple[int, ...],
    folder: Path,
    *,
    checkpoint: dict,
    name: str | None = None,
) -> tuple[Path, dict]:
    """Writes the file of a small network, which models.load reads.

    Args:
        net, small, report: given to and by make_small; `net` is one of models.build or models.load.
        shape: (C, H, W) of an image.
        checkpoint: of `net`. Kept filters are numbered as in the unpruned network, also where `net` is a small one.
        name: of the file (small.<arch>.pth.tar).

    Returns:
        (the file; for results.json: counts before and after, bytes of the file, widths, what was compared).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name or f"small.{arch}.pth.tar")
    kept = renumber(report.kept, checkpoint.get("kept", {}))
    entries = {key: checkpoint[key] for key in INHERITED if key in checkpoint}
    if "state_dict" in checkpoint and models.is_torchvisions(checkpoint, arch):
        entries["library"] = "torchvision"
    facts = {"small": True, "arch": arch, "num_classes": net.num_classes, "input_shape": list(shape), "kept": kept}
    checkpoints.write({**facts, "pads": report.pads, **entries, "state_dict": small.state_dict()}, path)
    example = torch.zeros(1, *shape)
    return path, {
        "file": path.name,
        "file_bytes": path.stat().st_size,
        "before": count(net, example)._asdict(),
        "after": count(small, example)._asdict(),
        "widths": {name: len(at) for name, at in kept.items()},
        "largest_logit_difference": report.difference,
        "images_compared": report.images,
        "kept_whole": report.kept_whole,
    }


def renumber(kept: dict[str, list[int]], first: dict[str, list[int]]) -> dict[str, list[int]]:
    """{layer: indices} of a network's filters, by their numbers in the network that it was cut from (`first`)."""
    return {name: [first[name][i] for i in at] if name in first else at for name, at in kept.items()}


def small_table(arch: str, facts: dict, report: Report) -> str:
    """Filters kept per layer, costs before and after, layers kept whole; `facts` are those of write_small."""
    width = max(map(len, [*report.kept, "multiply-adds"]))
    lines = [f"{arch}", f"{'layer':{width}}  filters  kept"]
    lines += [f"{name:{width}}  {report.filters[name]:7d}  {len(kept):4d}" for name, kept in report.kept.items()]
    lines += ["", f"{'one image':{width}}  {'before':>14}  {'after':>14}  change"]
    for name, a in facts["before"].items():
        b = facts["after"][name]
        lines.append(f"{name.replace('_', '-'):{width}}  {a:14,}  {b:14,}  {100 * (b / a - 1):+5.1f} %")
    equality = f"logits differ by at most {report.difference:.1e} on {report.images} images"
    if all(len(kept) == report.filters[name] for name, kept in report.kept.items()):
        equality = "nothing was left to cut out"
    lines.append(f"file {facts['file_bytes']:,} B; {equality}")
    if report.merged:
        lines.append(f"{report.merged} constant channels, not zero, moved into a bias or one constant channel")
    lines += [f"kept whole: {layer}: {reason}" for layer, reason in report.kept_whole.items()]
    return "\n".join(lines)


def check_export(kind: str | None) -> None:
    """Raises UserError when a package that the export needs is not installed."""
    missing = [n for n in ("onnx", "onnxscript") if kind == "onnx" and importlib.util.find_spec(n) is None]
    if missing:
        raise UserError(f"--export onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def export(small: nn.Module, example: Tensor, path: Path, kind: str) -> Path:
    """Writes the network as a program that needs none of this project's code, for any batch size.

    Args:
        example: images (2, C, H, W).
        path: of the small network's file; the program is written beside it, as .pt2 (torch.export) or .onnx.
        kind: "torch" or "onnx".
    """
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(small, (example,), dynamic_shapes=batch)
    # torch writes both kinds by itself, therefore to a temporary file first.
    stem, end = path.name.removesuffix(".tar").removesuffix(".pth"), "pt2" if kind == "torch" else "onnx"
    target, temporary = path.with_name(f"{stem}.{end}"), path.with_name(f".tmp.{stem}.{end}")
    try:
        if kind == "torch":
            torch.export.save(program, temporary)
        else:
            torch.onnx.export(program, f=temporary, external_data=False, verbose=False)
        replace_file(target, temporary.read_bytes())
    finally:
        temporary.unlink(missing_ok=True)
    return target
