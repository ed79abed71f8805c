"""AHSG-HT: stochastic gradient descent with a heavy ball that hard-thresholds filters at every step.

One iteration on a mini-batch S_t (Zhou, Yuan, Feng, "Efficient Stochastic Gradient Hard Thresholding",
NeurIPS 2018, algorithm 1 with the heavy-ball acceleration of its section 4):

    x_{t+1} = H( x_t - lr * d_t + v * (x_t - x_{t-1}) ),      x_{-1} = x_0

d_t is torch's SGD direction of the mini-batch gradient (weight decay, momentum, dampening, Nesterov) and
H keeps, of every convolution, the filters of largest norm and zeroes the others. v = 0 gives HSG-HT; HTrate 1
(no thresholding) and v = 0 give torch.optim.SGD bit for bit. AHSG_HT.py makes this file importable.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["AHSG_HT", "NORMS", "following_additives", "hard_threshold", "kept_count"]

# (weight, additive parameters of its filters, number of filters or entries that stay) of every layer to threshold.
Layers = list[tuple[Tensor, list[Tensor], int]]
CPU_BLOCK_ENTRIES = 65_536  # with gradient, momentum buffer and x_{t-1} about 1 MiB
CHOICES = {"heavy_ball": ("paper", "released"), "unit": ("filter", "element")}
# What ranks filters, by the option `norm`: takes a weight (C_out, C_in, kh, kw), gives scores (C_out,), the largest
# stay. Over dimensions, because flattening a channels_last weight would copy it.
NORMS: dict[int | str, Callable[[Tensor], Tensor]] = {
    2: lambda weight: torch.linalg.vector_norm(weight, 2, dim=(1, 2, 3)),
    1: lambda weight: torch.linalg.vector_norm(weight, 1, dim=(1, 2, 3)),
}
PASS_ADDITIVES = "pass additives=, as utils.small.filters.filter_additives makes it"


class AHSG_HT(Optimizer):
    """Accelerated hybrid stochastic gradient hard thresholding.

    Per mini-batch, in the order of the authors' release (calling `step()` alone works as well)::

        loss.backward()
        optimizer.update_HSG(1)
        optimizer.step(None, k_sum, epoch, final)

    Args:
        params: parameters or parameter groups, in the order of `net.parameters()` unless `additives` is given.
        lr, momentum, dampening, weight_decay, nesterov: as in torch.optim.SGD.
        v: weight of the heavy-ball term, >= 0. It stacks with `momentum`; the release uses 0.9 and v = 0.1.
        HTrate: share of the filters that is KEPT, 0 < HTrate <= 1. 0.7 is the papers' "30 % pruned"; 1 keeps all.
        heavy_ball: "paper", the true x_{t-1}; or "released", the release's arithmetic, whose term v*(x_t - prev) is
            zero because its update_HSG(1) overwrites prev with x_t just before it is read.
        norm: what ranks filters, a key of NORMS: 2 or 1 for their l2 or l1 norm.
        unit: "filter" thresholds the filters of 4-D weights (C_out, C_in, kh, kw); "element" the single entries of
            every tensor of the group (the paper's own setting: sparse vectors).
        regrow: True, a removed filter takes part in the next step and comes back where that step makes it one of the
            largest (the paper, the release). False: what H has removed stays zero.
        additives: {4-D weight: its additive parameters (C_out,), zeroed with its filters}; a weight that is missing has
            none. utils.small.filters.filter_additives makes it from a network's structure. None: by the order of
            parameters in their group (`following_additives`), right for Conv-BatchNorm-ReLU networks. With a PReLU per
            channel or pre-activation blocks the order can be the same: it then zeroes parameters of others, so give it.

    Every 4-D weight is thresholded: a convolution that makes the logits belongs into a group of its own with HTrate=1.
    All options but `additives` are parameter-group options: groups may differ, and a schedule may change them between
    steps. `additives` is configuration, as `params` is: not in the state dict, but in copies and pickles of the
    optimizer. A parameter whose gradient is None is neither updated nor thresholded. Transposed convolutions store
    (C_in, C_out, kh, kw) and are thresholded along C_in; a group with HTrate=1 leaves them alone.

    State per parameter p: `momentum_buffer` (momentum > 0), `prev_data` (x_{t-1}; v > 0) and, optional, `kept`: 1 for
    kept and 0 for removed, of p's dtype, broadcastable to p: (C_out, 1, 1, 1) of a convolution, (C,) of a bias. p is
    multiplied by it after every update. H records it where regrow is False; a pruning schedule may set it itself.

    Raises:
        ValueError: a bad option, a layer of which nothing would be kept, an order that does not tell the additive
            parameters; RuntimeError: a sparse gradient. All before any parameter is changed.
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
        norm: int | str = 2,
        unit: str = "filter",
        regrow: bool = True,
        additives: Mapping[Tensor, Sequence[Tensor]] | None = None,
    ):
        defaults = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        defaults |= dict(v=v, HTrate=HTrate, heavy_ball=heavy_ball, norm=norm, unit=unit, regrow=regrow)
        _check_options(defaults)
        for weight, own in (additives or {}).items():
            if any(a.shape != weight.shape[:1] for a in own):
                shapes = [tuple(a.shape) for a in own]
                raise ValueError(f"additives of a weight of shape {tuple(weight.shape)} must be (C_out,), got {shapes}")
        self.additives = additives
        super().__init__(params, defaults)

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"additives": self.additives}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group; its options are checked, and that every layer to be thresholded keeps something."""
        super().add_param_group(param_group)
        try:
            self._layers(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def update_HSG(self, zero1: int = 1) -> None:
        """Sets x_{t-1} before `step`; call it once per mini-batch, after backward.

        Args:
            zero1: 1 for an ordinary mini-batch. 0: with heavy_ball="paper" x_{t-1} is forgotten, so the next step has
                no heavy-ball term; with "released" the release's `prev += x_t` (1 is its `prev = x_t`).
        """
        if zero1 not in (0, 1):
            raise ValueError(f"update_HSG: zero1 must be 0 or 1, got {zero1!r}")
        for group in self.param_groups:
            for p in group["params"]:
                if group["heavy_ball"] == "paper":
                    if zero1 == 0 and p in self.state:
                        self.state[p].pop("prev_data", None)
                elif group["v"] != 0:
                    prev = self.state[p].get("prev_data")
                    self.state[p]["prev_data"] = prev + p if zero1 == 0 and prev is not None else p.clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, k_sum: float = 1.0, epoch: int = 0, final: int = 1):
        """One iteration x_{t+1} = H(x_t - lr*d_t + v*(x_t - x_{t-1})); returns the closure's loss, or None.

        Args:
            closure: recomputes the loss and its gradients, and returns the loss.
            k_sum, epoch: size of this mini-batch over that of the first, and number of the epoch; accepted for the
                release's calling order. The gradient is a mean over the mini-batch, so nothing depends on them.
            final: 1 applies H in this step, 0 leaves it out (heavy_ball="released" applies it whatever `final` is).
        """
        if final not in (0, 1):
            raise ValueError(f"step: final must be 0 or 1, got {final!r}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [self._layers(group) for group in self.param_groups]
        updated = {p for group in self.param_groups for p in group["params"] if p.grad is not None}
        if any(p.grad.is_sparse for p in updated):
            raise RuntimeError("AHSG_HT does not support sparse gradients; use sparse=False in the embedding")
        # All checks are done; what is refused leaves every parameter as it was.
        for group in self.param_groups:
            for block in _blocks([p for p in group["params"] if p in updated]):
                self._update(block, group)
        # H comes last, since additive parameters may be in another group than their convolution.
        for group, layers in zip(self.param_groups, found, strict=True):
            if final or group["heavy_ball"] == "released":
                layers = [(w, [a for a in own if a in updated], kept) for w, own, kept in layers if w in updated]
                masks = _threshold(layers, group["norm"], group["unit"])
                for p, mask in [] if group["regrow"] else masks:
                    self.state[p]["kept"] = mask * self.state[p].get("kept", 1)
        return loss

    def _layers(self, group: dict) -> Layers:
        _check_options(group)
        return _find_layers(group["params"], group["HTrate"], group["unit"], self.additives)

    def _update(self, params: list[Tensor], group: dict) -> None:
        """x_t - lr*d_t + v*(x_t - x_{t-1}); what was removed for good stays zero."""
        states, lr, v = [self.state[p] for p in params], group["lr"], group["v"]
        directions = self._sgd_directions(params, states, group)
        if v == 0:
            torch._foreach_add_(params, directions, alpha=-lr)
            for state in states:
                state.pop("prev_data", None)
        elif group["heavy_ball"] == "released":
            # Without an update_HSG before there is no term.
            moves = torch._foreach_sub(params, [s.get("prev_data", p) for p, s in zip(params, states, strict=True)])
            torch._foreach_add_(params, directions, alpha=-lr)
            torch._foreach_add_(params, moves, alpha=v)
        else:
            prevs = [s["prev_data"] if "prev_data" in s else p.clone() for p, s in zip(params, states, strict=True)]
            torch._foreach_lerp_(prevs, params, 1 + v)  # x_t + v*(x_t - x_{t-1})
            torch._foreach_add_(prevs, directions, alpha=-lr)
            # The directions' memory is free now; new memory for x_t would cost as much as two passes over it.
            torch._foreach_copy_(directions, params)
            torch._foreach_copy_(params, prevs)
            for state, old in zip(states, directions, strict=True):
                state["prev_data"] = old
        masked = [(p, s["kept"]) for p, s in zip(params, states, strict=True) if "kept" in s]
        if masked:
            torch._foreach_mul_(*map(list, zip(*masked, strict=True)))

    def _sgd_directions(self, params: list[Tensor], states: list[dict], group: dict) -> list[Tensor]:
        """torch.optim.SGD's d_t, in new tensors and in its order of operations, so that the bits agree."""
        decay, momentum = group["weight_decay"], group["momentum"]
        gradients = [p.grad for p in params]
        directions = torch._foreach_add(gradients, params, alpha=decay) if decay else [g.clone() for g in gradients]
        if momentum == 0:
            return directions
        old = [(s["momentum_buffer"], d) for s, d in zip(states, directions, strict=True) if "momentum_buffer" in s]
        if old:
            buffers, new = map(list, zip(*old, strict=True))
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, new, alpha=1 - group["dampening"])
        for state, d in zip(states, directions, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = d.clone()  # torch's first buffer has no dampening
        buffers = [state["momentum_buffer"] for state in states]
        if group["nesterov"]:
            torch._foreach_add_(directions, buffers, alpha=momentum)
        else:
            torch._foreach_copy_(directions, buffers)
        return directions


@torch.no_grad()
def hard_threshold(
    params: list[Tensor], HTrate: float, norm: int | str = 2, unit: str = "filter", additives=None
) -> None:
    """H, in place: of every layer keeps the kept_count(n, HTrate) units of largest norm. Arguments as of AHSG_HT."""
    _threshold(_find_layers(params, HTrate, unit, additives), norm, unit)


def _blocks(params: list[Tensor]) -> list[list[Tensor]]:
    """On a CPU runs of parameters that stay in its cache from one pass to the next; elsewhere all, for few kernels."""
    blocks, room = [], 0
    for p in params:
        if room <= 0:
            blocks.append([])
            room = CPU_BLOCK_ENTRIES if p.device.type == "cpu" else math.inf
        blocks[-1].append(p)
        room -= p.numel()
    return blocks


def _find_layers(params: list[Tensor], HTrate: float, unit: str, additives: Mapping | None) -> Layers:
    """The layers that H changes; those kept whole are left out."""
    if HTrate == 1:
        return []
    if unit == "element":
        layers = [(p, [], kept_count(p.numel(), HTrate)) for p in params if p.numel()]
        return [layer for layer in layers if layer[2] < layer[0].numel()]
    at = [i for i, p in enumerate(params) if p.dim() == 4 and p.numel()]
    if additives is not None:
        owned = [list(additives.get(params[i], ())) for i in at]
    else:
        owned = [following_additives(params, i) for i in at]
        # Where norms precede convolutions, some of these have no norm behind them, and some that of another block.
        bare = [params[i].shape for i, own in zip(at, owned, strict=True) if not own]
        normed = [params[i].shape for i, own in zip(at, owned, strict=True) if own and own[-1] is not params[i + 1]]
        if bare and normed:
            raise ValueError(
                f"a norm follows the convolution of shape {tuple(normed[0])}, none that of shape {tuple(bare[0])}: the "
                f"order does not tell whose these norms are; {PASS_ADDITIVES}"
            )
    layers = [(params[i], own, kept_count(params[i].shape[0], HTrate)) for i, own in zip(at, owned, strict=True)]
    return [layer for layer in layers if layer[2] < layer[0].shape[0]]


def kept_count(total: int, HTrate: float) -> int:
    """floor(total * HTrate): how many of `total` filters are kept; ValueError where that is none."""
    # Lifted, so that 90 filters at 0.7 (62.99999999999999 in binary arithmetic) keep the 63 that the rate means.
    kept = math.floor(total * HTrate * (1 + 1e-12))
    if kept < 1:
        raise ValueError(
            f"HTrate={HTrate:g} keeps nothing of a layer with {total} filters or entries; use HTrate >= "
            f"{1 / total:.4g}, or put the layer in a parameter group with HTrate=1"
        )
    return min(kept, total)


def following_additives(params: list[Tensor], index: int) -> list[Tensor]:
    """The additive 1-D parameters (convolution bias, BatchNorm bias) of the convolution params[index], by their order.

    They are among the 1-D parameters of length C_out that follow it before the next weight (of more dimensions): [conv
    bias], [norm weight, norm bias] or [conv bias, norm weight, norm bias]. ValueError where more than three follow.
    """
    shape, run = params[index].shape, []
    for i in range(index + 1, len(params)):
        if params[i].dim() > 1:
            break
        if params[i].shape == shape[:1]:
            run.append(params[i])
    if len(run) > 3:
        raise ValueError(
            f"{len(run)} one-dimensional parameters follow a convolution of shape {tuple(shape)}, at most 3 (bias, "
            f"norm weight, norm bias) can be told apart by order; {PASS_ADDITIVES}"
        )
    return {0: [], 1: run, 2: run[1:], 3: run[::2]}[len(run)]


def _threshold(layers: Layers, norm: int | str, unit: str) -> list[tuple[Tensor, Tensor]]:
    """H in place. Returns (changed parameter, mask that broadcasts to it: 1 kept and 0 removed).

    Layers of equally many units are ranked together by one stable sort: ties keep the lower index, on every device.
    Nothing is read back to the host.
    """
    alike = defaultdict(list)
    for weight, additives, kept in layers:
        total = weight.numel() if unit == "element" else weight.shape[0]
        alike[total, kept, weight.dtype, weight.device].append((weight, additives))
    weights, additives = [], []
    for (units, kept, dtype, _), same in alike.items():
        wide = torch.promote_types(dtype, torch.float32)
        norms = [w.abs().flatten() if unit == "element" else NORMS[norm](w.to(wide)) for w, _ in same]
        removed = torch.sort(torch.stack(norms), dim=1, descending=True, stable=True).indices[:, kept:]
        masks = removed.new_ones(len(same), units, dtype=dtype).scatter_(1, removed, 0)
        filter_masks = masks[:, :, None, None, None].unbind(0)
        for (weight, own), mask, filter_mask in zip(same, masks.unbind(0), filter_masks, strict=True):
            weights.append((weight, mask.view(weight.shape) if unit == "element" else filter_mask))
            additives += [(additive, mask) for additive in own]
    for changed in filter(None, (weights, additives)):
        torch._foreach_mul_(*map(list, zip(*changed, strict=True)))
    return weights + additives


def _check_options(group: dict) -> None:
    for name in ("lr", "momentum", "weight_decay", "v", "dampening"):
        least = -sys.float_info.max if name == "dampening" else 0
        if not isinstance(group[name], (int, float)) or not least <= group[name] <= sys.float_info.max:
            raise ValueError(f"{name} must be a finite number >= {least:g}, got {group[name]!r}")
    if not isinstance(group["HTrate"], (int, float)) or not 0 < group["HTrate"] <= 1:
        raise ValueError(f"HTrate is the share of filters kept and must be in (0, 1], got {group['HTrate']!r}")
    for name in ("nesterov", "regrow"):
        if not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True or False, got {group[name]!r}")
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        got = f"momentum={group['momentum']} and dampening={group['dampening']}"
        raise ValueError(f"nesterov needs momentum > 0 and dampening 0, got {got}")
    for name, allowed in {**CHOICES, "norm": tuple(NORMS)}.items():
        if group[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {group[name]!r}")
