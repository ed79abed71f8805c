"""Published accuracies: the rows of results/published.csv."""

import csv
from dataclasses import dataclass
from pathlib import Path

from utils.base.errors import UserError

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published.csv"
NUMBERS = ("pruned", "baseline_acc", "baseline_std", "acc", "acc_std", "macs_cut")


@dataclass(frozen=True)
class Published:
    """A row; accuracies and shares in %, None where the source has none.

    Attributes:
        pruned: share of the filters removed per layer; None where it differs from layer to layer.
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
    def short(self) -> str:
        """Method, accuracy and cut."""
        cut = f" (-{self.macs_cut:g} %)" if self.macs_cut else ""
        return f"{self.method} {self.acc:.2f}{'†' if self.doubt else ''}{cut}"

    def __str__(self) -> str:
        """Method, accuracy, that of the trained network it began with, cut and source; †: the figure needs care."""
        std = f" ± {self.acc_std:.2f}" if self.acc_std is not None else ""
        facts = [f"from {self.baseline_acc:.2f}"] if self.init == "pretrained" and self.baseline_acc else []
        facts += [f"-{self.macs_cut:g} %"] if self.macs_cut else []
        facts += [self.source] if self.source != self.method else []
        return f"{self.method} {self.acc:.2f}{std}{'†' if self.doubt else ''} ({', '.join(facts)})"


def read_published(path: Path | None = None) -> list[Published]:
    """Every row of results/published.csv, or of another file, in its order. Lines that begin with # are comments.

    Raises:
        UserError: the file cannot be read, or a row is not well-formed.
    """
    path = path or PUBLISHED
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the published figures in '{path}' cannot be read: {error}") from None
    rows = []
    for cells in csv.DictReader(lines):
        try:
            if None in cells.values() or not cells["acc"]:
                raise ValueError("cells are missing")
            rows.append(Published(**{n: (float(v) if v else None) if n in NUMBERS else v for n, v in cells.items()}))
        except (LookupError, TypeError, ValueError) as error:
            found = ",".join(map(str, cells.values()))
            raise UserError(f"'{path}' has a damaged row, {found}: {type(error).__name__} {error}") from None
    return rows
