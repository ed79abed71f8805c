"""Own results beside the published ones."""

from __future__ import annotations

import csv
from pathlib import Path

from utils.recipes import RECIPES

# Training and test images that the published figures stand on.
FULL_SIZES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)}
PUBLISHED = Path(__file__).resolve().parent.parent / "results" / "published.csv"


def published_rows(dataset: str, arch: str, prune_rate: float) -> list[dict[str, str]]:
    """Rows of results/published.csv for one network and one share of removed filters, trained from scratch."""
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(line for line in file if not line.startswith("#")) if row["acc"]]
    return [
        row
        for row in rows
        if row["dataset"] == dataset
        and row["arch"] == arch
        and row["init"] == "scratch"
        and row["pruned"]
        and abs(float(row["pruned"]) - 100 * prune_rate) < 1e-6
    ]


def comparison_line(results: dict) -> str:
    """One line: a run's last-epoch accuracy beside the published figures, or why there is nothing to compare with.

    Args:
        results: the content of a run's results.json.
    """
    if results["synthetic_data"]:
        return "comparison with the papers: none, the data is SYNTHETIC"
    if results["recipe"] == "finetune":
        return "comparison with the papers: none, the published rows compared here are trained from scratch and this run is not"
    rows = published_rows(results["dataset"], results["arch"], results["prune_rate"])
    what = f"{results['arch']} on {results['dataset']} with {100 * results['prune_rate']:g} % of the filters removed"
    if not rows:
        return f"comparison with the papers: none, no published row for {what}"
    published = "; ".join(
        f"{row['method']} {row['acc']}{' +- ' + row['acc_std'] if row['acc_std'] else ''} ({row['source']}"
        f"{', ' + row['doubt'] if row['doubt'] else ''})"
        for row in rows
    )
    own = f"this run {results['last_epoch_accuracy']:.2f} (last epoch)"
    full = RECIPES[results["recipe"]]["epochs"]
    if results["epochs_run_here"] < full:
        own += f", NOT COMPARABLE: {results['epochs_run_here']} epochs instead of {full}"
    elif (results["train_images"], results["test_images"]) != FULL_SIZES.get(results["dataset"]):
        own += f", NOT COMPARABLE: {results['train_images']} training and {results['test_images']} test images"
    return f"comparison with the papers, {what}: {own}; published, top-1 %: {published}"
