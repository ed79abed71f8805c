"""What a run reports: its settings in the log, results.json, curves.png and the small network."""

import base64
import copy
import io
import json
import shlex
import time
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from utils.base.errors import UserError
from utils.base.files import replace_file
from utils.small.cut import make_small
from utils.small.filters import format_plan
from utils.small.output import COMPARED, small_table, write_small
from utils.train.device import describe_machine, describe_versions
from utils.train.distributed import is_first, launcher, local_world_size, world_size
from utils.train.engine import PassResult

TIME_FORMAT = "%Y-%m-%d-%H:%M:%S"


def log_settings(trainer) -> None:
    """Everything that decides the result, before the first epoch."""
    args, images, log = trainer.args, trainer.images, trainer.run.log
    log("settings: " + ", ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))
    log(
        f"data: {images.source}, {len(images.train)} training and {len(images.test)} test images, "
        f"{len(images.classes)} classes"
    )
    threads, optimizer = torch.get_num_threads(), type(trainer.optimizer).__name__
    log(f"device: {trainer.device}, {threads} CPU threads; optimizer: {optimizer}")
    log(str(trainer.acceleration))
    if world_size() > 1:
        backend = torch.distributed.get_backend()
        log(
            f"processes: {world_size()}, {local_world_size()} on this machine, {backend}; sizes of mini-batches are "
            f"over all of them; BatchNorm's statistics are over {'all' if args.sync_bn else 'the share of each'}"
        )
    for name, value in trainer.facts.get("teacher", {}).items():
        log(f"teacher {name}: {value}")
    sizes = trainer.train_loader.sizes(0)
    runs = [(size, len(list(same))) for size, same in groupby(sizes)]
    parts = [f"{size} x{n}" if n > 1 else f"{size}" for size, n in runs]
    parts = parts if len(parts) <= 12 else [*parts[:4], "...", *parts[-4:]]
    log(f"schedule: {len(sizes)} mini-batches in the first epoch: {', '.join(parts)} ({sum(sizes)} images)")
    if trainer.pruning is not None:
        log(trainer.pruning.plan_text())
    else:
        log(f"keeping HTrate={args.HTrate:g} of the filters, that is prune_rate={args.prune_rate:g} removed")
        log(format_plan(trainer.convolutions))
    for note in trainer.start.notes:
        log(note)
    late = [m for m in args.schedule if m >= args.epochs] if args.lr_schedule == "steps" else []
    if late:
        log(
            f"note: the run ends before the learning-rate milestones {' '.join(map(str, late))}; "
            "--fit_schedule scales a recipe's milestones to --epochs"
        )
    if trainer.epochs_done >= args.epochs:
        log(
            f"nothing left to do: {args.resume} has {trainer.epochs_done} of {args.epochs} epochs; "
            "a larger --epochs continues the training"
        )


def step_line(epoch: int, position: str, size: int, now: PassResult) -> str:
    """The release's line within an epoch: number and size of the mini-batch, means of the epoch so far."""
    return (
        f"  Epoch: [{epoch:03d}][{position}]   Batch {size}   Time {now.seconds:.1f}   Loss {now.loss:.4f}   "
        f"Prec@1 {now.top1:.3f}   Prec@5 {now.top5:.3f}   [{time.strftime(TIME_FORMAT)}]"
    )


def write_report(trainer, *, curves: bool) -> dict:
    """Writes results.json and, on demand, curves.png; returns the results."""
    results = results_of(trainer)
    trainer.run.write_results(results)
    if curves and is_first():
        loss = "loss (training: with the teacher's part)" if trainer.args.teacher else "loss"
        draw_curves(trainer.history, title(trainer.arch, trainer.args), trainer.run.path / "curves.png", loss)
    return results


def draw_curves(history: list[dict], title: str, path: Path, loss: str = "loss") -> None:
    """Writes a PNG with top-1 accuracy on the left and loss on the right, training and test.

    Args:
        history: rows of metrics.csv.
        title: above both.
        path: of the PNG.
        loss: what the losses are, in words.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, kind, label in zip(panels, ("acc", "loss"), ("top-1 accuracy (%)", loss), strict=True):
        for split in ("train", "test"):
            values = [row[f"{split}_{kind}"] for row in history]
            marker = "o" if len(epochs) <= 30 else None
            panel.plot(epochs, values, marker=marker, markersize=3, label=f"{split}, last {values[-1]:.2f}")
        panel.set(xlabel="epoch", ylabel=label)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    replace_file(path, picture.getvalue())


def title(arch: str, args) -> str:
    """What the curves are of."""
    cut = f", {100 * args.macs_cut:g} % of the multiply-adds cut" if args.macs_cut else ""
    kept = cut or (f", HTrate {args.HTrate:g}" if args.HTrate < 1 else "")
    return f"{arch} on {args.dataset}: {args.recipe}{kept}, batch {args.batch_size}, seed {args.manualSeed}"


def finished_results(trainer) -> dict | None:
    """The results.json that the finished run has already, None where it or what goes with it is not complete."""
    try:
        results = json.loads((trainer.run.path / "results.json").read_text(encoding="utf-8"))
        complete = results["finished"] is True and results["epochs_done"] == trainer.epochs_done
        complete = complete and "error" not in results.get("small", {}) and (trainer.run.path / "curves.png").is_file()
        return results if complete else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def results_of(trainer) -> dict:
    """The content of results.json."""
    rows, kept = trainer.history, trainer.kept()
    best = max([r for r in rows if r["epoch"] >= trainer.first_counted] or rows, key=lambda row: row["test_acc"])
    filters = []
    for name, shape in trainer.shapes.items():
        indices = kept.get(name, list(range(shape[0])))
        filters.append({"name": name, "shape": shape, "kept": len(indices), "kept_indices": indices})
    return {
        "finished": trainer.epochs_done >= trainer.args.epochs,
        "recipe": trainer.args.recipe,
        "dataset": trainer.args.dataset,
        "data_source": trainer.images.source,
        "synthetic_data": trainer.args.dataset == "synthetic",
        "train_images": len(trainer.images.train),
        "test_images": len(trainer.images.test),
        "arch": trainer.arch,
        "num_classes": len(trainer.images.classes),
        "seed": trainer.args.manualSeed,
        "pieces": trainer.pieces,
        "arithmetic": "; ".join(trainer.arithmetics),
        "epochs_done": trainer.epochs_done,
        "epochs_run_here": len(rows),
        "last_epoch_accuracy": rows[-1]["test_acc"],
        "test_hits": trainer.hits,
        "best_epoch_accuracy": best["test_acc"],
        "best_epoch": best["epoch"],
        "HTrate": trainer.args.HTrate,
        "prune_rate": trainer.args.prune_rate,
        "seconds": sum(row["seconds"] for row in rows),
        "network": trainer.cost,
        "began_cut": bool(trainer.numbering) and any(layer["kept"] < layer["shape"][0] for layer in filters),
        "filters": filters,
        "command": shlex.join([*launcher(), *trainer.command]),
        **trainer.facts,
        "settings": vars(trainer.args),
        "optimizer": type(trainer.optimizer).__name__,
        "machine": describe_machine(trainer.device),
        "versions": describe_versions(),
    }


def pack_hits(hits: Tensor, images: str) -> str:
    """bool (N,) as text for results.json, `images` (their fingerprint) and base64 of the bits."""
    return f"{images}:{base64.b64encode(np.packbits(hits.cpu().numpy())).decode()}"


def unpack_hits(text: str, count: int) -> tuple[str, np.ndarray]:
    """(fingerprint, float64 (count,) of 0 and 1) of a text of pack_hits; ValueError where it does not fit `count`."""
    images, _, bits = text.partition(":")
    bits = np.unpackbits(np.frombuffer(base64.b64decode(bits, validate=True), np.uint8))
    if not count <= len(bits) < count + 8:
        raise ValueError(f"test_hits has {len(bits)} bits for {count} test images")
    return images, bits[:count].astype(np.float64)


def write_small_network(trainer) -> dict:
    """Cuts the zeroed filters out and writes small.<arch>.pth.tar; what results.json records of it."""
    # As many pixels as there are in so many CIFAR images: a large network would be compared for minutes.
    pixels = trainer.example[0, 0].numel()
    images = data.first_images(trainer.images.test, max(16, COMPARED * 32 * 32 // pixels)).cpu().contiguous()
    masked = copy.deepcopy(trainer.net).cpu().eval()
    entries = {"dataset": trainer.args.dataset, "state_dict": masked.state_dict(), **trainer.network_facts}
    entries["kept"] = trainer.present()
    try:
        small, report = make_small(masked, images[:1], images)
        shape = tuple(images.shape[1:])
        path, facts = write_small(masked, small, report, trainer.arch, shape, trainer.run.path, checkpoint=entries)
    except UserError as error:
        # The trained network is safe in its checkpoint; a run that is done does not fail here.
        trainer.run.log(f"no small network was written: {error}")
        return {"error": str(error)}
    facts["before"] = {**facts["before"], **trainer.cost}
    trainer.run.log(f"\nsmall network {path}\n{small_table(trainer.arch, facts, report)}")
    return facts
