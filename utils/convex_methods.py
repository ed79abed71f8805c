"""The five methods of the paper's comparison. AHSG_HT thresholds and updates in all of them; they differ in the gradient, in the
mini-batch and in v.

    FG-HT    full gradient                                                          v = 0
    SG-HT    mini-batch of fixed size                                               v = 0
    SVRG-HT  mini-batch of fixed size, variance reduced by a full gradient now and then   v = 0
    HSG-HT   mini-batch s_t = s_0*(1+k)^t, over the epochs                          v = 0
    AHSG-HT  the same                                                               v > 0
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import minimize

from AHSG_HT import AHSG_HT
from data.sampler import GrowingBatchSampler
from utils.convex_problems import Problem

# In the order of the paper's result at one pass, the smallest gap first.
METHODS = ("AHSG-HT", "HSG-HT", "SVRG-HT", "SG-HT", "FG-HT")
# A run whose objective is above this many times the first one is given up.
DIVERGED = 1e3


@dataclass
class Settings:
    """What the methods share.

    Attributes:
        k: entries kept, of every class's weight vector.
        passes: gradient evaluations over n that a run may use.
        batch_size: of SG-HT and SVRG-HT, and the first one of HSG-HT and AHSG-HT.
        growth: k of the schedule s_t = s_0*(1+k)^t.
        v: heavy-ball weight of AHSG-HT.
    """

    k: int
    passes: float
    batch_size: int = 64
    growth: float = 0.01
    v: float = 0.9
    seed: int = 0


@dataclass
class Run:
    """The course of one run: passes over the data, thresholdings and objective, at the same moments; and where it ended."""

    method: str
    lr: float
    passes: list[float] = field(default_factory=list)
    thresholdings: list[int] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)
    weights: np.ndarray | None = None

    def at(self, passes: float) -> tuple[float, int]:
        """Objective and thresholdings of the last record within `passes`; an infinite objective after a divergence."""
        last = np.searchsorted(self.passes, passes + 1e-9) - 1
        gave_up = math.isinf(self.objective[-1]) and self.passes[-1] <= passes
        return (math.inf, self.thresholdings[-1]) if gave_up else (self.objective[last], self.thresholdings[last])


def hard_thresholding_optimizer(problem: Problem, k: int, lr: float, v: float):
    """Zero weight vectors, one per class, and the AHSG_HT that keeps k entries of each."""
    features = problem.features.shape[1]
    params = [torch.zeros(features, dtype=torch.float64, requires_grad=True) for _ in range(problem.classes)]
    return params, AHSG_HT(params, lr=lr, v=v, HTrate=k / features, unit="element")


def run_method(problem: Problem, method: str, lr: float, settings: Settings) -> Run:
    """One run of a method from W = 0.

    The objective is recorded at every fifth of a pass up to the first one, then at every half.
    """
    samples = len(problem.labels)
    params, optimizer = hard_thresholding_optimizer(problem, settings.k, lr, settings.v if method == "AHSG-HT" else 0.0)
    marks = [*np.arange(1, 5) / 5, *np.arange(1, settings.passes + 0.5, 0.5)]
    run = Run(method, lr)
    used, steps = 0, 0

    def record() -> bool:
        """Notes where the run is; False after a divergence."""
        objective = problem.objective(weights_of(params))
        alive = math.isfinite(objective) and (not run.objective or objective < DIVERGED * run.objective[0])
        run.passes.append(used / samples)
        run.thresholdings.append(steps)
        run.objective.append(objective if alive else math.inf)
        return alive

    record()
    for gradient, evaluations in _gradients(problem, method, params, settings):
        used += evaluations
        if used > settings.passes * samples + 0.5:
            break
        if gradient is None:
            continue
        for p, column in zip(params, gradient.T, strict=True):
            p.grad = torch.from_numpy(np.ascontiguousarray(column))
        optimizer.step()
        steps += 1
        if used / samples >= marks[0] - 1e-9:
            marks = [mark for mark in marks if mark > used / samples + 1e-9] or [math.inf]
            if not record():
                break
    run.weights = weights_of(params)
    return run


def weights_of(params: list[torch.Tensor]) -> np.ndarray:
    """The weight vectors side by side, (d, classes)."""
    return np.stack([p.detach().numpy() for p in params], axis=1)


def _gradients(
    problem: Problem, method: str, params: list[torch.Tensor], settings: Settings
) -> Iterator[tuple[np.ndarray | None, int]]:
    """(gradient at the current weights, gradient evaluations it took) per step; None for a gradient: evaluations without a step."""
    samples = len(problem.labels)
    if method == "FG-HT":
        while True:
            yield problem.gradient(weights_of(params)), samples
    grows = method in ("HSG-HT", "AHSG-HT")
    sampler = GrowingBatchSampler(
        samples,
        settings.batch_size,
        settings.growth if grows else None,
        shuffle=True,
        growth="exponential" if grows else "linear",
        restart=False,
        seed=settings.seed,
    )
    while True:
        if method == "SVRG-HT":
            anchor = weights_of(params)
            mean = problem.gradient(anchor)
            yield None, samples
        for rows in sampler:
            rows = np.asarray(rows)
            gradient = problem.gradient(weights_of(params), rows)
            if method == "SVRG-HT":
                gradient = gradient - problem.gradient(anchor, rows) + mean
                yield gradient, 2 * len(rows)
            else:
                yield gradient, len(rows)
        sampler.epoch += 1


def polish(problem: Problem, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """The smallest objective on the support of `weights`, by L-BFGS; returns it and its weights."""
    support = weights != 0
    kept = support.any(axis=1)
    small, free = problem.restricted(kept), support[kept]

    def value_and_slope(entries: np.ndarray) -> tuple[float, np.ndarray]:
        point = np.zeros(free.shape)
        point[free] = entries
        return small.objective(point), small.gradient(point)[free]

    options = dict(maxiter=1000, maxfun=1500, ftol=1e-15, gtol=1e-9, maxcor=30)
    found = minimize(value_and_slope, weights[kept][free], jac=True, method="L-BFGS-B", options=options)
    polished = np.zeros_like(weights)
    inner = np.zeros(free.shape)
    inner[free] = found.x
    polished[kept] = inner
    return float(found.fun), polished


def best_known(problem: Problem, k: int, starts: list[np.ndarray], smoothness: float, steps: int = 40):
    """The reference optimum: the smallest objective found from several starts.

    The optimum on the support of every start; then, from the lowest of them, accelerated full-gradient thresholding steps of length
    1/smoothness that may exchange entries of the support, and the optimum on the new support, as long as this helps (at most 5 rounds).

    Returns:
        (objective, the smallest objective on each start's own support).
    """
    # Where a run diverged there is nothing to start from.
    polished = [polish(problem, start) if np.isfinite(start).all() else (math.inf, start) for start in starts]
    objective, weights = min(polished, key=lambda pair: pair[0])
    for _ in range(5 if math.isfinite(objective) else 0):
        params, optimizer = hard_thresholding_optimizer(problem, k, 1 / smoothness, 0.9)
        with torch.no_grad():
            for p, column in zip(params, weights.T, strict=True):
                p.copy_(torch.from_numpy(column.copy()))
        for _ in range(steps):
            for p, column in zip(params, problem.gradient(weights_of(params)).T, strict=True):
                p.grad = torch.from_numpy(column.copy())
            optimizer.step()
        candidate, moved = polish(problem, weights_of(params))
        if candidate > objective - 1e-12:
            break
        objective, weights = candidate, moved
    return objective, [own for own, _ in polished]
