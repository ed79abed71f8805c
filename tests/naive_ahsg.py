"""The optimizer's specification as plain loops: the executable reference that the tests hold AHSG_HT against.

One mini-batch with mean gradient g (paper, equation of the iteration):

    x_{t+1} = H( x_t - lr*d + v*(x_t - x_{t-1}) ),    x_{-1} = x_0,    d = torch's SGD direction of g

It works on float64 copies, one parameter, filter and entry at a time, with none of the fast path's ideas.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor


def brute_force_kept(scores: list[float], HTrate: float) -> set[int]:
    """Indices of the floor(n*HTrate) largest scores, of equal ones the lower; HTrate is the decimal it prints."""
    count = math.floor(len(scores) * Fraction(str(HTrate)))
    return set(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


# What ranks filters, of the entries of one filter: for every key of NORMS.
NAIVE_NORMS = {1: lambda entries: math.fsum(map(abs, entries)), 2: lambda entries: math.hypot(*entries)}


def filter_norm(weight: Tensor, norm: int | str) -> float:
    """The norm of one filter, entry by entry."""
    return NAIVE_NORMS[norm](weight.double().flatten().tolist())


def additives_after(params: list[Tensor], index: int) -> list[int]:
    """Where the convolution bias and BatchNorm bias of params[index] are, in the order of net.parameters()."""
    run = []
    for i in range(index + 1, len(params)):
        if params[i].dim() > 1:  # the next weight
            break
        if len(params[i]) == len(params[index]):
            run.append(i)
    # nothing, conv bias, (norm weight, norm bias), (conv bias, norm weight, norm bias)
    return {0: [], 1: run, 2: run[1:], 3: [*run[:1], *run[2:]]}[len(run)]


class NaiveAHSG:
    """AHSG-HT on float64 copies of `params`: same calling order as AHSG_HT, gradients are handed to `step`.

    Attributes:
        x, buffers, prev: parameters, momentum buffers and x_{t-1} (None before they exist).
        removed: per parameter the units that stay zero, where regrow is False.
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
        self.removed = [set() for _ in params]
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

    def step(self, gradients: list[Tensor], final: int = 1) -> None:
        for i, x in enumerate(self.x):
            heavy_ball = 0 if self.prev[i] is None else self.v * (x - self.prev[i])
            if self.heavy_ball == "paper":
                self.prev[i] = x
            self.x[i] = x - self.lr * self.direction(i, gradients[i]) + heavy_ball
            self.zero(i, self.removed[i])
        if self.heavy_ball == "released" or final == 1:
            self.hard_threshold()

    def hard_threshold(self) -> None:
        if self.HTrate == 1:
            return
        for i, x in enumerate(self.x):
            if self.unit == "element":
                scores, owned = [abs(e) for e in x.flatten().tolist()], [i]
            elif x.dim() == 4:
                scores, owned = [filter_norm(w, self.norm) for w in x], [i, *additives_after(self.x, i)]
            else:
                continue
            gone = set(range(len(scores))) - brute_force_kept(scores, self.HTrate)
            for j in owned:
                self.zero(j, gone)
                if not self.regrow:
                    self.removed[j] |= gone

    def zero(self, i: int, units: set[int]) -> None:
        """Zeroes entries, or filters and what belongs to them, of parameter i."""
        flat = self.x[i].flatten() if self.unit == "element" else self.x[i]
        for unit in units:
            flat[unit] = 0
        self.x[i] = flat.view(self.x[i].shape)

    def kept_factor(self, i: int) -> Tensor:
        """What state["kept"] of parameter i broadcasts to: 0 where it stays zero, 1 elsewhere."""
        factor = torch.ones_like(self.x[i])
        (factor.view(-1) if self.unit == "element" else factor)[sorted(self.removed[i])] = 0
        return factor
