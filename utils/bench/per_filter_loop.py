"""AHSG-HT's step written filter by filter, in the manner of the authors' release: what the fast optimizer is timed against.

As there, every filter's norm is taken on its own and read back to the host, numpy sorts the norms, and a Python loop writes zeros
into the filters that fall out. Only utils.bench.optimizer uses it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from AHSG_HT import following_additives, kept_count


class PerFilterLoop:
    """SGD with momentum, the heavy ball and thresholding, one parameter and one filter at a time.

    Args:
        params: in the order of `net.parameters()`.
        lr, momentum, weight_decay, nesterov, v, HTrate: as in AHSG_HT. The heavy ball is the true one.
    """

    def __init__(
        self,
        params: list[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
        v: float,
        HTrate: float,
    ):
        self.params = list(params)
        self.sgd = torch.optim.SGD(
            self.params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, foreach=False
        )
        self.v = v
        self.HTrate = HTrate
        self.previous: list[Tensor] = []

    def update_HSG(self, zero1: int = 1) -> None:
        """Nothing to do: `step` keeps x_{t-1} itself. Here for the released calling order."""

    @torch.no_grad()
    def step(self, closure=None, k_sum: float = 1.0, epoch: int = 0, final: int = 1) -> None:
        """One iteration; the arguments are those of AHSG_HT.step and are not used."""
        current = [p.clone() for p in self.params]
        self.sgd.step()
        for p, here, before in zip(self.params, current, self.previous or current, strict=True):
            p.add_(here - before, alpha=self.v)
        self.previous = current
        for index, p in enumerate(self.params):
            if p.dim() == 4:
                self._threshold(index, p)

    def _threshold(self, index: int, weight: Tensor) -> None:
        norms = np.array([float(torch.linalg.vector_norm(one)) for one in weight])
        additives = following_additives(self.params, index)
        order = np.argsort(-norms, kind="stable")
        for removed in order[kept_count(len(norms), self.HTrate) :]:
            weight[int(removed)] = 0
            for additive in additives:
                additive[int(removed)] = 0
