"""One pass over the training data, one over the test data. The loop never waits for the device between two prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from AHSG_HT import AHSG_HT
from utils.base.errors import UserError
from utils.train.distributed import gather, rank, sum_over_ranks, world_size


@dataclass(frozen=True)
class PassResult:
    """Means over one pass and all ranks: loss, top-1 and top-5 in percent; wall-clock seconds, images per second."""

    loss: float
    top1: float
    top5: float
    seconds: float
    images_per_s: float


class RunningMeans:
    """Sums of loss, correct answers and images, kept on the device; reading them waits for it and for the other ranks.

    Attributes:
        sums: float64 (4,), over all images of this rank so far: loss, top-1 hits, top-5 hits, images.
        t: number of the mini-batch that is added.
        first_bad: int64, the number of the first mini-batch whose loss was not finite on this rank, -1 for none.
    """

    def __init__(self, device: torch.device, state: dict | None = None):
        device = torch.device("cpu") if device.type == "mps" else device
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.t = 0
        self.begin = time.perf_counter()
        if state is not None:
            sums = state["sums"]
            # The order of additions is that of an uninterrupted run where there are as many ranks as then.
            if len(sums) != world_size():
                sums = torch.cat([sums.sum(0, keepdim=True), sums.new_zeros(world_size() - 1, len(self.sums))])
            self.sums.copy_(sums[rank()])
            self.begin -= state["seconds"]

    def state_dict(self) -> dict:
        """What a pass that is continued later starts from: the sums of every rank, float64 (ranks, 4), and the seconds. All
        ranks must ask for it together."""
        sums = torch.tensor(gather(self.sums.tolist()), dtype=torch.float64)
        return {"sums": sums, "seconds": time.perf_counter() - self.begin}

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a mini-batch or this rank's share of one: its mean loss, logits (B, classes), labels (B,)."""
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        self.sums[:3] += torch.stack(
            [loss.detach().double() * len(labels), hits[:, 0].sum().double(), hits.sum().double()]
        )
        self.sums[3] += len(labels)
        bad = ~torch.isfinite(loss.detach()).to(self.first_bad.device)
        self.first_bad = torch.where(bad & (self.first_bad < 0), self.t, self.first_bad)

    def read(self) -> PassResult:
        """The means so far, over all ranks: every rank must read equally often."""
        *sums, images = sum_over_ranks(self.sums).tolist()
        loss, top1, top5 = (value / max(images, 1) for value in sums)
        seconds = time.perf_counter() - self.begin
        return PassResult(loss, 100 * top1, 100 * top5, seconds, images / seconds)


def train_epoch(
    net: nn.Module,
    loader,
    objective: Callable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    epoch: int,
    threshold_every: str = "step",
    max_images: int | None = None,
    on_step: Callable[[int, int, RunningMeans], None] = lambda t, size, means: None,
    first: int = 0,
    means: RunningMeans | None = None,
) -> PassResult:
    """One pass over the training data, or what is left of it.

    Args:
        net: on `device`; left in training mode.
        loader: of data.DataLoader, so that the sizes of its mini-batches are known.
        objective: see utils.train.objective.
        optimizer: AHSG_HT gets the release's calling order, any other a plain step().
        epoch: its number, from 0.
        threshold_every: "step", or "epoch": filters are thresholded after the epoch's last mini-batch only.
        max_images: images that a process takes through the network at once; see add_gradients.
        on_step: called after every mini-batch with its number, its size and the means so far.
        first: number of the mini-batch at which the loader stands; that of the whole epoch when nothing is left to do.
        means: those of the mini-batches before; None for new ones.

    Raises:
        UserError: no image could be read.
    """
    net.train()
    sizes = loader.sizes(epoch)
    means = means or RunningMeans(device)
    for t, (images, labels) in enumerate(loader if first < len(sizes) else (), start=first):
        images, labels = to_device(images, labels, device)
        means.t = t
        train_step(
            net,
            images,
            labels,
            objective,
            optimizer,
            means,
            t=t,
            sizes=sizes,
            epoch=epoch,
            threshold_every=threshold_every,
            max_images=max_images,
        )
        on_step(t, sizes[t], means)
    result = means.read()
    if result.images_per_s == 0:
        raise UserError(f"not one training image could be read in epoch {epoch}; check the data path")
    return result


def to_device(images: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A mini-batch where the network is, images in channels_last layout."""
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return images, labels.to(device, non_blocking=True)


def train_step(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    objective: Callable,
    optimizer: torch.optim.Optimizer,
    means: RunningMeans,
    *,
    t: int,
    sizes: list[int],
    epoch: int,
    threshold_every: str = "step",
    max_images: int | None = None,
) -> None:
    """One step: the gradient of mini-batch t of the sizes of an epoch, and the optimizer's update; see train_epoch."""
    optimizer.zero_grad(set_to_none=True)
    add_gradients(net, objective, images, labels, sizes[t], max_images, means)
    if isinstance(optimizer, AHSG_HT):
        final = int(threshold_every == "step" or t == len(sizes) - 1)
        optimizer.update_HSG(1)
        optimizer.step(None, sizes[t] / sizes[0], epoch, final)
    else:
        optimizer.step()


def add_gradients(
    net: nn.Module,
    objective: Callable,
    images: Tensor,
    labels: Tensor,
    size: int,
    max_images: int | None,
    means: RunningMeans,
) -> None:
    """Adds the gradient of the mean over a mini-batch of `size` images to the parameters.

    Args:
        images, labels: those of the mini-batch that this process has: all, or its rank's share, which may be empty. Images that could
            not be read are missing; they count as images without a gradient.
        size: of the whole mini-batch.
        max_images: the share is taken in parts of at most so many images, None for at once. The gradient is the same but for
            BatchNorm, whose statistics are those of each part.
        means: get the losses and answers.
    """
    # As many parts on every rank as the largest share needs: SyncBatchNorm waits for all ranks in each forward pass.
    largest = -(-size // world_size()) if world_size() > 1 else len(labels)
    parts = max(1, -(-largest // max_images)) if max_images else 1
    for part, (x, y) in enumerate(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)):
        # The ranks exchange what has been added up over the parts, once.
        held_back = part < parts - 1 and hasattr(objective, "no_sync")
        with objective.no_sync() if held_back else nullcontext():
            loss, logits = objective(net, x, y)
            # The loss is a mean over len(y), and DistributedDataParallel divides by the number of ranks.
            weight = world_size() * len(y) / size
            (loss if weight == 1 else loss * weight).backward()
        means.add(loss, logits, y)


@torch.no_grad()
def evaluate(
    net: nn.Module, loader, device: torch.device, *, on_batch: Callable[[], None] = lambda: None
) -> PassResult:
    """Cross-entropy and accuracy of a network, in eval mode, over a loader whose mini-batches are split over ranks.

    `on_batch` is called after every mini-batch.
    """
    was_training = net.training
    net.eval()
    means = RunningMeans(device)
    for images, labels in loader:
        images, labels = to_device(images, labels, device)
        if len(labels):
            logits = net(images)
            means.add(F.cross_entropy(logits, labels), logits, labels)
        on_batch()
    net.train(was_training)
    return means.read()
