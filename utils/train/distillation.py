"""Knowledge distillation: a trained teacher guides the student while it is trained and pruned.

loss = cross-entropy + kd_weight * distance(student, teacher), the distance taken between penultimate features
(the release), between the outputs of the stages, or between logits (Hinton, Vinyals, Dean, 2015, for KL).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.base.errors import UserError
from utils.train.objective import at_least_float32
from utils.train.observe import last_linear, observe

KD_ON = ("feature", "stages", "logits")


class KLLoss(nn.Module):
    """T^2 * KL(softmax(teacher/T) || softmax(student/T)), a mean over the mini-batch (Hinton et al., 2015, section 2.1).

    Args:
        temperature: T > 0. T^2 keeps the size of the gradient when T changes.

    Shapes: logits (B, classes) twice, to a scalar.
    """

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_student = F.log_softmax(student / self.temperature, dim=1)
        log_teacher = F.log_softmax(teacher / self.temperature, dim=1)
        return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * self.temperature**2


# Each takes (student, teacher) of one shape; the first three are means over all entries, as in the release.
LOSSES: dict[str, Callable[[float], nn.Module]] = {
    "MSE": lambda temperature: nn.MSELoss(),
    "L1": lambda temperature: nn.L1Loss(),
    "SmoothL1": lambda temperature: nn.SmoothL1Loss(),
    "KL": KLLoss,
}


class Distillation:
    """The objective of a distilled run; see utils.train.objective for how it is called.

    Args:
        teacher: a trained network; it is frozen and set to eval mode here, and stays so.
        student: the network that will be trained, for the widths of its features.
        images: a few images, float32 (B, C, H, W), on the device of both networks.
        on: "feature" (penultimate features), "stages" (outputs of the stages), or "logits".
        loss: a name of LOSSES; KL compares logits only.
        weight: of the distance against the cross-entropy.
        temperature: of KL.

    Attributes:
        adapters: a learned linear map per compared pair of different width (1x1 convolution for stages), from the student's
            width to the teacher's. Trained and saved, no part of the student.

    Raises:
        UserError: the two networks cannot be compared in this way.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        images: Tensor,
        *,
        on: str = "feature",
        loss: str = "MSE",
        weight: float = 1.0,
        temperature: float = 4.0,
    ):
        if loss == "KL" and on != "logits":
            raise UserError(
                f"--loss KL compares logits, got --kd_on {on}; use --kd_on logits, or --loss MSE, L1 or SmoothL1"
            )
        self.teacher = teacher.requires_grad_(False).eval()
        self.ask_teacher: Callable = self.teacher
        self.on = on
        self.weight = weight
        self.distance = LOSSES[loss](temperature)
        self.adapters = self._make_adapters(student, images)

    def __call__(self, net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy plus the weighted distance, and the student's logits (B, classes)."""
        guides = self.guides(images)
        logits, observed = observe(net, images, self.on)
        followers = [adapter(x) for adapter, x in zip(self.adapters, observed, strict=True)]
        # Under autocast too: the squares of features overflow half precision, and bfloat16 keeps 8 bits of them.
        distances = [
            self.distance(at_least_float32(x), at_least_float32(guide))
            for x, guide in zip(followers, guides, strict=True)
        ]
        logits = at_least_float32(logits)
        return F.cross_entropy(logits, labels) + self.weight * sum(distances), logits

    @torch.no_grad()
    def guides(self, images: Tensor) -> list[Tensor]:
        """What the teacher says of the images, to be compared with the student."""
        return observe(self.ask_teacher, images, self.on)[1]

    @torch.no_grad()
    def _make_adapters(self, student: nn.Module, images: Tensor) -> nn.ModuleList:
        was_training = student.training
        student.eval()
        followers = observe(student, images, self.on)[1]
        student.train(was_training)
        guides = self.guides(images)
        if len(followers) != len(guides):
            raise UserError(
                f"--kd_on {self.on}: the student has {len(followers)} stages, the teacher {len(guides)}; use --kd_on feature or logits"
            )
        adapters = nn.ModuleList()
        for number, (follower, guide) in enumerate(zip(followers, guides, strict=True), start=1):
            if follower.shape[2:] != guide.shape[2:]:
                raise UserError(
                    f"--kd_on {self.on}: stage {number} of the student is {tuple(follower.shape[2:])} pixels, of the teacher "
                    f"{tuple(guide.shape[2:])}; use --kd_on feature or logits"
                )
            widths = follower.shape[1], guide.shape[1]
            if widths[0] == widths[1]:
                adapters.append(nn.Identity())
            elif self.on == "logits":
                raise UserError(
                    f"the student has {widths[0]} classes, the teacher {widths[1]}; use a teacher of the same data set"
                )
            else:
                adapters.append(nn.Linear(*widths) if follower.dim() == 2 else nn.Conv2d(*widths, 1))
        return adapters.to(images.device)


@torch.no_grad()
def share_classifier(teacher: nn.Module, student: nn.Module) -> None:
    """Copies the teacher's last linear layer into the student's, as the release did by hand; both train on from there.

    Raises:
        UserError: the layers differ in shape.
    """
    source, target = last_linear(teacher), last_linear(student)
    if source.weight.shape != target.weight.shape:
        raise UserError(
            f"--share_classifier: the teacher's last layer is {tuple(source.weight.shape)}, the student's {tuple(target.weight.shape)}; "
            "leave --share_classifier out, or choose networks of the same width"
        )
    target.load_state_dict(source.state_dict())


def checksum(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
