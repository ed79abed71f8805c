"""AHSG-HT: stochastic gradient descent with a heavy ball that hard-thresholds filters at every step.

One iteration on a mini-batch S_t (Zhou, Yuan, Feng, "Efficient Stochastic Gradient Hard Thresholding",
NeurIPS 2018, algorithm 1 with the heavy-ball acceleration of its section 4):

    x_{t+1} = H( x_t - lr * d_t + v * (x_t - x_{t-1}) ),      x_{-1} = x_0

d_t is torch's SGD direction of the mini-batch gradient (weight decay, momentum, dampening, Nesterov) and
H keeps, of every convolution, the filters of largest norm and zeroes the others. v = 0 gives HSG-HT; HTrate 1
(no thresholding) and v = 0 give torch.optim.SGD bit for bit.

Python cannot import a name with a hyphen, so `from AHSG_HT import AHSG_HT` goes through AHSG_HT.py, which loads this file.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["AHSG_HT", "following_additives", "kept_count"]

HEAVY_BALLS = ("paper", "released")
UNITS = ("filter", "element")
NORMS = (1, 2)


class AHSG_HT(Optimizer):
    """Accelerated hybrid stochastic gradient hard thresholding.

    Per mini-batch, in the order of the authors' release (calling `step()` alone works as well)::

        loss.backward()
        optimizer.update_HSG(1)
        optimizer.step(None, k_sum, epoch, final)

    Args:
        params: parameters or parameter groups. Give them in the order of `net.parameters()`: a filter's BatchNorm is
            found by following its convolution in that order (see `following_additives`).
        lr: learning rate, >= 0.
        momentum, dampening, weight_decay, nesterov: as in torch.optim.SGD.
        v: weight of the heavy-ball term, >= 0. It stacks with `momentum`; the release uses 0.9 and v = 0.1.
        HTrate: share of the filters that is KEPT, 0 < HTrate <= 1. 0.7 is the papers' "30 % pruned"; 1 keeps all.
        heavy_ball: "paper", the true x_{t-1}; or "released", the release's arithmetic, whose term v*(x_t - prev) is zero because
            its update_HSG(1) overwrites prev with x_t just before it is read.
        norm: 2 or 1, the norm that ranks filters.
        unit: "filter" thresholds the filters of 4-D weights (C_out, C_in, kh, kw); "element" thresholds the single entries of
            every tensor of the group (the paper's own setting: sparse vectors).

    Every option is a parameter-group option: groups may differ in each of them, and a schedule may change them between
    steps. A parameter whose gradient is None is neither updated nor thresholded, as with any torch optimizer.

    State per parameter: `momentum_buffer` (where momentum is not 0) and `prev_data`, which is x_{t-1} (where v is not 0).

    Caveats: transposed convolutions store (C_in, C_out, kh, kw) and are thresholded along their input channels; give
    them a group with HTrate=1 if that is not wanted. A BatchNorm in another group than its convolution is not found.

    Raises:
        ValueError: an argument out of its range, named with its value, or a layer of which nothing would be kept.
        RuntimeError: a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        v: float = 0.0,
        HTrate: float = 1.0,
        *,
        heavy_ball: str = "paper",
        norm: int = 2,
        unit: str = "filter",
    ):
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            v=v,
            HTrate=HTrate,
            heavy_ball=heavy_ball,
            norm=norm,
            unit=unit,
        )
        _check_options(defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group; its options are checked, and that every layer to be thresholded keeps something."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            _threshold_jobs(group["params"], group["HTrate"], group["unit"])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def update_HSG(self, zero1: int = 1) -> None:
        """Tells where x_{t-1} stands before `step`; call it once per mini-batch, after backward.

        Args:
            zero1: 1 for an ordinary mini-batch. 0: with heavy_ball="paper" x_{t-1} is forgotten, so the next step has no heavy-ball term;
                with "released" the release's `prev += x_t` (1 is its `prev = x_t`).
        """
        if zero1 not in (0, 1):
            raise ValueError(f"update_HSG: zero1 must be 0 or 1, got {zero1!r}")
        for group in self.param_groups:
            for p in group["params"]:
                if group["heavy_ball"] == "released":
                    if group["v"] == 0:
                        continue
                    prev = self.state[p].get("prev_data")
                    if zero1 == 0 and prev is not None:
                        prev.add_(p)
                    else:
                        self.state[p]["prev_data"] = p.clone()
                elif zero1 == 0 and p in self.state:
                    self.state[p].pop("prev_data", None)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Tensor] | None = None,
        k_sum: float = 1.0,
        epoch: int = 0,
        final: int = 1,
    ):
        """One iteration x_{t+1} = H(x_t - lr*d_t + v*(x_t - x_{t-1})).

        Args:
            closure: recomputes the loss and its gradients, and returns the loss.
            k_sum: size of this mini-batch over that of the first. The gradient is a mean over the mini-batch already, so
                the update does not depend on it; accepted for the calling order of the release, as is `epoch`.
            epoch: number of the epoch.
            final: 1 applies H in this step, 0 leaves it out (heavy_ball="released" applies it whatever `final` says, as the release).

        Returns:
            The closure's loss, or None.
        """
        if final not in (0, 1):
            raise ValueError(f"step: final must be 0 or 1, got {final!r}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None and p.grad.is_sparse for group in self.param_groups for p in group["params"]):
            raise RuntimeError("AHSG_HT does not support sparse gradients; use sparse=False in the embedding")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            directions = self._sgd_directions(params, group)
            if group["heavy_ball"] == "paper":
                self._paper_update(params, directions, group)
            else:
                self._released_update(params, directions, group)
            if final or group["heavy_ball"] == "released":
                hard_threshold(
                    group["params"], group["HTrate"], norm=group["norm"], unit=group["unit"], only_with_grad=True
                )
        return loss

    def _sgd_directions(self, params: list[Tensor], group: dict) -> list[Tensor]:
        """torch.optim.SGD's direction d_t, in its order of operations so that the bits agree. May return the gradients
        themselves, never changes them."""
        directions = [p.grad for p in params]
        if group["weight_decay"] != 0:
            directions = torch._foreach_add(directions, params, alpha=group["weight_decay"])
        if group["momentum"] == 0:
            return directions
        old, old_directions, buffers = [], [], []
        for p, d in zip(params, directions, strict=True):
            buffer = self.state[p].get("momentum_buffer")
            if buffer is None:
                # torch's first buffer is the direction itself, without dampening.
                buffer = self.state[p]["momentum_buffer"] = d.clone()
            else:
                old.append(buffer)
                old_directions.append(d)
            buffers.append(buffer)
        if old:
            torch._foreach_mul_(old, group["momentum"])
            torch._foreach_add_(old, old_directions, alpha=1 - group["dampening"])
        if not group["nesterov"]:
            return buffers
        if group["weight_decay"] != 0:
            torch._foreach_add_(directions, buffers, alpha=group["momentum"])
            return directions
        return torch._foreach_add(directions, buffers, alpha=group["momentum"])

    def _paper_update(self, params: list[Tensor], directions: list[Tensor], group: dict) -> None:
        """x_t - lr*d_t + v*(x_t - x_{t-1}), and x_t becomes the next step's x_{t-1}."""
        v = group["v"]
        if v == 0:
            for p in params:
                self.state[p].pop("prev_data", None)
            torch._foreach_add_(params, directions, alpha=-group["lr"])
            return
        moved, prevs = [], []
        for p in params:
            state = self.state[p]
            if "prev_data" in state:
                moved.append(p)
                prevs.append(state["prev_data"])
            state["prev_data"] = p.clone()
        if moved:
            # x_t + v*(x_t - x_{t-1}) in one pass over memory: an interpolation from x_t to x_{t-1} with weight -v.
            torch._foreach_lerp_(moved, prevs, -v)
        torch._foreach_add_(params, directions, alpha=-group["lr"])

    def _released_update(self, params: list[Tensor], directions: list[Tensor], group: dict) -> None:
        """The SGD step, then + v*(x_t - prev) with prev as update_HSG left it. prev is not moved here."""
        v = group["v"]
        moved = [p for p in params if v != 0 and "prev_data" in self.state[p]]
        terms = torch._foreach_sub(moved, [self.state[p]["prev_data"] for p in moved]) if moved else []
        torch._foreach_add_(params, directions, alpha=-group["lr"])
        if moved:
            torch._foreach_add_(moved, terms, alpha=v)


def kept_count(total: int, HTrate: float) -> int:
    """floor(total * HTrate): how many of `total` filters are kept.

    The product is lifted by 1e-12 of itself before the floor, so that 90 filters at 0.7 (62.99999999999999 in binary
    arithmetic) keep the 63 that the decimal rate means.

    Raises:
        ValueError: nothing would be kept.
    """
    kept = math.floor(total * HTrate * (1 + 1e-12))
    if kept < 1:
        raise ValueError(
            f"HTrate={HTrate:g} keeps nothing of a layer with {total} filters or entries; use HTrate >= {1 / total:.4g}, or put the layer in a "
            "parameter group with HTrate=1"
        )
    return min(kept, total)


def following_additives(params: list[Tensor], index: int) -> list[Tensor]:
    """The additive 1-D parameters (convolution bias, BatchNorm bias) of the convolution params[index].

    They are among the 1-D parameters of length C_out that follow it before the next weight (one of more dimensions): [conv bias],
    [norm weight, norm bias] or [conv bias, norm weight, norm bias].

    Raises:
        ValueError: more than three follow, so that it cannot be told which of them are additive.
    """
    run = []
    for p in params[index + 1 :]:
        if p.dim() > 1:
            break
        if p.dim() == 1 and p.shape[0] == params[index].shape[0]:
            run.append(p)
    if len(run) > 3:
        raise ValueError(
            f"a convolution of shape {tuple(params[index].shape)} is followed by {len(run)} one-dimensional parameters of its length, at most 3 "
            "(bias, norm weight, norm bias) can be told apart; put the convolution and its own normalisation in a parameter group of their own"
        )
    additive_positions = {0: (), 1: (0,), 2: (1,), 3: (0, 2)}[len(run)]
    return [run[i] for i in additive_positions]


def hard_threshold(
    params: list[Tensor], HTrate: float, *, norm: int = 2, unit: str = "filter", only_with_grad: bool = False
) -> None:
    """H, in place: of every layer keeps the kept_count(n, HTrate) units of largest norm, zeroes the others.

    Layers of one shape are ranked together in one stable sort (ties keep the lower index, on every device). Nothing is read
    back to the host. Norms are accumulated in float32 at least.

    Args:
        params: tensors in the order of `net.parameters()`.
        HTrate: share kept, in (0, 1].
        norm: 2 or 1.
        unit: "filter" or "element", as in AHSG_HT.
        only_with_grad: leave out what has no gradient. `params` must name it all the same, or a filter's BatchNorm is not found.
    """
    for (_, dtype, device), jobs in _threshold_jobs(params, HTrate, unit, only_with_grad).items():
        weights = [weight for weight, _, _ in jobs]
        kept = jobs[0][2]
        # A GPU pays per kernel, so its layers are copied side by side and thresholded as one tensor; a CPU pays for memory traffic.
        stacked = torch.stack(weights) if device.type != "cpu" else None
        if unit == "element":
            scores = (torch.stack(weights) if stacked is None else stacked).flatten(1).abs()
        else:
            kind = dict(ord=norm, dim=-1, dtype=torch.promote_types(dtype, torch.float32))
            if stacked is None:
                scores = torch.stack([torch.linalg.vector_norm(w.flatten(1), **kind) for w in weights])
            else:
                scores = torch.linalg.vector_norm(stacked.flatten(2), **kind)
        removed = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, kept:]
        mask = torch.ones_like(scores, dtype=dtype).scatter_(1, removed, 0)
        per_unit = mask.view(len(weights), *(weights[0].shape if unit == "element" else (-1, 1, 1, 1)))
        if stacked is None:
            torch._foreach_mul_(weights, list(per_unit.unbind(0)))
        else:
            torch._foreach_copy_(weights, list(stacked.mul_(per_unit).unbind(0)))
        additives = [(a, row) for (_, found, _), row in zip(jobs, mask.unbind(0), strict=True) for a in found]
        if additives:
            torch._foreach_mul_([a for a, _ in additives], [row for _, row in additives])


def _threshold_jobs(params: list[Tensor], HTrate: float, unit: str, only_with_grad: bool = False) -> dict:
    """Layers to threshold, as {(shape, dtype, device): [(weight, additives, kept), ...]}; layers kept whole are left out."""
    jobs = defaultdict(list)
    if HTrate == 1:
        return jobs
    for index, p in enumerate(params):
        if (unit == "filter" and p.dim() != 4) or p.numel() == 0 or (only_with_grad and p.grad is None):
            continue
        total = p.numel() if unit == "element" else p.shape[0]
        kept = kept_count(total, HTrate)
        if kept < total:
            additives = [] if unit == "element" else following_additives(params, index)
            if only_with_grad:
                additives = [a for a in additives if a.grad is not None]
            jobs[p.shape, p.dtype, p.device].append((p, additives, kept))
    return jobs


def _check_options(group: dict) -> None:
    for name in ("lr", "momentum", "weight_decay", "v"):
        if not isinstance(group[name], (int, float)) or not 0 <= group[name] < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {group[name]!r}")
    if not isinstance(group["dampening"], (int, float)) or not math.isfinite(group["dampening"]):
        raise ValueError(f"dampening must be a finite number, got {group['dampening']!r}")
    if not isinstance(group["HTrate"], (int, float)) or not 0 < group["HTrate"] <= 1:
        raise ValueError(f"HTrate is the share of filters kept and must be in (0, 1], got {group['HTrate']!r}")
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov needs momentum > 0 and dampening 0, got momentum={group['momentum']!r} and dampening={group['dampening']!r}"
        )
    for name, allowed in (("heavy_ball", HEAVY_BALLS), ("norm", NORMS), ("unit", UNITS)):
        if group[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {group[name]!r}")
