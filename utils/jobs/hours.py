"""How long a row of a table takes: from finished runs of its kind on a machine like this one, or from a calibration of some seconds."""

from __future__ import annotations

import csv
import itertools
import os
import re
import statistics
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import models
from data.sources import SYNTHETIC_SIZES, find_tree
from utils.compare.own_runs import FULL_SIZES, Damaged, read_run, show_path
from utils.jobs.table_plan import METHODS, Row
from utils.small.counts import papers_cut
from utils.train.device import choose_device, describe_machine
from utils.train.distillation import Distillation
from utils.train.engine import train_epoch
from utils.train.experiment import build_optimizer
from utils.train.objective import cross_entropy

CALIBRATION_SECONDS = 1.5
# Testing an image is a forward pass, training it a forward and a backward pass of about twice its cost.
TEST_COST = 1 / 3


@dataclass(frozen=True)
class Speed:
    """Training images per second, and how that is known."""

    images_per_s: float
    source: str


def count_images(args: Namespace) -> tuple[int, int]:
    """Training and test images of the settings' data set; files are counted, not read."""
    if args.dataset == "synthetic":
        return SYNTHETIC_SIZES["train"], SYNTHETIC_SIZES["test"]
    tree = find_tree(args.dataset, Path(args.data_path))
    if tree is None:
        return FULL_SIZES.get(args.dataset, FULL_SIZES["cifar10"])
    train, test = (sum(len(files) for _, _, files in os.walk(folder)) for folder in tree)
    return train, test


def seconds_per_epoch(speed: Speed, images: tuple[int, int]) -> float:
    return (images[0] + TEST_COST * images[1]) / speed.images_per_s


def kind_of(row: Row) -> tuple:
    """Rows of equal kind train at one speed."""
    args = row.settings()
    return args.student, args.arch if args.teacher else None, args.HTrate < 1


def cost_share(row: Row) -> float:
    """About what share of the multiply-adds a row's rate leaves: the papers' formula, or where it has none the share of every layer."""
    cifar_resnet = re.fullmatch(r"resnet(\d+)", row.arch)
    return 1 - papers_cut(int(cifar_resnet[1]), row.HTrate) if cifar_resnet else row.HTrate**2


class Speeds:
    """Speed of every kind of row, looked for once.

    Args:
        folders: where finished runs are looked for.
        threads: CPU threads of a row.
    """

    def __init__(self, folders: Iterable[Path], threads: int):
        self.folders, self.threads = list(folders), threads
        self.found: dict[tuple, Speed] | None = None

    def of(self, row: Row) -> Speed:
        if self.found is None:
            self.look(row)
        kind = kind_of(row)
        if kind not in self.found:
            self.found[kind] = calibrate(row, self.threads)
        speed = self.found[kind]
        if METHODS[row.method].small:
            # The full network's speed by the share of its multiply-adds that is left.
            return Speed(speed.images_per_s / cost_share(row), speed.source)
        return speed

    def look(self, row: Row) -> None:
        """Takes the speeds of runs that have finished by now over those known so far."""
        measured = measured_speeds(self.folders, choose_device(row.settings().ngpu), self.threads)
        self.found = {**(self.found or {}), **measured}


def measured_speeds(folders: list[Path], device: torch.device, threads: int) -> dict[tuple, Speed]:
    """{kind of row: speed} of runs on a machine like this one, with as many threads: the median over epochs of the fastest run.

    The fastest, as slower ones shared the machine with something else.
    """
    machine = {**describe_machine(device), "threads": threads}
    here = {name: machine[name] for name in ("device", "gpu", "cpu_cores", "threads")}
    found: dict[tuple, Speed] = {}
    for file in itertools.chain(*(folder.rglob("results.json") for folder in folders if folder.is_dir())):
        try:
            results = read_run(file).results
            if {name: results["machine"][name] for name in here} != here or results["settings"].get("widths_of"):
                continue
            with open(file.with_name("metrics.csv"), newline="") as metrics:
                per_s = [float(row["images_per_s"]) for row in csv.DictReader(metrics)]
            teacher = results.get("teacher", {}).get("arch")
            kind = results["arch"], teacher, results["HTrate"] < 1
            speed = Speed(statistics.median(per_s), f"measured in {show_path(file.parent)}")
            found[kind] = max(found.get(kind, speed), speed, key=lambda one: one.images_per_s)
        except (Damaged, OSError, ValueError, KeyError, TypeError, AttributeError, statistics.StatisticsError):
            continue
    return found


def calibrate(row: Row, threads: int) -> Speed:
    """Trains the row's network, with untrained weights, on random images for a moment."""
    args = row.settings()
    device = choose_device(args.ngpu)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        net, teacher = models.build(args.student), models.build(args.arch) if args.teacher else None
        net.to(device, memory_format=torch.channels_last)
        images = torch.randn(args.batch_size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        objective = cross_entropy
        if teacher is not None:
            teacher.to(device, memory_format=torch.channels_last)
            objective = Distillation(teacher, net, images[:2], on=args.kd_on, loss=args.loss)
        optimizer = build_optimizer(net, getattr(objective, "adapters", None), args)
        labels = torch.arange(args.batch_size, device=device) % 10
        times: list[float] = []

        def note(t: int, size: int, means: object) -> None:
            times.append(time.perf_counter())

        for seconds in (0, CALIBRATION_SECONDS):
            times.clear()
            batches = Repeated(images, labels, seconds)
            result = train_epoch(net, batches, objective, optimizer, device, epoch=0, on_step=note)
        # On a CPU, where a step has ended when it returns, the fastest: other processes disturb the rest.
        steps = [end - begin for begin, end in itertools.pairwise(times)]
        per_s = args.batch_size / min(steps) if device.type == "cpu" else result.images_per_s
        return Speed(per_s, f"calibrated for {CALIBRATION_SECONDS:g} s on random images")
    finally:
        torch.set_num_threads(before)


class Repeated:
    """A loader that gives one mini-batch again and again, at least four times, until the seconds are over."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, seconds: float):
        self.batch, self.seconds = (images, labels), seconds

    def sizes(self, epoch: int) -> list[int]:
        return [len(self.batch[0])] * 1_000_000

    def __iter__(self):
        end, given = time.monotonic() + self.seconds, 0
        while given < 4 or time.monotonic() < end:
            given += 1
            yield self.batch
