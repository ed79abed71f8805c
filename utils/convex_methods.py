"""The five methods of the paper's comparison. All take W <- H(W - lr*g + v*(W - W_before)) through AHSG_HT, with a constant lr;
they differ in the gradient g, in the mini-batch and in v. Mini-batches are drawn without replacement.

    method   g                                               samples of S_t       v      gradients counted
    FG-HT    mean over all n samples                         n                    0      n
    SG-HT    mean over S_t                                   s_0                  0      s_0
    SVRG-HT  mean over S_t of (gradient at W - gradient at   s_0                  0      2*s_0, and n whenever
             the snapshot) + full gradient of the snapshot,                              the snapshot is taken
             which is W at the beginning of every epoch
    HSG-HT   mean over S_t                                   s_0*(1+k)^t up to n  0      s_t
    AHSG-HT  mean over S_t                                   s_0*(1+k)^t up to n  v > 0  s_t

The growth goes on over the epochs. A last mini-batch shorter than the schedule asks for is left out, or it would be the noisiest
of its epoch just before the objective is looked at.
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
        k: entries of W kept.
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
    """The course of one run: passes over the data (gradients / n), thresholdings and objective at the same moments; and where it ended."""

    method: str
    lr: float
    passes: list[float] = field(default_factory=list)
    thresholdings: list[int] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)
    weights: np.ndarray | None = None

    def at(self, passes: float) -> tuple[float, int]:
        """Objective and thresholdings of the last record within `passes`; an infinite objective after a divergence."""
        last = np.searchsorted(self.passes, passes + 1e-9) - 1
        return self.objective[last], self.thresholdings[last]


def hard_thresholding_optimizer(problem: Problem, k: int, lr: float, v: float) -> tuple[torch.Tensor, AHSG_HT]:
    """W = 0, (d, classes), and the AHSG_HT that keeps k of its entries."""
    weights = torch.zeros(problem.features.shape[1], problem.classes, dtype=torch.float64, requires_grad=True)
    return weights, AHSG_HT([weights], lr=lr, v=v, HTrate=k / weights.numel(), unit="element")


def marks(passes: float) -> list[float]:
    """The passes at which a run is looked at: every tenth up to the first pass, then every half, and the end."""
    tenths, halves = np.arange(1, 10) / 10, np.arange(1, passes, 0.5)
    return [*tenths.tolist(), *halves.tolist(), passes]


def run_method(problem: Problem, method: str, lr: float, settings: Settings) -> Run:
    """One run of a method from W = 0. At every mark the last iterate is recorded whose gradients fit into the mark's passes."""
    samples = len(problem.labels)
    weights, optimizer = hard_thresholding_optimizer(
        problem, settings.k, lr, settings.v if method == "AHSG-HT" else 0.0
    )
    run = Run(method, lr)
    used, steps = 0, 0

    def record() -> bool:
        """Notes where the run is; False after a divergence."""
        objective = problem.objective(weights.detach().numpy())
        alive = math.isfinite(objective) and (not run.objective or objective < DIVERGED * run.objective[0])
        run.passes.append(used / samples)
        run.thresholdings.append(steps)
        run.objective.append(objective if alive else math.inf)
        return alive

    record()
    ahead = marks(settings.passes)
    for gradient, evaluations in _gradients(problem, method, weights, settings):
        if used + evaluations > ahead[0] * samples + 1e-6:
            ahead = [mark for mark in ahead if used + evaluations <= mark * samples + 1e-6]
            if (used / samples > run.passes[-1] and not record()) or not ahead:
                break
        used += evaluations
        if gradient is not None:
            weights.grad = torch.from_numpy(gradient)
            optimizer.step()
            steps += 1
    run.weights = weights.detach().numpy().copy()
    return run


def _gradients(
    problem: Problem, method: str, weights: torch.Tensor, settings: Settings
) -> Iterator[tuple[np.ndarray | None, int]]:
    """(g at the current W, gradients evaluated for it) per step; None for g: evaluations without a step."""
    samples, point = len(problem.labels), weights.detach().numpy()
    if method == "FG-HT":
        while True:
            yield problem.gradient(point), samples
    schedule = dict(k=settings.growth, growth="exponential", max_batch_size=samples, restart=False)
    sampler = GrowingBatchSampler(
        samples,
        settings.batch_size,
        shuffle=True,
        drop_last=True,
        seed=settings.seed,
        **(schedule if method in ("HSG-HT", "AHSG-HT") else {}),
    )
    while True:
        if method == "SVRG-HT":
            snapshot = point.copy()
            mean = problem.gradient(snapshot)
            yield None, samples
        for rows in sampler:
            rows = np.asarray(rows)
            gradient = problem.gradient(point, rows)
            if method == "SVRG-HT":
                yield gradient - problem.gradient(snapshot, rows) + mean, 2 * len(rows)
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


def best_known(problem: Problem, k: int, starts: list[np.ndarray], smoothness: float) -> tuple[float, list[float]]:
    """The reference optimum: the smallest objective found from several starts.

    The optimum on the support of every start, and of what accelerated full-gradient thresholding finds from W = 0; then, from the lowest
    of them, more such steps, which may exchange entries of the support, and the optimum on the new support, as long as this helps (at
    most 5 rounds). The problem is not convex: a better support may exist.

    Returns:
        (objective, the smallest objective on each start's own support).
    """
    # Where a run diverged there is nothing to start from.
    polished = [polish(problem, start) if np.isfinite(start).all() else (math.inf, start) for start in starts]
    zero = np.zeros((problem.features.shape[1], problem.classes))
    found = [accelerated(problem, k, zero, c / smoothness, steps=150) for c in (1, 4)]
    ends = [polish(problem, weights) for weights in found if np.isfinite(weights).all()]
    objective, best = min(polished + ends, key=lambda pair: pair[0])
    for _ in range(5 if math.isfinite(objective) else 0):
        candidate, moved = polish(problem, accelerated(problem, k, best, 1 / smoothness, steps=40))
        if candidate > objective - 1e-12:
            break
        objective, best = candidate, moved
    return objective, [own for own, _ in polished]


def accelerated(problem: Problem, k: int, start: np.ndarray, lr: float, steps: int) -> np.ndarray:
    """`steps` full-gradient thresholding steps with a heavy ball of 0.9."""
    weights, optimizer = hard_thresholding_optimizer(problem, k, lr, 0.9)
    with torch.no_grad():
        weights.copy_(torch.from_numpy(start))
    for _ in range(steps):
        weights.grad = torch.from_numpy(problem.gradient(weights.detach().numpy()))
        optimizer.step()
    return weights.detach().numpy()
