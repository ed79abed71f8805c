"""Distillation losses, and the terms `--kd ON:LOSS[:WEIGHT[:NAME=VALUE,...]]` that choose and weight them.

A loss is a module called with (student, teacher, labels) that returns a scalar. Student and teacher have one shape:
(B, classes) logits, (B, width) features or (B, width, H, W) stage outputs. The arguments of its __init__ are its
options, all of them numbers. It has no weights of its own. To add a loss, write such a class and enter it in LOSSES.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.base.errors import UserError

KD_ON = ("feature", "stages", "logits")


class Loss(nn.Module):
    """Base of all losses.

    Attributes:
        compares: what it can be taken between, some of KD_ON.
        same_width: whether student and teacher must be equally wide; an adapter makes them so.
    """

    compares: tuple[str, ...] = KD_ON
    same_width = True


class MSE(Loss):
    """Mean squared difference over all entries, as in AHSG-HT's release."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(student, teacher)


class L1(Loss):
    """Mean absolute difference over all entries."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return F.l1_loss(student, teacher)


class SmoothL1(Loss):
    """Mean over all entries of d^2/2 where the difference |d| < 1, of |d| - 1/2 elsewhere."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return F.smooth_l1_loss(student, teacher)


class KL(Loss):
    """T^2 * KL(softmax(teacher/T) || softmax(student/T)), a mean over rows (Hinton, Vinyals, Dean, 2015, section 2.1).

    T^2 keeps the size of the gradient when T changes.
    """

    compares = ("logits",)

    def __init__(self, T: float = 4.0):
        super().__init__()
        self.T = _temperature(T)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self.T**2 * _divergence(student / self.T, teacher / self.T)


class DKD(Loss):
    """T^2 * (alpha * TCKD + beta * NCKD) (Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, eq. 7).

    TCKD is the KL divergence between the binary distributions (label, all others), NCKD the one among the other
    classes. The authors raise the weight over the first 20 epochs; here it is constant.
    """

    compares = ("logits",)

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, T: float = 4.0):
        super().__init__()
        self.alpha, self.beta, self.T = alpha, beta, _temperature(T)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        is_label = F.one_hot(labels, student.shape[1]).bool()
        # Far below any logit, yet finite: 0 * infinity in the divergence would be nan.
        others = [(logits / self.T).masked_fill(is_label, -1e9) for logits in (student, teacher)]
        # The softmax of (label's logit, log-sum-exp of the others) is (p, 1 - p).
        binary = [
            torch.stack([logits.gather(1, labels[:, None])[:, 0] / self.T, rest.logsumexp(1)], dim=1)
            for logits, rest in zip((student, teacher), others, strict=True)
        ]
        return self.T**2 * (self.alpha * _divergence(*binary) + self.beta * _divergence(*others))


class DIST(Loss):
    """T^2 * (beta * (1 - r of rows) + gamma * (1 - r of columns)).

    r is Pearson's correlation of the probabilities softmax(logits/T) of student and teacher: over the classes within a
    row, a mean over rows; and over the rows within a class, a mean over classes (Huang et al., "Knowledge Distillation
    from A Stronger Teacher", NeurIPS 2022).
    """

    compares = ("logits",)

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, T: float = 1.0):
        super().__init__()
        self.beta, self.gamma, self.T = beta, gamma, _temperature(T)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        student, teacher = F.softmax(student / self.T, dim=1), F.softmax(teacher / self.T, dim=1)
        rows, columns = (1 - _correlation(student, teacher, dim).mean() for dim in (1, 0))
        return self.T**2 * (self.beta * rows + self.gamma * columns)


class AT(Loss):
    """Attention transfer: mean squared difference of normalised attention maps (Zagoruyko, Komodakis, ICLR 2017).

    A map is the mean over channels of the squared activations, (B, H*W), divided by its l2 norm; widths may differ. The
    mean over entries is that of the authors' code, where a weight of about 500 goes with it.
    """

    compares = ("stages",)
    same_width = False

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        maps = [F.normalize(x.square().mean(1).flatten(1), dim=1) for x in (student, teacher)]
        return F.mse_loss(*maps)


LOSSES: dict[str, type[Loss]] = {loss.__name__: loss for loss in (MSE, L1, SmoothL1, KL, DKD, DIST, AT)}


class Standardised(nn.Module):
    """A loss between logits, every row shifted by its mean and divided by its (unbiased) standard deviation first.

    Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, algorithm 1. Invariant to shift and scale
    of a row.
    """

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        rows = [(x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) for x in (student, teacher)]
        return self.loss(*rows, labels)


@dataclass(frozen=True)
class Term:
    """weight * loss taken on "feature" (penultimate features), "stages" (outputs of the stages) or "logits"."""

    on: str
    loss: str
    weight: float = 1.0
    options: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.on}:{self.loss}"

    def __str__(self) -> str:
        """As --kd takes it."""
        options = ",".join(f"{name}={value:.12g}" for name, value in self.options.items())
        return f"{self.name}:{self.weight:.12g}" + (f":{options}" if options else "")

    def make_loss(self) -> nn.Module:
        """The loss with its options."""
        options = dict(self.options)
        standardise = options.pop("standardise", 0)
        if standardise not in (0, 1):
            raise ValueError(f"standardise must be 0 or 1, got {standardise:g}")
        loss = LOSSES[self.loss](**options)
        return Standardised(loss) if standardise else loss


def parse_term(text: str) -> Term:
    """The term that a value of --kd describes, `ON:LOSS[:WEIGHT[:NAME=VALUE,...]]`.

    Raises:
        UserError: it describes none.
    """
    try:
        # Parts that are missing: no loss, weight 1, no options.
        on, loss, weight, options, *more = [*text.split(":"), *["", "1", ""][text.count(":") :]]
        if on not in KD_ON or not loss or more:
            forms = f"ON:LOSS[:WEIGHT[:NAME=VALUE,...]] with ON {', '.join(KD_ON)}, such as logits:KL:0.9:T=4"
            raise ValueError(f"must be {forms}")
        if loss not in LOSSES:
            raise ValueError(f"unknown loss '{loss}'; choose from {', '.join(LOSSES)}")
        if on not in LOSSES[loss].compares:
            able = ", ".join(name for name in LOSSES if on in LOSSES[name].compares)
            raise ValueError(f"{loss} compares {', '.join(LOSSES[loss].compares)}; on {on} use {able}")
        options_of = inspect.signature(LOSSES[loss]).parameters
        known = [name for name, p in options_of.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        required = [name for name in known if options_of[name].default is inspect.Parameter.empty]
        known += ["standardise"] * (on == "logits")
        values = dict(part.partition("=")[::2] for part in options.split(",") if part)
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"{loss} needs the option {missing[0]}, as {on}:{loss}:1:{missing[0]}=NUMBER")
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"{loss} on {on} has no option '{unknown[0]}'; its options: {', '.join(known) or 'none'}")
        term = Term(on, loss, _number("the weight", weight), {name: _number(name, v) for name, v in values.items()})
        if term.weight < 0:
            raise ValueError(f"the weight must be >= 0, got {term.weight:g}")
        term.make_loss()
    except ValueError as error:
        raise UserError(f"--kd '{text}': {error}") from None
    return term


def _number(what: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{what} must be a number, got '{text}'")
    return value


def check_terms(terms: Sequence[Term]) -> None:
    """Raises UserError where two terms take the same loss on the same outputs."""
    names = [term.name for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--kd {name} is given {names.count(name)} times; give it once")


def _temperature(T: float) -> float:
    if T <= 0:
        raise ValueError(f"the temperature T must be > 0, got {T:g}")
    return T


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)), a mean over rows."""
    log_student, log_teacher = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along a dimension."""
    return F.cosine_similarity(a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True), dim=dim)
