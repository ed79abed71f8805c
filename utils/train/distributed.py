"""Several processes that train one network: torch.distributed, started by torchrun; every function here also serves a single process.

Every mini-batch of the schedule is split over the ranks (data.sampler); the shares differ in size, and one may be empty. The
gradient of the whole mini-batch's mean is sum over ranks of (n_r/n) * (mean gradient of share r). DistributedDataParallel, which
overlaps communication with the backward pass, averages over ranks, so rank r's loss is weighted with world_size * n_r/n. All
ranks then hold the same gradient to the last bit, take the same step and threshold the same filters without a word more.

CPU: gloo. GPU: nccl, and a gloo group beside it for what the hosts tell each other without waiting for their GPUs.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.base.errors import UserError
from utils.train.device import choose_device

T = TypeVar("T")

# What DistributedDataParallel calls the copying of rank 0's buffers before every forward pass: a newer and an older name.
SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
# Of the CPU: what hosts exchange. None for a single process.
_hosts: dist.ProcessGroup | None = None


class RankError(UserError):
    """A mistake that only this rank may know of: it prints it, whatever its number."""

    of_one_rank = True


class LostRank(RankError):
    """Another rank has died or does not answer."""


def world_size() -> int:
    """Number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes, prints and decides."""
    return rank() == 0


def local_world_size() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def process_group(ngpu: int | None, timeout_s: float) -> Iterator[torch.device]:
    """Joins the processes that torchrun started and gives this one's device; without torchrun, just the device.

    Args:
        ngpu: 0 for CPUs; 1 or None for a GPU per process where there are any.
        timeout_s: seconds after which a rank that does not answer is given up. One that dies is noticed at once.

    Raises:
        UserError: more processes on this machine than GPUs, or the others cannot be reached.
    """
    global _hosts
    size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    device = choose_device(ngpu)
    if size == 1:
        yield device
        return
    if device.type == "cuda":
        device = own_gpu(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count())
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        # Of its own on CPUs too: what the hosts say must not wait in line behind gradients.
        _hosts = dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankError(
            f"rank {os.environ['RANK']} of {size} cannot join the others at {address} ({first_line(error)}); "
            "check torchrun's --rdzv_endpoint and that the machines reach each other"
        ) from None
    yield device
    # Only a run that ends well says goodbye: after an error the others may not answer any more.
    _hosts = None
    dist.destroy_process_group()


def own_gpu(local_rank: int, gpus: int) -> torch.device:
    """The GPU of the process with this number on its machine.

    Raises:
        RankError: there are fewer GPUs than processes.
    """
    if local_rank >= gpus:
        raise RankError(
            f"torchrun starts {local_world_size()} processes on this machine, which has {gpus} GPU{'s' if gpus > 1 else ''}; "
            f"use --nproc_per_node {gpus}, or --ngpu 0 for CPUs"
        )
    return torch.device("cuda", local_rank)


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; it runs there only. A UserError of it ends all ranks, and rank 0 says why."""
    if world_size() == 1:
        return make()
    made, mistake = None, None
    if is_first():
        try:
            made = make()
        except UserError as error:
            mistake = error
    box = [made, mistake is not None]
    dist.broadcast_object_list(box, src=0, group=_hosts)
    if mistake is not None:
        raise mistake
    if box[1]:
        raise SystemExit(2)
    return box[0]


def on_all(make: Callable[[], T]) -> T:
    """What `make`, which must not communicate, returns on each rank. A UserError on any rank ends all, and rank 0 says which."""
    made, mistake = None, None
    try:
        made = make()
    except UserError as error:
        if world_size() == 1:
            raise
        mistake = str(error)
    mistakes = gather(mistake)
    failed = [r for r, m in enumerate(mistakes) if m is not None]
    if not failed:
        return made
    if not is_first():
        raise SystemExit(2)
    raise UserError(mistakes[0] if failed[0] == 0 else f"on rank {failed[0]}: {mistakes[failed[0]]}")


def gather(value: T) -> list[T]:
    """Every rank's `value`, by rank, on every rank. Plain Python values; what GPUs compute is not waited for."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_hosts)
    return values


def sum_over_ranks(sums: Tensor) -> Tensor:
    """A sum over ranks of a tensor on this process's device, which is not changed. Waits for nothing but the other ranks."""
    if world_size() == 1:
        return sums
    sums = sums.clone()
    dist.all_reduce(sums)
    return sums


class Agreement:
    """The largest of a number that each rank gives, one call late: call it once per mini-batch with 0, or with a signal that came.

    The exchange of one call runs beside the mini-batch that follows, so nothing waits for it; all ranks see the same number
    after the same mini-batch.
    """

    def __init__(self):
        self.work, self.value = None, None

    def __call__(self, value: int) -> int:
        known = 0
        if self.work is not None:
            self.work.wait()
            known = int(self.value)
        self.value = torch.tensor(value)
        self.work = dist.all_reduce(self.value, op=dist.ReduceOp.MAX, group=_hosts, async_op=True)
        return known


class ParallelObjective:
    """An objective whose backward pass leaves the gradient over all ranks; called as any other (utils.train.objective).

    Args:
        net, objective: what a single process would train; `objective.adapters`, where there are any, are trained with it.
        device: of both.

    With several ranks a loss must be weighted by `weight(n, size)` before backward(). An empty share is valid: its loss is 0,
    its gradients are 0, and it takes part in the exchange.
    """

    def __init__(self, net: nn.Module, objective: Callable, device: torch.device):
        self.objective = objective
        self.module = DistributedDataParallel(
            _NetworkAndObjective(net, objective),
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # Each rank's BatchNorm keeps its own running statistics; `average_batchnorm` brings them together.
            **{SYNC_BUFFERS: False},
        )

    @property
    def adapters(self) -> nn.Module | None:
        return getattr(self.objective, "adapters", None)

    def __call__(self, net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(images, labels)

    def no_sync(self):
        """A context in which gradients are added up on this rank without being exchanged."""
        return self.module.no_sync()


class _NetworkAndObjective(nn.Module):
    """One module with every parameter that is trained, as DistributedDataParallel wants it."""

    def __init__(self, net: nn.Module, objective: Callable):
        super().__init__()
        self.net = net
        self.adapters = getattr(objective, "adapters", None)
        self._objective = objective

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if len(labels):
            return self._objective(self.net, images, labels)
        # The mean and variance of nothing would spoil the running statistics. SyncBatchNorm takes those of the other ranks, who wait for it.
        own = [m for m in self.net.modules() if m.training and _has_statistics_of_its_own(m)]
        for module in own:
            module.eval()
        logits = self.net(images)
        for module in own:
            module.train()
        others = [p.sum() for p in self.adapters.parameters()] if self.adapters is not None else []
        return logits.sum() + 0 * sum(others), logits


def _has_statistics_of_its_own(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)


@torch.no_grad()
def copy_from_first(net: nn.Module) -> None:
    """Gives every rank the parameters and buffers of rank 0; the network is still on the CPU."""
    if world_size() > 1:
        for value in net.state_dict().values():
            dist.broadcast(value, src=0, group=_hosts)


@torch.no_grad()
def average_batchnorm(net: nn.Module) -> None:
    """Gives the running statistics of BatchNorm their mean over ranks: one network is tested and saved, the same everywhere.

    The update of running statistics is linear, so the mean is what one process would hold that saw the ranks' statistics in turn
    with a weight of momentum/world_size each.
    """
    if world_size() == 1:
        return
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    buffers = [b for m in norms for b in (m.running_mean, m.running_var)]
    flat = torch.cat([b.flatten() for b in buffers])
    dist.all_reduce(flat)
    flat /= world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
    # An empty share does not count as a mini-batch.
    counters = torch.stack([m.num_batches_tracked for m in norms])
    dist.all_reduce(counters, op=dist.ReduceOp.MAX)
    for module, counter in zip(norms, counters, strict=True):
        module.num_batches_tracked.copy_(counter)


def synchronise_batchnorm(net: nn.Module, device: torch.device) -> nn.Module:
    """The network with BatchNorm over all ranks; names, parameters and running statistics are the same tensors.

    Raises:
        UserError: on CPUs, where torch has no such layer.
    """
    if device.type != "cuda":
        raise UserError("--sync_bn works on GPUs only, as torch's SyncBatchNorm; leave it out")
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


def plain_batchnorm(net: nn.Module) -> nn.Module:
    """The reverse of `synchronise_batchnorm`, in place, for networks that are to be traced or saved."""
    for name, child in net.named_children():
        if isinstance(child, nn.SyncBatchNorm):
            plain = nn.BatchNorm2d(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            for own in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(plain, own, getattr(child, own))
            plain.train(child.training)
            setattr(net, name, plain)
        else:
            plain_batchnorm(child)
    return net


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone."""
    words = r"gloo|nccl|connection (was )?(closed|reset)|by peer|timed out|broken pipe"
    kind = getattr(dist, "DistError", ())
    return world_size() > 1 and (
        isinstance(error, kind)
        or (isinstance(error, RuntimeError) and bool(re.search(words, str(error), re.IGNORECASE)))
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
