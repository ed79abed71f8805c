"""One pass over the training data, one over the test data. The loop never waits for the device between two prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from AHSG_HT import AHSG_HT
from utils.errors import UserError


@dataclass(frozen=True)
class PassResult:
    """Means over one pass: loss, top-1 and top-5 in percent, wall-clock seconds, images per second."""

    loss: float
    top1: float
    top5: float
    seconds: float
    images_per_s: float


class RunningMeans:
    """Sums of loss and correct answers, kept on the device; reading them waits for it."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        self.images = 0
        self.begin = time.perf_counter()

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a mini-batch: its mean loss, logits (B, classes), labels (B,)."""
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        self.sums += torch.stack([loss.detach().double() * len(labels), hits[:, 0].sum().double(), hits.sum().double()])
        self.images += len(labels)

    def read(self) -> PassResult:
        loss, top1, top5 = (self.sums / max(self.images, 1)).tolist()
        seconds = time.perf_counter() - self.begin
        return PassResult(loss, 100 * top1, 100 * top5, seconds, self.images / seconds)


def train_epoch(
    net: nn.Module,
    loader,
    objective: Callable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    epoch: int,
    threshold_every: str = "step",
    on_step: Callable[[int, int, RunningMeans], None] = lambda t, size, means: None,
) -> PassResult:
    """One pass over the training data.

    Args:
        net: on `device`; left in training mode.
        loader: of data.DataLoader, so that the sizes of its mini-batches are known.
        objective: see utils.objective.
        optimizer: AHSG_HT gets the release's calling order, any other a plain step().
        epoch: its number, from 0.
        threshold_every: "step", or "epoch": filters are thresholded after the epoch's last mini-batch only.
        on_step: called after every mini-batch with its number, its size and the means so far.

    Raises:
        UserError: the loss is not finite.
    """
    net.train()
    sizes = loader.sizes(epoch)
    means = RunningMeans(device)
    for t, (images, labels) in enumerate(loader):
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        loss, logits = objective(net, images, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if isinstance(optimizer, AHSG_HT):
            final = int(threshold_every == "step" or t == len(sizes) - 1)
            optimizer.update_HSG(1)
            optimizer.step(None, sizes[t] / sizes[0], epoch, final)
        else:
            optimizer.step()
        means.add(loss, logits, labels)
        on_step(t, sizes[t], means)
    result = means.read()
    if not torch.isfinite(torch.tensor(result.loss)):
        rate = optimizer.param_groups[0]["lr"]
        raise UserError(
            f"the training loss of epoch {epoch} is {result.loss} at learning rate {rate:g}: lower --learning_rate; the checkpoint of the epoch before is intact"
        )
    return result


@torch.no_grad()
def evaluate(net: nn.Module, loader, device: torch.device) -> PassResult:
    """Cross-entropy and accuracy of a network, in eval mode, over a loader."""
    was_training = net.training
    net.eval()
    means = RunningMeans(device)
    for images, labels in loader:
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        logits = net(images)
        means.add(F.cross_entropy(logits, labels), logits, labels)
    net.train(was_training)
    return means.read()
