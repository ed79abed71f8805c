"""Images per second of the loader alone: workers that hand over uint8, beside workers that normalise to float32.

    python -m utils.bench.loader FOLDER                          # an image tree train/<class>/*, val/<class>/*
    python -m utils.bench.loader FOLDER --sizes 64 224 --workers 2 --out results/bench_loader/loader.csv

`files` are decoded when they are needed (data.ImageFiles), `memory` is data.ImageArrays. The variants take turns.
"float32" is what the loader did before mini-batches were uint8. "uint8, then normalised" includes the normalisation,
here by this process's CPU.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset

import data
from utils.base.errors import run_main

VARIANTS = ("float32", "uint8", "uint8, then normalised")


class NormalisedByWorkers(Dataset):
    """A data set whose mini-batches leave the workers as float32."""

    returns_batches = True

    def __init__(self, images: data.ImageFiles | data.ImageArrays):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices):
        images, labels = self.images.__getitems__(indices)
        return self.images.normalise(images), labels


def images_per_second(loader: data.DataLoader, normalise, batches: int) -> float:
    """Over `batches` mini-batches after the first, which waits for the workers to start."""
    count = 0
    for t, (images, _) in enumerate(loader):
        if t == 0:
            begin = time.perf_counter()
            continue
        count += len(normalise(images))
        if t == batches:
            break
    return count / (time.perf_counter() - begin)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="image tree train/<class>/*, val/<class>/*")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 224], help="height and width (64 224)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    parser.add_argument("--batch_size", type=int, default=128, help="images a mini-batch (128)")
    parser.add_argument("--batches", type=int, default=12, help="mini-batches a round (12)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for size in args.sizes:
        for kind in ("files", "memory"):
            loaded = (
                data.load_imagenet(args.folder, size=size)
                if kind == "files"
                else data.load("folder", args.folder, size=size)
            )
            speeds = {variant: [] for variant in VARIANTS}
            for _ in range(args.repeats):
                for variant, own in speeds.items():
                    images = NormalisedByWorkers(loaded.train) if variant == "float32" else loaded.train
                    loader = data.DataLoader(images, args.batch_size, shuffle=True, seed=1, num_workers=args.workers)
                    normalise = loaded.train.normalise if variant == VARIANTS[2] else lambda images: images
                    own.append(images_per_second(loader, normalise, args.batches))
            base = statistics.median(speeds["float32"])
            for variant, own in speeds.items():
                facts = dict(images=kind, size=size, workers=args.workers, handed_over=variant)
                middle = statistics.median(own)
                figures = dict(median=round(middle), slowest=round(min(own)), fastest=round(max(own)))
                rows.append(facts | figures | {"times_float32": f"{middle / base:.2f}"})
                print(*rows[-1].values(), sep="\t", flush=True)
    with open(args.out, "w", newline="") if args.out else sys.stdout as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    run_main(main)
