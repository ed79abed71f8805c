"""How much a filter is needed: the norm of its weights, its BatchNorm's |gamma|, or a first-order Taylor estimate.

    norm    l2 norm of the filter's weights for the channels that are alive
    gamma   |gamma| of the BatchNorm that follows (Liu et al., "Network Slimming", ICCV 2017)
    taylor  |gamma * dL/dgamma + beta * dL/dbeta| of that BatchNorm, the change of the loss if its output became zero,
            to first order (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019);
            |sum(w * dL/dw)| over the filter where none follows; added up over the mini-batches since the last removal

Scores of one convolution are divided by their sum over its living filters, which makes them shares of the layer,
whatever its width and the scale of its weights. With equal scores, the first convolutions of blocks then cost the same
per multiply-add in all stages of a CIFAR ResNet; divided by their mean, the first stage would go before all others.
A unit's score is the mean over the convolutions that have a filter of it, times the number of those whose outputs are
added (a depthwise one only passes a channel on): what is lost with all of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.base.errors import UserError
from utils.prune.plan import Layer, Plan


class Filters(NamedTuple):
    """What a score is made from, for the filters of one convolution, float64.

    Attributes:
        weight: (filters, inputs, kh, kw); removed inputs are 0.
        gamma: (filters,), weight of the BatchNorm that follows; None where none does.
        taylor: (filters,), Taylor estimates added up since the last removal; None for a score that does not need them.
    """

    weight: Tensor
    gamma: Tensor | None
    taylor: Tensor | None


class Score(NamedTuple):
    """A function from Filters to scores (filters,), of which the smallest go first; `needs`: "gamma" or "taylor"."""

    of: Callable[[Filters], Tensor]
    needs: str = ""


# By the names of --prune_score.
SCORES: dict[str, Score] = {
    "norm": Score(lambda filters: filters.weight.flatten(1).norm(dim=1)),
    "gamma": Score(lambda filters: filters.gamma.abs(), needs="gamma"),
    "taylor": Score(lambda filters: filters.taylor, needs="taylor"),
}


class Scores:
    """Scores of the filters of a plan's convolutions; `sums` {convolution: (filters,)} is what a mini-batch adds to.

    Raises:
        UserError: it needs gamma, and no BatchNorm with weights follows a convolution.
    """

    def __init__(self, net: nn.Module, plan: Plan, kind: str):
        self.net, self.plan, self.score = net, plan, SCORES[kind]
        self.sums: dict[str, Tensor] = {}
        frozen = [layer.norm or layer.name for layer in plan.convolutions]
        frozen = [name for name in frozen if not net.get_submodule(name).weight.requires_grad]
        if self.need_gradients and frozen:
            raise UserError(f"--prune_score {kind} needs the gradient of '{frozen[0]}', which is frozen; use norm")
        alone = [layer.name for layer in plan.convolutions if layer.norm is None]
        if self.score.needs == "gamma" and alone:
            raise UserError(
                f"--prune_score {kind} needs a BatchNorm right after every convolution and '{alone[0]}' has none; "
                "use norm or taylor"
            )

    @property
    def need_gradients(self) -> bool:
        """Whether a filter has no score before the first mini-batch."""
        return self.score.needs == "taylor"

    @torch.no_grad()
    def accumulate(self) -> None:
        """Adds this mini-batch's Taylor estimates; needs its complete gradients. Nothing is read back to the host."""
        if not self.need_gradients:
            return
        products = []
        for layer in self.plan.convolutions:
            module = self.net.get_submodule(layer.norm or layer.name)
            if module.weight.grad is None:
                return  # not one image of the mini-batch could be read
            product = module.weight * module.weight.grad
            products.append(product + module.bias * module.bias.grad if layer.norm else product.flatten(1).sum(1))
        torch._foreach_abs_(products)
        names = [layer.name for layer in self.plan.convolutions]
        if self.sums:
            torch._foreach_add_([self.sums[name] for name in names], products)
        else:
            self.sums = dict(zip(names, products, strict=True))

    def cut(self, before: Tensor, after: Tensor) -> None:
        """Follows a cut of the network, see utils.prune.shrink."""
        for layer in self.plan.convolutions if self.sums else []:
            own = self.sums[layer.name]
            self.sums[layer.name] = own[after[layer.made[before[layer.made]]].to(own.device)]

    @torch.no_grad()
    def units(self, alive: Tensor, present: Tensor) -> Tensor:
        """float64 (units,), on the CPU: the score of every living unit.

        Args:
            alive: bool per unit.
            present: bool per unit: the channels that the network still has, whose filters its layers list.
        """
        vectors = [self._filters(layer, alive, present) for layer in self.plan.convolutions]
        # The one moment at which the host waits for the device.
        on_host = torch.cat(vectors).cpu().split([len(vector) for vector in vectors])
        total, members, added = torch.zeros(3, len(alive), dtype=torch.float64)
        for layer, scores in zip(self.plan.convolutions, on_host, strict=True):
            units = layer.unit[present[layer.made]]
            living = alive[units]
            scores = scores[living] / scores[living].sum().clamp(min=torch.finfo(torch.float32).tiny)
            total.index_add_(0, units[living], scores)
            members[units[living]] += 1
            added[units[living]] += float(layer.kind == "conv")
        return total / members.clamp(min=1) * added.clamp(min=1)

    def _filters(self, layer: Layer, alive: Tensor, present: Tensor) -> Tensor:
        """float64: the scores of a convolution's filters."""
        weight = self.net.get_submodule(layer.name).weight.double()
        if layer.kind == "conv":
            # A removed channel's weights only decay: without them the masked network scores as the cut one.
            weight = weight * alive[layer.read[present[layer.read]]].to(weight).view(-1, *[1] * (weight.dim() - 2))
        gamma = self.net.get_submodule(layer.norm).weight.double() if layer.norm else None
        taylor = self.sums[layer.name].double() if self.sums else None
        return self.score.of(Filters(weight, gamma, taylor))
