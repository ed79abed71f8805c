"""Published accuracies: results/published.csv, read and checked."""

from __future__ import annotations

import csv
import math
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

from utils.base.errors import UserError

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published.csv"
INITS = ("scratch", "pretrained")


@dataclass(frozen=True)
class Published:
    """A row of published.csv; accuracies and shares in %, None where the source has none.

    Attributes:
        pruned: share of the filters removed per layer.
        init: scratch, trained and pruned from random weights; pretrained, started from a trained network.
        acc, acc_std: top-1 and its standard deviation over runs.
        macs_cut: multiply-adds removed, counted as the source counts.
        doubt: why the figure needs care.
    """

    dataset: str
    arch: str
    method: str
    pruned: float | None
    init: str
    baseline_acc: float | None
    baseline_std: float | None
    acc: float
    acc_std: float | None
    macs_cut: float | None
    source: str
    doubt: str

    @property
    def change(self) -> float | None:
        """Accuracy less that of the source's own baseline, computed: printed drops carry slips."""
        return None if self.baseline_acc is None else self.acc - self.baseline_acc


NUMBERS = ("pruned", "baseline_acc", "baseline_std", "acc", "acc_std", "macs_cut")


def read_published(path: Path = PUBLISHED) -> list[Published]:
    """Every row, in the file's order. Lines that begin with # are comments.

    Raises:
        UserError: a line that is not well-formed, by its number.
    """
    names = [field.name for field in fields(Published)]
    rows: list[Published] = []
    with open(path, encoding="utf-8", newline="") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if not line.startswith("#")]
    for (number, _), cells in zip(lines, csv.reader(line for _, line in lines), strict=True):
        if number == lines[0][0]:
            if cells != names:
                raise UserError(f"'{path}' line {number}: the columns must be {','.join(names)}")
            continue
        if len(cells) != len(names):
            raise UserError(f"'{path}' line {number}: {len(cells)} cells instead of {len(names)}")
        row = dict(zip(names, (cell.strip() for cell in cells), strict=True))
        parsed = Published(**{**row, **{name: _number(row, name, path, number) for name in NUMBERS}})
        if parsed.acc is None or not (parsed.dataset and parsed.arch and parsed.method and parsed.source):
            raise UserError(f"'{path}' line {number}: dataset, arch, method, acc and source must be there")
        if parsed.init not in INITS:
            raise UserError(f"'{path}' line {number}: init must be {' or '.join(INITS)}, got '{parsed.init}'")
        if parsed in rows:
            raise UserError(f"'{path}' line {number}: the row is there already")
        rows.append(parsed)
    return rows


def _number(row: dict[str, str], name: str, path: Path, line: int) -> float | None:
    """A cell in %, None for an empty one."""
    if not row[name]:
        return None
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise UserError(f"'{path}' line {line}: {name} must be a number in 0..100, got '{row[name]}'")
    return value


def published_rows(dataset: str, arch: str, prune_rate: float, init: str = "scratch") -> list[Published]:
    """Rows for one network and one share of removed filters (0..1)."""
    return [
        row
        for row in read_published()
        if (row.dataset, row.arch, row.init) == (dataset, arch, init)
        and row.pruned is not None
        and abs(row.pruned - 100 * prune_rate) < 1e-6
    ]


def published_baseline(rows: list[Published], dataset: str, arch: str) -> tuple[float, str] | None:
    """The unpruned accuracy that most published pruned networks of this kind are measured against, and its source.

    Where no row names one, the first published unpruned network; None where there is neither.
    """
    own = [row for row in rows if (row.dataset, row.arch) == (dataset, arch)]
    named = Counter(row.baseline_acc for row in own if row.baseline_acc is not None)
    if named:
        acc = named.most_common(1)[0][0]
        return acc, next(row.source for row in own if row.baseline_acc == acc)
    return next(((row.acc, row.source) for row in own if row.method == "baseline"), None)
