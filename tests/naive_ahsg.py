"""The optimizer's specification as plain loops: the executable reference that the tests hold AHSG_HT against.

One mini-batch with mean gradient g (paper, equation of the iteration):

    x_{t+1} = H( x_t - lr*d + v*(x_t - x_{t-1}) ),    x_{-1} = x_0,    d = torch's SGD direction of g

It works on float64 copies, one parameter, filter and entry at a time. Slow, and on purpose without any of the fast path's ideas.
"""

from __future__ import annotations

import math
from fractions import Fraction

from torch import Tensor


def brute_force_kept(scores: list[float], HTrate: float) -> set[int]:
    """Indices of the floor(n*HTrate) largest scores; of equal scores the lower index. The rate is read as the decimal it prints as."""
    count = math.floor(len(scores) * Fraction(str(HTrate)))
    kept = set()
    for _ in range(count):
        best = None
        for i, score in enumerate(scores):
            if i not in kept and (best is None or score > scores[best]):
                best = i
        kept.add(best)
    return kept


def filter_norm(weight: Tensor, norm: int) -> float:
    """l1 or l2 norm of one filter, entry by entry."""
    entries = weight.double().flatten().tolist()
    if norm == 1:
        return math.fsum(abs(e) for e in entries)
    return math.sqrt(math.fsum(e * e for e in entries))


def additive_followers(params: list[Tensor], index: int) -> list[Tensor]:
    """Convolution bias and BatchNorm bias of the convolution params[index], in the order of net.parameters()."""
    length = len(params[index])
    run = []
    for p in params[index + 1 :]:
        if p.dim() > 1:  # the next weight
            break
        if len(p) == length:
            run.append(p)
    if len(run) == 0:
        return []
    if len(run) == 1:
        conv_bias = run[0]
        return [conv_bias]
    if len(run) == 2:
        _norm_weight, norm_bias = run
        return [norm_bias]
    conv_bias, _norm_weight, norm_bias = run
    return [conv_bias, norm_bias]


def naive_hard_threshold(
    params: list[Tensor], HTrate: float, norm: int = 2, unit: str = "filter"
) -> dict[int, set[int]]:
    """H in place; returns the kept units of every thresholded tensor, {position in params: indices}."""
    kept_sets = {}
    for index, p in enumerate(params):
        if unit == "element":
            flat = p.flatten()
            kept = brute_force_kept([abs(e) for e in flat.tolist()], HTrate)
            for i in range(len(flat)):
                if i not in kept:
                    flat[i] = 0
            p.copy_(flat.view(p.shape))
        elif p.dim() == 4:
            kept = brute_force_kept([filter_norm(w, norm) for w in p], HTrate)
            for i in range(len(p)):
                if i not in kept:
                    p[i] = 0
                    for additive in additive_followers(params, index):
                        additive[i] = 0
        else:
            continue
        kept_sets[index] = kept
    return kept_sets


class NaiveAHSG:
    """AHSG-HT on float64 copies of `params`: same calling order as AHSG_HT, gradients are handed to `step`.

    `x` holds the parameters, `kept` what the latest thresholding kept.
    """

    def __init__(
        self,
        params,
        lr,
        momentum=0.0,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        v=0.0,
        HTrate=1.0,
        heavy_ball="paper",
        norm=2,
        unit="filter",
        regrow=True,
    ):
        self.x = [p.detach().double().clone() for p in params]
        self.buffers = [None for _ in params]
        self.prev = [None for _ in params]
        self.kept = {}
        self.lr, self.momentum, self.dampening, self.nesterov = lr, momentum, dampening, nesterov
        self.weight_decay, self.v, self.HTrate, self.heavy_ball = weight_decay, v, HTrate, heavy_ball
        self.norm, self.unit, self.regrow = norm, unit, regrow

    def update_HSG(self, zero1: int) -> None:
        for i, x in enumerate(self.x):
            if self.heavy_ball == "paper":
                if zero1 == 0:
                    self.prev[i] = None
            elif zero1 == 1:
                self.prev[i] = x.clone()
            else:
                self.prev[i] = self.prev[i] + x

    def direction(self, i: int, gradient: Tensor) -> Tensor:
        d = gradient.double() + self.weight_decay * self.x[i]
        if self.momentum == 0:
            return d
        if self.buffers[i] is None:
            self.buffers[i] = d
        else:
            self.buffers[i] = self.momentum * self.buffers[i] + (1 - self.dampening) * d
        return d + self.momentum * self.buffers[i] if self.nesterov else self.buffers[i]

    def keep_zeros(self, before: Tensor, after: Tensor) -> None:
        """Zeroes in `after` the units that are zero in `before`."""
        if self.unit == "element":
            after[before == 0] = 0
        elif before.dim() == 4:
            for i, filter_before in enumerate(before):
                if not filter_before.any():
                    after[i] = 0

    def step(self, gradients: list[Tensor], final: int = 1) -> None:
        for i, x in enumerate(self.x):
            heavy_ball = 0 if self.prev[i] is None else self.v * (x - self.prev[i])
            if self.heavy_ball == "paper":
                self.prev[i] = x
            self.x[i] = x - self.lr * self.direction(i, gradients[i]) + heavy_ball
            if not self.regrow:
                self.keep_zeros(x, self.x[i])
        if self.heavy_ball == "released" or final == 1:
            self.kept = naive_hard_threshold(self.x, self.HTrate, self.norm, self.unit)
