"""95 % intervals of accuracies in %: the variance over seeds and that of a finite test set, added."""

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95


def half_width(values: Sequence[float], images: int) -> float | None:
    """Half the width of the interval of a mean over seeds; None for one seed."""
    return None if len(values) < 2 else _half_width([_over_seeds(values)], [_of_test_set(values, images)])


def half_width_of_difference(
    a: dict[int, float], b: dict[int, float], images: int, by_image: np.ndarray | None = None
) -> float | None:
    """Half the width of the interval of mean(a) - mean(b); None where either has one seed.

    Runs of the same seeds are paired: the variance over seeds is that of their differences. Otherwise the variances add
    (Welch, Biometrika 1947). The test-set part is an upper bound: that of the answers paired by image where they are
    known, which has what varies with both seed and image a second time; otherwise as if the networks erred
    independently.

    Args:
        a, b: {seed: accuracy in %}.
        images: of the test set.
        by_image: of every test image, the share of a's runs that were right on it less the share of b's.
    """
    if min(len(a), len(b)) < 2:
        return None
    values = [list(one.values()) for one in (a, b)]
    seeds = [[a[seed] - b[seed] for seed in a]] if a.keys() == b.keys() else values
    tests = [_of_test_set(one, images) for one in values]
    if by_image is not None:
        tests = [(float(np.var(100 * by_image, ddof=1)) / images, math.inf)]
    return _half_width([*map(_over_seeds, seeds)], tests)


def _over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """(variance of the mean, its degrees of freedom)."""
    return float(np.var(values, ddof=1)) / len(values), len(values) - 1


def _of_test_set(values: Sequence[float], images: int) -> tuple[float, float]:
    """Binomial variance of an accuracy; known, so of infinitely many degrees of freedom."""
    mean = float(np.mean(values))
    return mean * (100 - mean) / images, math.inf


def _half_width(seeds: list[tuple[float, float]], tests: list[tuple[float, float]]) -> float:
    """Student's t times the root of the summed variances; degrees of freedom by Welch and Satterthwaite.

    At least what the seeds alone give: a known variance beside theirs raises the degrees of freedom so much that the
    interval could become narrower.
    """
    from scipy import stats

    widths = []
    for parts in (seeds, [*seeds, *tests]):
        total, weight = sum(v for v, _ in parts), sum(v**2 / freedom for v, freedom in parts)
        freedom = total**2 / weight if weight else math.inf
        widths.append(float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(total))
    return max(widths)
