"""A training loop written as the authors' release writes it: what this project's loop is timed and compared against.

Every image is a PIL image that goes through torchvision's transforms by itself, in worker processes; the network is in NCHW float32;
loss and accuracies are read back with .item() at every step; filters are thresholded one by one on the host (utils.bench.per_filter_loop).
Only utils.bench.training and the tests use it. Unlike the release's, its loader has the exact length and its heavy ball is the true one,
so that both loops do the same work.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data.images import ImageArrays
from data.sampler import GrowingBatchSampler
from utils.base.torchvision_import import import_torchvision
from utils.bench.per_filter_loop import PerFilterLoop


class PilImages(Dataset):
    """The training images of an ImageArrays, one by one, flipped, cropped and normalised by torchvision."""

    def __init__(self, images: ImageArrays):
        transforms = import_torchvision().transforms
        self.pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = images.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomCrop(images.images.shape[-1], padding=4),
                transforms.ToTensor(),
                transforms.Normalize(images.mean.tolist(), images.std.tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class EpochOrder:
    """A batch sampler that begins the next epoch's permutation at every iter()."""

    def __init__(self, sampler: GrowingBatchSampler):
        self.sampler = sampler
        self.next_epoch = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self):
        self.sampler.epoch = self.next_epoch
        self.next_epoch += 1
        return iter(self.sampler)


def release_loader(images: ImageArrays, batch_size: int, k, *, seed: int, workers: int, pin_memory: bool) -> DataLoader:
    """torch's DataLoader over PIL images, with the growing mini-batch."""
    sampler = GrowingBatchSampler(len(images), batch_size, k, shuffle=True, seed=seed)
    return DataLoader(
        PilImages(images),
        batch_sampler=EpochOrder(sampler),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )


class AverageMeter:
    """The last value, and the mean so far."""

    def __init__(self):
        self.val = self.avg = self.sum = 0.0
        self.count = 0

    def update(self, value: float, n: int = 1) -> None:
        self.val = value
        self.sum += value * n
        self.count += n
        self.avg = self.sum / self.count


def accuracy(logits: Tensor, labels: Tensor, topk: tuple[int, ...]) -> list[Tensor]:
    """Accuracies in percent among the k largest logits, each a tensor of one entry."""
    _, predicted = logits.topk(max(topk), 1, True, True)
    correct = predicted.t().eq(labels.view(1, -1).expand_as(predicted.t()))
    return [correct[:k].reshape(-1).float().sum(0, keepdim=True).mul_(100.0 / labels.size(0)) for k in topk]


def train_epoch_as_released(
    net: nn.Module, loader: DataLoader, objective: Callable, optimizer: PerFilterLoop, device: torch.device, epoch: int
) -> tuple[float, float, float]:
    """One pass over the training data; mean loss, and top-1 and top-5 accuracy in percent."""
    batch_time, data_time, losses, top1, top5 = (AverageMeter() for _ in range(5))
    net.train()
    first = None
    end = time.time()
    for images, labels in loader:
        data_time.update(time.time() - end)
        images, labels = images.to(device), labels.to(device, non_blocking=True)
        first = first or images.size(0)
        loss, logits = objective(net, images, labels)
        prec1, prec5 = accuracy(logits.data, labels, topk=(1, min(5, logits.size(1))))
        losses.update(loss.item(), images.size(0))
        top1.update(prec1.item(), images.size(0))
        top5.update(prec5.item(), images.size(0))
        optimizer.sgd.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.update_HSG(1)
        optimizer.step(None, images.size(0) / first, epoch, 1)
        batch_time.update(time.time() - end)
        end = time.time()
    return losses.avg, top1.avg, top5.avg
