"""Test accuracy of short runs of both training loops, over seeds: the part of utils.bench.training behind --accuracy.

Results accumulate in one file, so that the runs may be spread over several calls; a run that is there already is not repeated.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path

import torch

from utils.base.checkpoint import replace_file
from utils.bench.loops import LoopProcess, Setup
from utils.compare.statistics import half_width_of_difference
from utils.train.device import describe_machine
from utils.train.recipes import learning_rate_at

# Learning rate of a run of three epochs, as a share of the way of the papers' 200: 0.01, 0.1, 0.02.
LEARNING_RATE = dict(base=0.01, milestones=[1, 2], gammas=[10, 0.2])


def run_accuracy(setups: list[Setup], epochs: int, path: Path | None) -> list[dict]:
    """Trains and tests every setup that `path` (a JSON file) does not hold yet; returns all rows.

    Each row: {"setup", "epochs", "test_accuracy", "test_loss", "train_loss", "seconds"}.
    """
    rows = json.loads(path.read_text())["runs"] if path is not None and path.exists() else []
    for setup in setups:
        wanted = {"setup": asdict(setup), "epochs": epochs}
        if any(wanted == {name: row[name] for name in wanted} for row in rows):
            continue
        with LoopProcess(setup) as loop:
            seconds = 0.0
            for epoch in range(epochs):
                loop.call("set_learning_rate", learning_rate_at(epoch, *LEARNING_RATE.values()))
                trained = loop.call("train")
                seconds += trained["seconds"]
            tested = loop.call("test")
        row = wanted | {
            "test_accuracy": tested["accuracy"],
            "test_loss": tested["loss"],
            "train_loss": trained["loss"],
            "seconds": seconds,
        }
        rows.append(row)
        print(
            f"{setup.label}, seed {setup.seed}: test accuracy {tested['accuracy']:.2f} %, loss {tested['loss']:.4f}",
            flush=True,
        )
        if path is not None:
            facts = {"learning_rate": LEARNING_RATE, "machine": describe_machine_of(setup), "runs": rows}
            replace_file(path, json.dumps(facts, indent=1).encode())
    return rows


def describe_machine_of(setup: Setup) -> dict:
    return describe_machine(torch.device(setup.device)) | {"threads": setup.threads, "torch": str(torch.__version__)}


def accuracy_table(rows: list[dict], command: str) -> str:
    """Mean and sample standard deviation over seeds of every loop, as Markdown, and the difference of the first two with Welch's interval.

    Args:
        command: of the last call; the rows may come from several.
    """
    one = rows[0]["setup"]
    lines = [
        f"Runs add up over calls; the last one was `{command}`; {one['arch']} on {one['images']} training images of {one['dataset']}, {rows[0]['epochs']} epochs, mini-batch "
        f"{one['batch_size']} to {one['k']}, HTrate 0.7, v 0.1, learning rate 0.01, 0.1, 0.02; {one['threads']} CPU thread(s).",
        "",
        "| loop | seeds | test accuracy, % | mean | standard deviation | test loss: mean | standard deviation |",
        "|---|---|---|---|---|---|---|",
    ]
    of_loop: dict[str, list[float]] = {}
    for label in dict.fromkeys(Setup(**row["setup"]).label for row in rows):
        own = [row for row in rows if Setup(**row["setup"]).label == label]
        own.sort(key=lambda row: row["setup"]["seed"])
        accuracies, losses = ([row[name] for row in own] for name in ("test_accuracy", "test_loss"))
        of_loop[label] = accuracies
        spread = [f"{statistics.stdev(values):.3f}" if len(own) > 1 else "-" for values in (accuracies, losses)]
        lines.append(
            f"| {label} | {' '.join(str(row['setup']['seed']) for row in own)} | {' '.join(f'{a:.2f}' for a in accuracies)} "
            f"| {statistics.mean(accuracies):.2f} | {spread[0]} | {statistics.mean(losses):.4f} | {spread[1]} |"
        )
    (a, first), (b, second) = list(of_loop.items())[:2] if len(of_loop) > 1 else ((None, []), (None, []))
    if min(len(first), len(second)) > 1:
        difference, half = statistics.mean(first) - statistics.mean(second), half_width_of_difference(first, second)
        interval = f"95 % interval {difference - half:.1f} to {difference + half:.1f}"
        lines += ["", f"{a} less {b}: {difference:+.1f} points, {interval} (Welch)."]
    return "\n".join(lines) + "\n"
