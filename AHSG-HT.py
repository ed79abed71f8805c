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
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["AHSG_HT", "following_additives", "kept_count"]

HEAVY_BALLS = ("paper", "released")
UNITS = ("filter", "element")
NORMS = (1, 2)
# Entries of the parameters that a CPU updates together: with gradient, momentum buffer and x_{t-1} about 1 MiB, so that they
# stay in the cache from one pass of the update to the next.
CPU_BLOCK_ENTRIES = 65_536
# Up to this lr/v the heavy ball takes three passes over memory; above, where lr/v*d might overflow float16 though lr*d does not, four.
LARGEST_LR_OVER_V = 1.0
# Scores per row from which a CPU finds the smallest kept score instead of sorting them all.
CPU_LONG_ROW = 10_000


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
        regrow: True, a removed filter takes part in the next step and comes back where that step makes it one of the largest (the paper, the
            release). False: a filter that is zero stays zero. Before a BatchNorm the gradient of a zero filter is 1/sqrt(eps), some
            300 times, as large as that of a filter whose output has variance 1, so that at a large learning rate zero filters displace
            trained ones.

    Every option is a parameter-group option: groups may differ in each of them, and a schedule may change them between
    steps. A parameter whose gradient is None is neither updated nor thresholded, as with any torch optimizer.

    State per parameter: `momentum_buffer` (where momentum is not 0) and `prev_data`, which is x_{t-1} (where v is not 0).

    Caveats: transposed convolutions store (C_in, C_out, kh, kw) and are thresholded along their input channels; give
    them a group with HTrate=1 if that is not wanted. A BatchNorm in another group than its convolution is not found.

    Raises:
        ValueError: an argument out of its range, named with its value, or a layer of which nothing would be kept.
        RuntimeError: a sparse gradient.
        Both come before any parameter is changed.
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
        regrow: bool = True,
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
            regrow=regrow,
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
        work = []  # complete before anything is updated: what is refused leaves every parameter as it was
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("AHSG_HT does not support sparse gradients; use sparse=False in the embedding")
            # A schedule may have set what add_param_group checked.
            _check_options(group)
            jobs = {}
            if final or group["heavy_ball"] == "released":
                jobs = _threshold_jobs(group["params"], group["HTrate"], group["unit"], only_with_grad=True)
            work.append((group, params, jobs))
        for group, params, jobs in work:
            weights, alive = ([], []) if group["regrow"] else _alive_units(params, group["unit"])
            for block in _update_blocks(params):
                directions, are_scratch = self._sgd_directions(block, group)
                if group["heavy_ball"] == "paper":
                    self._paper_update(block, directions, are_scratch, group)
                else:
                    self._released_update(block, directions, group)
            if weights:
                torch._foreach_mul_(weights, alive)
            _threshold(jobs, group["norm"], group["unit"])
        return loss

    def _sgd_directions(self, params: list[Tensor], group: dict) -> tuple[list[Tensor], bool]:
        """torch.optim.SGD's direction d_t, in its order of operations so that the bits agree; and whether these are scratch
        tensors, which the caller may overwrite and keep, rather than the gradients or the momentum buffers themselves."""
        directions = [p.grad for p in params]
        decayed = group["weight_decay"] != 0
        if decayed:
            directions = torch._foreach_add(directions, params, alpha=group["weight_decay"])
        if group["momentum"] == 0:
            return directions, decayed
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
            return buffers, False
        if decayed:
            torch._foreach_add_(directions, buffers, alpha=group["momentum"])
            return directions, True
        return torch._foreach_add(directions, buffers, alpha=group["momentum"]), True

    def _paper_update(self, params: list[Tensor], directions: list[Tensor], are_scratch: bool, group: dict) -> None:
        """x_t - lr*d_t + v*(x_t - x_{t-1}), and x_t becomes the next step's x_{t-1}."""
        v = group["v"]
        if v == 0:
            for p in params:
                self.state[p].pop("prev_data", None)
            torch._foreach_add_(params, directions, alpha=-group["lr"])
            return
        moved, moves, prevs, olds = [], [], [], []
        for p, d in zip(params, directions, strict=True):
            state = self.state[p]
            prev = state.get("prev_data")
            if prev is None:
                state["prev_data"] = p.clone()
                p.add_(d, alpha=-group["lr"])
                continue
            # x_t is to outlive this step: in the direction's memory where that is free, because fresh memory costs as much as two passes.
            state["prev_data"] = old = d if are_scratch and d.dtype == p.dtype else torch.empty_like(p)
            moved.append(p)
            moves.append(d)
            prevs.append(prev)
            olds.append(old)
        if moved:
            # Both are x - lr*d + v*(x - prev); lerp(a, b, w) is a + w*(b - a).
            if group["lr"] <= LARGEST_LR_OVER_V * v:
                torch._foreach_add_(prevs, moves, alpha=group["lr"] / v)
                torch._foreach_copy_(olds, moved)
                torch._foreach_lerp_(moved, prevs, -v)
            else:
                torch._foreach_lerp_(prevs, moved, 1 + v)
                torch._foreach_add_(prevs, moves, alpha=-group["lr"])
                torch._foreach_copy_(olds, moved)
                torch._foreach_copy_(moved, prevs)

    def _released_update(self, params: list[Tensor], directions: list[Tensor], group: dict) -> None:
        """The SGD step, then + v*(x_t - prev) with prev as update_HSG left it. prev is not moved here."""
        v = group["v"]
        moved = [p for p in params if v != 0 and "prev_data" in self.state[p]]
        terms = torch._foreach_sub(moved, [self.state[p]["prev_data"] for p in moved]) if moved else []
        torch._foreach_add_(params, directions, alpha=-group["lr"])
        if moved:
            torch._foreach_add_(moved, terms, alpha=v)


def _update_blocks(params: list[Tensor]) -> list[list[Tensor]]:
    """The parameters in runs of about CPU_BLOCK_ENTRIES entries on a CPU, in one run elsewhere, where kernels are to be few."""
    if any(p.device.type != "cpu" for p in params):
        return [params]
    blocks, room = [], 0
    for p in params:
        if room <= 0:
            blocks.append([])
            room = CPU_BLOCK_ENTRIES
        blocks[-1].append(p)
        room -= p.numel()
    return blocks


def _alive_units(params: list[Tensor], unit: str) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that hold units, and for each a factor that broadcasts over it: 0 where a unit is zero, 1 elsewhere."""
    weights = [p for p in params if (unit == "element" or p.dim() == 4) and p.numel()]
    if unit == "element":
        return weights, [(w != 0).to(w.dtype) for w in weights]
    return weights, [(w != 0).amax(dim=(1, 2, 3), keepdim=True).to(w.dtype) for w in weights]


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
    length = params[index].shape[0]
    for i in range(index + 1, len(params)):
        p = params[i]
        dim = p.dim()
        if dim > 1:
            break
        if dim == 1 and p.shape[0] == length:
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

    Layers of equally many units are ranked together in one stable sort (ties keep the lower index, on every device). Nothing is read
    back to the host. Norms are accumulated in float32 at least.

    Args:
        params: tensors in the order of `net.parameters()`.
        HTrate: share kept, in (0, 1].
        norm: 2 or 1.
        unit: "filter" or "element", as in AHSG_HT.
        only_with_grad: leave out what has no gradient. `params` must name it all the same, or a filter's BatchNorm is not found.
    """
    _threshold(_threshold_jobs(params, HTrate, unit, only_with_grad), norm, unit)


def _threshold(jobs: dict, norm: int, unit: str) -> None:
    """H on what _threshold_jobs found."""
    additives, rows = [], []
    for (_, _, device), same in jobs.items():
        # A CPU pays for memory traffic, a GPU per kernel.
        threshold = _threshold_in_place if device.type == "cpu" else _threshold_stacked
        masks = threshold([weight for weight, _, _ in same], same[0][2], norm, unit)
        for (_, found, _), row in zip(same, masks, strict=True):
            additives += found
            rows += [row] * len(found)
    if additives:
        torch._foreach_mul_(additives, rows)


def _threshold_in_place(weights: list[Tensor], kept: int, norm: int, unit: str) -> list[Tensor]:
    """Thresholds layers of equally many units where they stand; returns the mask (units,) of each, 1 kept and 0 removed."""
    if unit == "element":
        scores = torch.stack([w.flatten().abs() for w in weights])
    else:
        # Over the dimensions: flattening a channels_last weight would copy it.
        dtype = torch.promote_types(weights[0].dtype, torch.float32)
        scores = torch.stack([torch.linalg.vector_norm(w, norm, dim=(1, 2, 3), dtype=dtype) for w in weights])
    masks = _keep_largest(scores, kept, weights[0].dtype).unbind(0)
    shapes = [w.shape if unit == "element" else (-1, 1, 1, 1) for w in weights]
    torch._foreach_mul_(weights, [mask.view(shape) for mask, shape in zip(masks, shapes, strict=True)])
    return list(masks)


def _threshold_stacked(weights: list[Tensor], kept: int, norm: int, unit: str) -> list[Tensor]:
    """As _threshold_in_place, in few kernels: layers of one shape through one copy of them side by side, all rankings in one sort."""
    shapes = defaultdict(list)
    for index, w in enumerate(weights):
        shapes[w.shape, w.stride()].append(index)
    order, scores, stacks, places = [], [], [], []
    for indices in shapes.values():
        layers = [weights[i] for i in indices]
        if unit == "element":
            stacks.append(torch.stack(layers))
            scores.append(stacks[-1].flatten(1).abs())
        else:
            # Their dimensions as they lie in memory (channels_last!), because foreach copies between different strides layer by layer.
            dims = sorted((1, 2, 3), key=lambda dim, w=layers[0]: (-w.stride(dim), w.shape[dim] == 1))
            layers = [w.permute(0, *dims) for w in layers]
            stacks.append(torch.stack(layers))
            dtype = torch.promote_types(stacks[-1].dtype, torch.float32)
            scores.append(torch.linalg.vector_norm(stacks[-1], norm, dim=(2, 3, 4), dtype=dtype))
        order += indices
        places += layers
    masks = _keep_largest(torch.cat(scores), kept, weights[0].dtype)
    results = []
    for stacked, rows in zip(stacks, masks.split([len(stacked) for stacked in stacks]), strict=True):
        factors = rows.view(-1, *stacked.shape[1:]) if unit == "element" else rows[:, :, None, None, None]
        results += stacked.mul_(factors).unbind(0)
    torch._foreach_copy_(places, results)
    return [mask for _, mask in sorted(zip(order, masks.unbind(0), strict=True), key=lambda pair: pair[0])]


def _keep_largest(scores: Tensor, kept: int, dtype: torch.dtype) -> Tensor:
    """1 for the `kept` largest scores of each row (layers, units), of equal ones those of lower index, 0 for the others."""
    if scores.device.type == "cpu" and scores.shape[1] >= CPU_LONG_ROW:
        smallest = torch.topk(scores, kept, dim=1).values[:, -1:]
        above = ~(scores <= smallest)  # nan, too, which a sort puts first
        level = scores == smallest
        room = kept - above.sum(dim=1, keepdim=True)
        return (above | (level & (level.cumsum(dim=1) <= room))).to(dtype)
    removed = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, kept:]
    return torch.ones_like(scores, dtype=dtype).scatter_(1, removed, 0)


def _threshold_jobs(params: list[Tensor], HTrate: float, unit: str, only_with_grad: bool = False) -> dict:
    """Layers to threshold, as {(units, dtype, device): [(weight, additives, kept), ...]}; layers kept whole are left out."""
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
            jobs[total, p.dtype, p.device].append((p, additives, kept))
    return jobs


def _check_options(group: dict) -> None:
    for name in ("lr", "momentum", "weight_decay", "v"):
        if not isinstance(group[name], (int, float)) or not 0 <= group[name] <= sys.float_info.max:
            raise ValueError(f"{name} must be a finite number >= 0, got {group[name]!r}")
    if not isinstance(group["dampening"], (int, float)) or not math.isfinite(group["dampening"]):
        raise ValueError(f"dampening must be a finite number, got {group['dampening']!r}")
    if not isinstance(group["nesterov"], bool):
        raise ValueError(f"nesterov must be True or False, got {group['nesterov']!r}")
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov needs momentum > 0 and dampening 0, got momentum={group['momentum']!r} and dampening={group['dampening']!r}"
        )
    if not isinstance(group["HTrate"], (int, float)) or not 0 < group["HTrate"] <= 1:
        raise ValueError(f"HTrate is the share of filters kept and must be in (0, 1], got {group['HTrate']!r}")
    for name, allowed in (("heavy_ball", HEAVY_BALLS), ("norm", NORMS), ("unit", UNITS)):
        if group[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {group[name]!r}")
    if not isinstance(group["regrow"], bool):
        raise ValueError(f"regrow must be True or False, got {group['regrow']!r}")
