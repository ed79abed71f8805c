"""A training loop in the style of the authors' release: what this project's loop is timed and compared against.

Every image is a PIL image that goes through torchvision's transforms by itself, in worker processes; the network is in
NCHW; loss and accuracies are read back with .item() at every step; filters are thresholded one by one on the host.
Unlike the release's, its loader has the exact length and its heavy ball is the true one: both loops do the same work.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from AHSG_HT import following_additives, kept_count
from data import DataLoader, ImageArrays
from utils.base.torchvision_import import import_torchvision


class PilImages(Dataset):
    """The training images of an ImageArrays, one by one, flipped, cropped and normalised by torchvision."""

    def __init__(self, images: ImageArrays):
        transforms = import_torchvision().transforms
        self.pixels = images.images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = images.labels.tolist()
        flip = transforms.RandomHorizontalFlip()
        crop = transforms.RandomCrop(images.images.shape[-1], padding=4)
        normalise = transforms.Normalize(images.mean.tolist(), images.std.tolist())
        self.transform = transforms.Compose([flip, crop, transforms.ToTensor(), normalise])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class PerFilterLoop:
    """AHSG-HT's step, one parameter and one filter at a time.

    As in the release every filter's norm is read back to the host, numpy sorts the norms, and a loop writes zeros into
    the filters that are removed.

    Args:
        params: in the order of `net.parameters()`; every convolution is followed by its own bias and BatchNorm.
        v, HTrate: as in AHSG_HT.
        sgd: lr, momentum, weight_decay, nesterov.
    """

    def __init__(self, params: list[Tensor], v: float, HTrate: float, **sgd):
        self.params = list(params)
        self.sgd = torch.optim.SGD(self.params, foreach=False, **sgd)
        self.v = v
        self.HTrate = HTrate
        self.previous: list[Tensor] = []

    @torch.no_grad()
    def step(self) -> None:
        current = [p.clone() for p in self.params]
        self.sgd.step()
        for p, here, before in zip(self.params, current, self.previous or current, strict=True):
            p.add_(here - before, alpha=self.v)
        self.previous = current
        for index, weight in enumerate(self.params):
            if weight.dim() == 4:
                norms = np.array([float(torch.linalg.vector_norm(one)) for one in weight])
                kept = kept_count(len(norms), self.HTrate)
                for removed in np.argsort(-norms, kind="stable")[kept:].tolist():
                    weight[removed] = 0
                    for additive in following_additives(self.params, index):
                        additive[removed] = 0


def train_epoch_original(
    net: nn.Module, loader: DataLoader, objective: Callable, optimizer: PerFilterLoop, device: torch.device
) -> tuple[float, float, float]:
    """One pass over the training data; mean loss, and top-1 and top-5 accuracy in percent."""
    net.train()
    sums, count = [0.0, 0.0, 0.0], 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device, non_blocking=True)
        loss, logits = objective(net, images, labels)
        hits = logits.detach().topk(min(5, logits.size(1))).indices == labels[:, None]
        batch = (loss.item() * len(labels), 100 * hits[:, 0].sum().item(), 100 * hits.sum().item())
        sums = [total + value for total, value in zip(sums, batch, strict=True)]
        count += len(labels)
        optimizer.sgd.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
    return tuple(total / count for total in sums)
