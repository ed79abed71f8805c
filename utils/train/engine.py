"""One training step, what it minimises, and one pass over the test data. No step waits for the device
but with --teacher_cache and where filters are removed.

An objective is called with (net, images, labels) and returns (loss, logits): cross_entropy here, with a teacher
utils.train.distillation.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from AHSG_HT import AHSG_HT
from utils.base.errors import UserError
from utils.train.device import true_float32
from utils.train.distributed import gather, rank, sum_over_ranks, world_size

ONE_VALUE = (
    "BatchNorm has one value per channel to normalise, as a process got {} of the {} images of a mini-batch and the "
    "network makes them 1x1; use another --batch_size or --max_images_per_step, fewer processes, or larger images"
)


class OneValue(UserError):
    """BatchNorm would have to normalise one value per channel, on this rank at least."""

    of_one_rank = True


@dataclass(frozen=True)
class PassResult:
    """Means over one pass and all ranks: loss, top-1 and top-5 in percent; wall-clock seconds, images per second.

    hits: of a test pass by one process, bool (images,): whether the answer to each was right; otherwise None.
    """

    loss: float
    top1: float
    top5: float
    seconds: float
    images_per_s: float
    hits: Tensor | None = field(default=None, compare=False)


class RunningMeans:
    """Sums of loss, correct answers and images, kept on the device; reading them waits for it and for the other ranks.

    Attributes:
        sums: float64 (4,), over all images of this rank so far: loss, top-1 hits, top-5 hits, images.
        t: number of the mini-batch that is added.
        first_bad: int64, the number of the first mini-batch whose loss was not finite on this rank, -1 for none.
    """

    def __init__(self, device: torch.device, state: dict | None = None):
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
        """What a pass that is continued later starts from: the sums of every rank, float64 (ranks, 4), and the
        seconds. All ranks must call it together."""
        sums = torch.tensor(gather(self.sums.tolist()), dtype=torch.float64)
        return {"sums": sums, "seconds": time.perf_counter() - self.begin}

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Adds a mini-batch or this rank's share of one: its mean loss, logits (B, classes), labels (B,).

        Returns:
            bool (B,): whether the answer to each image was right.
        """
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        loss = loss.detach().double()
        self.sums[:3] += torch.stack([loss * len(labels), hits[:, 0].sum().double(), hits.sum().double()])
        self.sums[3] += len(labels)
        self.first_bad = torch.where(~loss.isfinite() & (self.first_bad < 0), self.t, self.first_bad)
        return hits[:, 0]

    def read(self) -> PassResult:
        """The means so far, over all ranks: every rank must read equally often."""
        *sums, images = sum_over_ranks(self.sums).tolist()
        loss, top1, top5 = (value / max(images, 1) for value in sums)
        seconds = time.perf_counter() - self.begin
        return PassResult(loss, 100 * top1, 100 * top5, seconds, images / seconds)


def at_least_float32(x: Tensor) -> Tensor:
    """x itself, or in float32 where autocast has made it narrower: losses are not taken in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the mini-batch, and the logits (B, classes)."""
    logits = at_least_float32(net(images))
    return F.cross_entropy(logits, labels), logits


def to_device(images: Tensor, labels: Tensor, device: torch.device, normalise: Callable | None = None):
    """A mini-batch where the network is; uint8 images become its input there (data.images.ImageSet.normalise)."""
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return (normalise(images) if normalise else images), labels.to(device, non_blocking=True)


def train_step(
    objective: Callable,
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    means: RunningMeans,
    *,
    device: torch.device,
    normalise: Callable | None = None,
    size: int,
    growth: float = 1.0,
    epoch: int = 0,
    final: int = 1,
    max_images: int | None = None,
    before_update: Callable[[], None] = lambda: None,
) -> None:
    """One step: the gradient of a mini-batch, and the optimizer's update.

    Args:
        objective: what is minimised; see the head of this file.
        images, labels: those of the mini-batch that this process has: all, or its rank's share, which may be empty.
            Images that could not be read are missing; they count as images without a gradient.
        normalise: makes the network's input of the images, on the device; None where they are that already.
        optimizer: AHSG_HT gets the release's calling order, any other a plain step().
        means: accumulate loss and accuracy.
        size: images of the whole mini-batch, over all processes.
        growth: size over that of the epoch's first mini-batch.
        final: 1 thresholds filters in this step, 0 does not.
        max_images: images that a process takes through the network at once, None for all. The gradient is the same but
            for BatchNorm, whose statistics are those of each part.
        before_update: called when the gradient is complete; gradual pruning removes filters there.
    """
    images, labels = to_device(images, labels, device, normalise)
    optimizer.zero_grad(set_to_none=True)
    add_gradients(net, objective, images, labels, size, max_images, means)
    before_update()
    if isinstance(optimizer, AHSG_HT):
        optimizer.update_HSG(1)
        optimizer.step(None, growth, epoch, final)
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
    """Adds the gradient of the mean over a mini-batch of `size` images to the parameters; see train_step."""
    # As many parts on every rank as the largest share needs: SyncBatchNorm waits for all ranks in each forward pass.
    largest = -(-size // world_size()) if world_size() > 1 else len(labels)
    parts = max(1, -(-largest // max_images)) if max_images else 1
    for part, (x, y) in enumerate(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)):
        if not len(y) and world_size() == 1:
            continue  # no image of it could be read
        # The ranks exchange the gradients accumulated over the parts, once.
        held_back = hasattr(objective, "no_sync") and (objective.exchanges_last or part < parts - 1)
        with objective.no_sync() if held_back else nullcontext():
            try:
                loss, logits = objective(net, x, y)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise OneValue(ONE_VALUE.format(len(y), size)) from None
            # The loss is a mean over len(y), and DistributedDataParallel divides by the number of ranks.
            weight = world_size() * len(y) / size
            (loss if weight == 1 else loss * weight).backward()
        means.add(loss, logits, y)
    if getattr(objective, "exchanges_last", False):
        objective.exchange()


@torch.no_grad()
def evaluate(
    net: nn.Module, loader, device: torch.device, *, on_batch: Callable[[], None] = lambda: None
) -> PassResult:
    """Cross-entropy and accuracy of a network, in eval mode and float32, over a loader split over ranks.

    `on_batch` is called after every mini-batch.
    """
    was_training = net.training
    net.eval()
    means, hits = RunningMeans(device), []
    with true_float32():
        for images, labels in loader:
            images, labels = to_device(images, labels, device, loader.dataset.normalise)
            if len(labels):
                logits = net(images)
                hits.append(means.add(F.cross_entropy(logits, labels), logits, labels))
            on_batch()
    net.train(was_training)
    return replace(means.read(), hits=torch.cat(hits) if hits and world_size() == 1 else None)


def format_pass(name: str, result: PassResult) -> str:
    """The release's line, `**Test** Prec@1 .. Prec@5 .. Error@1 ..`."""
    return f"  **{name}** Prec@1 {result.top1:.3f} Prec@5 {result.top5:.3f} Error@1 {100 - result.top1:.3f}"


def gather_bad_images(loader) -> list[str]:
    """Paths of the images that a loader has skipped since the last call, over all ranks."""
    if not hasattr(loader.dataset, "newly_bad"):
        return []
    return sorted({path for paths in gather(loader.dataset.newly_bad()) for path in paths})
