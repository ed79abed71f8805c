"""Several processes that train one network: torch.distributed, started by torchrun. Everything also serves one process.

Each mini-batch of the schedule is split over the ranks (data.loader); the shares differ in size, one may be empty. The
gradient of the mean over it is the sum over ranks of (n_r/n) * (mean gradient of share r). DistributedDataParallel
averages over ranks, so rank r's loss is weighted by world_size * n_r/n. All ranks then hold the same gradient to the
last bit, take the same step and threshold the same filters with no further communication.

CPU: gloo. GPU: nccl for tensors on the GPU, and gloo for Python objects, which must not wait for the GPU.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from utils.base.errors import UserError
from utils.train.device import choose_device

T = TypeVar("T")

# gloo has no error type of its own. Lost connections and timeouts come from its transport layer and begin with the
# source line; its other errors (shapes that differ between ranks) begin with "[enforce fail at".
GLOO_TRANSPORT = re.compile(r"\[[^\s\]]*gloo[/\\]transport[/\\][^\s\]]*:\d+\] ")
DIST_TIMEOUT = 600.0
# The gloo groups for Python objects, None for a single process; in the second one ranks wait for as long as it takes.
_objects: dist.ProcessGroup | None = None
_patient: dist.ProcessGroup | None = None


class LostRank(UserError):
    """Another rank is missing, has died or does not answer. Each rank prints it, as only this one may know of it."""

    of_one_rank = True


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
def process_group(given: dict) -> Iterator[torch.device]:
    """Joins the processes that torchrun started and yields this one's device; without torchrun, just the device.

    Args:
        given: options of the command line. ngpu: 0 for CPUs; 1 or none for a GPU per process where there are any.
            dist_timeout: seconds after which a silent rank is given up; one that dies is noticed at once.

    Raises:
        LostRank: more processes on this machine than GPUs, or the others cannot be reached.
    """
    global _objects, _patient
    device = choose_device(given.get("ngpu"))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = own_gpu(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count())
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=given.get("dist_timeout", DIST_TIMEOUT))
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        # A group of its own on CPUs too: Python objects must not wait behind gradients.
        _objects = dist.new_group(backend="gloo", timeout=timeout)
        _patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LostRank(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot join the others at {place} "
            f"({first_line(error)}); check torchrun's --rdzv_endpoint and that the machines reach each other"
        ) from None
    try:
        yield device
    except RuntimeError as error:
        if is_lost_connection(error):
            raise LostRank(describe_loss(error)) from None
        raise
    # Not after an error: the other ranks may not answer any more.
    _objects = _patient = None
    dist.destroy_process_group()


def own_gpu(local_rank: int, gpus: int) -> torch.device:
    """The GPU of the process with this number on its machine; LostRank where there are fewer GPUs than processes."""
    if local_rank >= gpus:
        raise LostRank(
            f"torchrun starts {local_world_size()} processes on this machine, which has {gpus} "
            f"GPU{'s' if gpus > 1 else ''}; use --nproc_per_node {gpus}, or --ngpu 0 for CPUs"
        )
    return torch.device("cuda", local_rank)


def on_all(make: Callable[[], T], *, patient: bool = False) -> T:
    """What `make` (no communication in it) returns on each rank. A UserError on any ends all, and rank 0 prints it.

    Args:
        patient: ranks wait for each other longer than --dist_timeout; one that dies is noticed all the same.
    """
    made, message = None, None
    try:
        made = make()
    except UserError as error:
        if world_size() == 1:
            raise
        message = str(error)
    failed = [(r, text) for r, text in enumerate(gather(message, patient=patient)) if text is not None]
    if not failed:
        return made
    if not is_first():
        raise SystemExit(2)
    number, text = failed[0]
    raise UserError(text if number == 0 else f"on rank {number}: {text}")


def first_on_machine(make: Callable[[], T]) -> T:
    """What `make` returns on each rank; on every machine one rank runs it first, so that files are unpacked once."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    made = on_all(lambda: make() if first else None, patient=True)
    return on_all(lambda: made if first else make(), patient=True)


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, where alone it runs, on every rank. A UserError ends all, and rank 0 prints it."""
    made = [on_all(lambda: make() if is_first() else None)]
    if world_size() > 1:
        dist.broadcast_object_list(made, src=0, group=_objects)
    return made[0]


def gather(value: T, *, patient: bool = False) -> list[T]:
    """Every rank's `value` (plain Python or tensors on the CPU), by rank, on every rank. Does not wait for GPUs."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_patient if patient else _objects)
    return values


def sum_over_ranks(sums: Tensor) -> Tensor:
    """The sum over ranks of a tensor on this process's device, which is not changed. Does not wait for the device."""
    if world_size() == 1:
        return sums
    sums = sums.clone()
    dist.all_reduce(sums)
    return sums


class Agreement:
    """The largest of a number that each rank gives, one call late; called once per mini-batch with 0 or a signal.

    The exchange of one call runs beside the next mini-batch; all ranks see the same number after the same mini-batch.
    """

    def __init__(self):
        self.work, self.value = None, None

    def __call__(self, value: int) -> int:
        known = 0
        if self.work is not None:
            self.work.wait()
            known = int(self.value)
        self.value = torch.tensor(value)
        self.work = dist.all_reduce(self.value, op=dist.ReduceOp.MAX, group=_objects, async_op=True)
        return known


class ParallelObjective:
    """An objective (utils.train.engine) whose backward pass leaves the gradient over all ranks.

    Args:
        net, objective: what a single process would train; `objective.adapters`, if any, are trained with it.
        device: of both.

    A loss must be weighted by world_size * (images of the share) / (images of the mini-batch) before backward(). An
    empty share is valid: its loss and gradients are 0, and it takes part in the exchange. Under `no_sync()` gradients
    are added up on this rank without being exchanged; `exchange()` exchanges what has been added up.

    Attributes:
        exchanges_last: backward passes must be under no_sync(), and exchange() follows the last one. So it is with
            SyncBatchNorm, which communicates within a backward pass: a rank with an empty share would exchange its
            gradients after all of that, the others in between, and the ranks' communication would be mixed up.
    """

    def __init__(self, net: nn.Module, objective: Callable, device: torch.device):
        self.module = DistributedDataParallel(
            _NetworkAndObjective(net, objective),
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        self.no_sync = self.module.no_sync
        self.exchanges_last = any(isinstance(module, nn.SyncBatchNorm) for module in net.modules())
        # Each rank's BatchNorm keeps its own running statistics; `average_batchnorm` averages them.
        self.module.broadcast_buffers = False
        # DistributedDataParallel reorders its buckets after the first backward pass, and with them the sums over
        # three and more ranks. That happens here, with gradients of 0, so that a resumed run sums in the same order.
        for _ in range(2):
            self.exchange()
        self.module.zero_grad(set_to_none=True)

    def exchange(self) -> None:
        """Adds gradients of 0, and with them takes the mean of the gradients over all ranks."""
        self.module(None, None)[0].backward()

    def __call__(self, net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(images, labels)


class _NetworkAndObjective(nn.Module):
    """One module with every parameter that is trained, as DistributedDataParallel requires."""

    def __init__(self, net: nn.Module, objective: Callable):
        super().__init__()
        self.net = net
        self.adapters = getattr(objective, "adapters", None)
        self._objective = objective

    def forward(self, images: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        if images is not None and len(labels):
            return self._objective(self.net, images, labels)
        # Every parameter gets a gradient of 0, and the network does not run: BatchNorm has no mean of nothing.
        loss = 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        if images is not None and any(isinstance(m, nn.SyncBatchNorm) for m in self.net.modules()):
            # The other ranks wait for this one's statistics, which count for nothing.
            loss = loss + self.net(images).sum()
        return loss, loss.new_zeros(0, 1)


@torch.no_grad()
def average_batchnorm(net: nn.Module) -> None:
    """Gives the running statistics of BatchNorm their mean over ranks, so that all test and save the same network.

    Their update is linear, so the mean is what one process would hold that saw the ranks' statistics in turn with a
    weight of momentum/world_size each.
    """
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    for module in norms if world_size() > 1 else ():
        for statistic in (module.running_mean, module.running_var):
            statistic.copy_(sum_over_ranks(statistic) / world_size())
        # The largest: an empty share does not count as a mini-batch.
        dist.all_reduce(module.num_batches_tracked, op=dist.ReduceOp.MAX)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception is one that torch.distributed or gloo raises when another rank is gone."""
    if world_size() == 1:
        return False
    if isinstance(error, dist.DistBackendError):
        # ncclInvalid...: calls that are wrong, such as two ranks on one GPU.
        return "ncclInvalid" not in str(error)
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return True
    return isinstance(error, RuntimeError) and GLOO_TRANSPORT.match(str(error)) is not None


def describe_loss(error: BaseException) -> str:
    """What a rank reports when another one is gone: the cause is the first line of the error's message."""
    return f"of {world_size()} processes one has died or does not answer ({first_line(error)[:200]})"


def launcher() -> list[str]:
    """The words before the script's name in a command line that starts this run again."""
    if world_size() == 1:
        return ["python"]
    machines, nodes = world_size() // local_world_size(), []
    if machines > 1:
        # Without a common endpoint torchrun would wait on every machine for itself.
        endpoint = f"{os.environ.get('MASTER_ADDR', 'FIRST_MACHINE')}:29500"
        nodes = ["--nnodes", str(machines), "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
    return ["torchrun", *nodes, "--nproc_per_node", str(local_world_size())]


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
