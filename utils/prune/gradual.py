"""Gradual pruning: filters are removed while the network trains, a few at a time or at once, and cut out of it.

    pruning = GradualPruning(net, optimizer, images, steps=epochs * len(loader), macs_cut=0.5)
    ...
    loss.backward()
    pruning.before_step(step)
    optimizer.step()
    ...
    pruning.cut(step + 1)  # after an epoch: new, smaller parameters: compile and wrap the network again

Nothing is removed before `begin`; then the removed share grows as 1 - (1 - x)^3 until `end` (Zhu, Gupta, "To prune, or
not to prune", 2017), fast at first, when most filters are still there to take over; then it is fixed.
"""

import torch
from torch import Tensor, nn

from utils.base.errors import UserError
from utils.prune.allocation import floors, out_of_reach, rate_for, remove_to, remove_where_cheap, uniform
from utils.prune.plan import CONVOLUTIONS, Plan, make_plan, row_tensors
from utils.prune.scores import SCORES, Scores
from utils.prune.shrink import FOLLOWS, shrink

ALLOCATIONS = ("uniform", "global")
# Removals between begin and end, at least, where there are as many steps. Fewer would take several filters of a layer
# at once; more would change little, as a layer of 64 filters that loses 30 % loses 19. Each waits for the device.
REMOVALS = 50


class GradualPruning:
    """Removes filters of a network in training.

    A removed filter is zero, with its additive parameters (convolution bias, BatchNorm bias), BatchNorm's running mean,
    momentum and x_{t-1}. `optimizer.state[p]["kept"]`, 1 or 0 for each of a parameter's filters, tells the optimizer to
    multiply p by it after every update.

    Args:
        net: the network itself, not a compiled or wrapped one. It is cut in place.
        optimizer: an AHSG_HT of its parameters, and possibly others.
        example: images (B, C, H, W) of the size that is trained on; their values do not matter.
        steps: mini-batches of the whole run.
        begin, end: shares of them, 0 <= begin <= end <= 1. Both 0: everything is removed before the first step, or with
            a score that needs gradients in it.
        HTrate: share of the filters that every convolution keeps in the end, rounded down.
        macs_cut: instead of HTrate, the share of the multiply-adds of `net` as it is given that is removed at least.
        score: one of utils.prune.scores.SCORES.
        tied: channels that are added together go together; False: every convolution by itself, as in the papers.
        round_to: widths are multiples of it, the nearest ones.
        allocation: "uniform": the same rate in every convolution. "global": wherever a multiply-add costs the smallest
            score, until as many are saved as `macs_cut` says, or as the uniform rate saves; every layer keeps a tenth.
        shrink: False: filters stay in the network as zeros.
        state: of `state_dict`, for a run that goes on: `net` may be narrowed already, and the target is the saved one.

    Attributes:
        plan: what can be removed, see utils.prune.plan.
        alive: bool per unit, not removed yet.
        present: bool per unit, not cut out yet.

    Raises:
        UserError: an argument out of its range, a cut that cannot be reached, or a network without a filter to remove.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        example: Tensor,
        *,
        steps: int,
        begin: float = 0.2,
        end: float = 0.6,
        HTrate: float = 1.0,
        macs_cut: float | None = None,
        score: str = "norm",
        tied: bool = True,
        round_to: int = 1,
        allocation: str = "uniform",
        shrink: bool = True,
        state: dict | None = None,
    ):
        check_options(begin, end, HTrate, macs_cut, score, allocation)
        self.net, self.optimizer, self.shrinks = net, optimizer, shrink
        self.score, self.allocation, self.round_to = score, allocation, round_to
        # The last step of a run is its number of steps less one.
        self.first, self.last = (min(round(share * steps), steps - 1) for share in (begin, end))
        self.every = max(1, (self.last - self.first) // REMOVALS)
        if state is not None:
            self.load_state_dict(state)
            return
        self.plan = make_plan(net, example, tied)
        self.scores = Scores(net, self.plan, score)
        self.alive = torch.ones_like(self.plan.removable)
        self.present = torch.ones_like(self.plan.removable)
        self.done = False
        self.rate, self.goal = self._target(HTrate, macs_cut)

    def _target(self, HTrate: float, macs_cut: float | None) -> tuple[float, float]:
        """(uniform: share of the filters that is kept, global: largest number of multiply-adds)."""
        plan, full = self.plan, self.plan.multiply_adds(self.plan.full)
        rate = HTrate
        for layer in plan.convolutions if macs_cut is None else ():
            if len(layer.made) * HTrate * (1 + 1e-12) < 1:
                raise UserError(
                    f"--HTrate {HTrate:g} keeps nothing of '{layer.name}', which has {len(layer.made)} filters; use "
                    f"{1 / len(layer.made):g} or more"
                )
        if macs_cut is not None and self.allocation == "uniform":
            rate = rate_for(plan, macs_cut, self.round_to)
        goal = plan.multiply_adds(uniform(plan, rate, self.round_to)) if macs_cut is None else (1 - macs_cut) * full
        if goal == full:
            raise UserError(
                f"--HTrate {HTrate:g} with widths that are multiples of {self.round_to} removes nothing; use a smaller "
                "--HTrate or --round_to"
            )
        least = floors(plan, self.round_to)
        if self.allocation == "global" and plan.multiply_adds(least) > goal:
            remedy = {"remedy": f"use a larger --HTrate than {HTrate:g}"} if macs_cut is None else {}
            raise out_of_reach(plan, 1 - goal / full, least, **remedy)
        return rate, goal

    # -- in training --

    @torch.no_grad()
    def before_step(self, step: int) -> str | None:
        """Once per mini-batch, between backward and the optimizer's step.

        Gradients are complete, and equal on all processes, which then remove the same filters. Where `at_once`, none
        are needed.

        Args:
            step: mini-batches of the run before this one.

        Returns:
            Where filters were removed, a line for the log.
        """
        if self.done or step < self.first:
            return None
        self.scores.accumulate()
        if self.scores.need_gradients and not self.scores.sums:
            return None  # no image of these mini-batches could be read
        if step < self.last and (step == self.first or (step - self.first) % self.every):
            return None
        self.done = step >= self.last
        share = 1.0 if self.done else 1 - (1 - (step - self.first) / (self.last - self.first)) ** 3
        scores = self.scores.units(self.alive, self.present)
        self.scores.sums = {}
        before = self.alive
        if self.allocation == "global":
            full = self.plan.multiply_adds(self.plan.full)
            goal = full - share * (full - self.goal)
            self.alive = remove_where_cheap(self.plan, before, scores, goal, self.round_to)
        else:
            rates = (self.rate, 1 - share * (1 - self.rate))
            # Part of a layer may shrink and grow with the rate, as the others do; it does not fall below its end.
            kept = torch.maximum(*(uniform(self.plan, rate, self.round_to) for rate in rates))
            self.alive = remove_to(self.plan, before, scores, kept)
        if torch.equal(self.alive, before):
            return None
        self._zero_removed()
        was, now = (sum(int(units[c.unit].sum()) for c in self.plan.convolutions) for units in (before, self.alive))
        text = f"step {step}: {was - now} filters removed, {now} left; {self._costs(self.alive)}"
        return f"{text}; {self._widths()}" if self.allocation == "global" else text

    @property
    def at_once(self) -> bool:
        """Whether everything can be removed without a mini-batch. Then call before_step and cut at the start, so that
        the small network is trained from the beginning. Scores that need gradients wait for the first ones.
        """
        return not (self.done or self.last or self.scores.need_gradients)

    @property
    def can_cut(self) -> bool:
        """Whether something was removed since the last cut that can be cut out."""
        gone = self.present & ~self.alive
        return self.shrinks and any(bool(gone[layer.made].any()) for layer in self.plan.layers)

    def cut(self, step: int) -> str | None:
        """Cuts out of the network what was removed since the last cut.

        Args:
            step: the next one, for the text.

        Returns:
            Where the network was cut, a line for the log. Some of its parameters are new then, in the optimizer too:
            what holds on to the old ones (DistributedDataParallel, a compiled network) must be made again.
        """
        if not self.can_cut:
            return None
        after = self.present & self.alive
        self.scores.cut(self.present, after)
        shrink(self.net, self.optimizer, self.plan, self.present, after)
        self.present = after
        self._zero_removed()
        return f"network cut before step {step}: {self._costs(self.alive)}; {self._widths()}"

    @torch.no_grad()
    def _zero_removed(self) -> None:
        """Zeroes what is removed and still in the network, and tells the optimizer to keep it so."""
        optimized = {p for group in self.optimizer.param_groups for p in group["params"]}
        for layer in self.plan.layers:
            living = self.alive[layer.unit[self.present[layer.made]]]
            for tensor in row_tensors(self.net, layer):
                state = self.optimizer.state[tensor] if tensor in optimized else {}
                state.pop("kept", None)
                if living.all():
                    continue
                mask = living.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.device, tensor.dtype)
                for value in [tensor, *(state[name] for name in FOLLOWS if name in state)]:
                    value.mul_(mask)
                if tensor in optimized:
                    state["kept"] = mask

    # -- what is kept --

    @property
    def present_filters(self) -> dict[str, list[int]]:
        """{name of a layer's weight: its filters that the network still has, by their indices in the unpruned one}."""
        layers = [layer for layer in self.plan.layers if layer.kind not in ("norm", "pad")]
        return {f"{layer.name}.weight": self.present[layer.made].nonzero().flatten().tolist() for layer in layers}

    @property
    def alive_filters(self) -> dict[str, list[int]]:
        """{name of a convolution's weight: its filters that are not removed, by their indices in the unpruned
        network}.
        """
        layers = [layer for layer in self.plan.layers if layer.kind in CONVOLUTIONS]
        return {f"{layer.name}.weight": self.alive[layer.unit].nonzero().flatten().tolist() for layer in layers}

    def plan_text(self) -> str:
        """Before training: the schedule, what will be left (uniform) and what is kept, and why."""
        plan = self.plan
        grows = f"a share that grows every {self.every} steps to {self.last}"
        steps = f"nothing before step {self.first}, then {grows if self.first < self.last else 'everything'}"
        steps = steps if self.last else f"everything {'in' if self.scores.need_gradients else 'before'} the first step"
        lines, full = [f"pruning by {self.score}, {self.allocation}, removes {steps}"], plan.multiply_adds(plan.full)
        if self.allocation == "uniform":
            everything = torch.ones_like(self.alive)
            end = remove_to(plan, everything, everything.double(), uniform(plan, self.rate, self.round_to))
            width = max(len(c.name) for c in plan.convolutions)
            lines.append(f"{'convolution':{width}}  filters  kept")
            lines += [f"{c.name:{width}}  {len(c.made):7d}  {int(end[c.unit].sum()):4d}" for c in plan.convolutions]
            # Widths are whole numbers: a cut that is asked for is seldom met to the digit.
            more = plan.multiply_adds(plan.count(end)) < self.goal
            asked = f"; at least {100 * (1 - self.goal / full):.1f} % of the multiply-adds were to go" if more else ""
            lines.append(f"rate {self.rate:.4g}: {self._costs(end)}{asked}")
        else:
            lines.append(
                f"multiply-adds {full:,} -> {int(self.goal):,} ({100 * (self.goal / full - 1):+.1f} %) or less"
            )
        lines += [f"not cut out: {name}: {reason}" for name, reason in plan.reasons.items()]
        return "\n".join(lines)

    def _costs(self, alive: Tensor) -> str:
        texts = []
        for name, cost in (("multiply-adds", self.plan.multiply_adds), ("parameters", self.plan.parameters)):
            full, now = cost(self.plan.full), cost(self.plan.count(alive))
            texts.append(f"{name} {full:,} -> {now:,} ({100 * (now / full - 1):+.1f} %)")
        return ", ".join(texts)

    def _widths(self) -> str:
        """Filters left of every convolution, in the order of the network."""
        return "widths " + " ".join(str(int(self.alive[c.unit].sum())) for c in self.plan.convolutions)

    # -- resumption --

    def state_dict(self) -> dict:
        """Tensors and plain values; with the network's and the optimizer's the run continues exactly, at any step."""
        return {
            "plan": self.plan.state(),
            "alive": self.alive,
            "present": self.present,
            "done": self.done,
            "rate": self.rate,
            "goal": self.goal,
            "sums": {name: value.clone() for name, value in self.scores.sums.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues from a state; call it after the optimizer's own. The network has the widths that it had then."""
        self.plan = Plan.of_state(state["plan"])
        self.alive, self.present = state["alive"].cpu(), state["present"].cpu()
        self.done, self.rate, self.goal = state["done"], state["rate"], state["goal"]
        self.scores = Scores(self.net, self.plan, self.score)
        device = next(self.net.parameters()).device
        self.scores.sums = {name: value.to(device, copy=True) for name, value in state["sums"].items()}
        self._zero_removed()


def check_options(begin: float, end: float, HTrate: float, macs_cut: float | None, score: str, allocation: str) -> None:
    """Refuses values that no network could be pruned with; UserError."""
    for name, share in (("begin", begin), ("end", end)):
        if not 0 <= share <= 1:
            raise UserError(f"--prune_{name} {share:g} is no share of the steps; give a number from 0 to 1")
    if begin > end:
        raise UserError(f"--prune_begin {begin:g} is after --prune_end {end:g}; give both, the begin not after the end")
    if macs_cut is not None and not 0 < macs_cut < 1:
        raise UserError(f"--macs_cut {macs_cut:g} is no share of the multiply-adds; give a number between 0 and 1")
    if macs_cut is not None and HTrate != 1:
        raise UserError(f"--macs_cut {macs_cut:g} and --HTrate {HTrate:g} both say how much is removed; leave one out")
    if macs_cut is None and not 0 < HTrate < 1:
        raise UserError(f"--HTrate {HTrate:g} removes nothing gradually; give one between 0 and 1, or --macs_cut")
    for flag, value, allowed in (("prune_score", score, SCORES), ("allocation", allocation, ALLOCATIONS)):
        if value not in allowed:
            raise UserError(f"--{flag} '{value}' is unknown; choose one of {', '.join(allowed)}")
