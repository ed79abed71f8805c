"""Accuracies over seeds: mean, standard deviation, Student's 95 % interval, and the interval of a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Of n values: mean; with two or more the standard deviation (n - 1 in the denominator) and half the width of the t-interval."""

    n: int
    mean: float
    std: float | None
    half_width: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.half_width is None else (self.mean - self.half_width, self.mean + self.half_width)


def summarise(values: Sequence[float]) -> Summary:
    """The mean's interval is mean +- t(0.975, n - 1) * std / sqrt(n): none from a single value."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Summary(n, mean, None, None)
    std = float(np.std(values, ddof=1))
    return Summary(n, mean, std, float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n))


def half_width_of_difference(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Half the width of Welch's 95 % interval of mean(a) - mean(b); None where both are single values.

    A single value is taken to come from values that spread as the others do: t(0.975, n - 1) * std * sqrt(1 + 1/n).
    Welch, The generalization of "Student's" problem when several different population variances are involved, Biometrika 1947.
    """
    if len(a) == len(b) == 1:
        return None
    if min(len(a), len(b)) == 1:
        known = summarise(max(a, b, key=len))
        return known.half_width * math.sqrt(known.n + 1)
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (a, b)]
    if not sum(parts):
        return 0.0
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(sum(parts))


def half_width_from_test_images(a: float, b: float, images: int) -> float:
    """Half the width of a 95 % interval for the difference of two accuracies in %, from the finite test set alone.

    Binomial standard errors, added as if the two networks erred independently; errors on the same images are correlated, which makes it
    an upper bound of this part. What another seed would change comes on top.
    """
    variance = sum(p * (100 - p) / images for p in (a, b))
    return float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(variance)
