"""The growing mini-batch: which samples make up mini-batch t of an epoch, and a DataLoader that hands them out.

Zhou, Yuan, Feng (NeurIPS 2018) let the mini-batch of hybrid stochastic gradient hard thresholding grow as
s_t = s_0*(1+k)^t; the authors' release grows it linearly within each epoch (64 -> 128). The order of samples is a
function of (seed, epoch): a position in the training is two integers, every process computes its share without
communication.
"""

import math
import os
import shutil
from collections.abc import Iterator, Sized
from itertools import islice

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset, Sampler, default_collate

from utils.base.errors import UserError

K_MEANINGS = (
    "k must be None (--k none: constant batch_size), a step size 0 < k < 1 (mini-batch t has "
    "floor(batch_size*(1+k*t)) samples), or a cap k >= batch_size (mini-batch t has batch_size+4*t samples, up to k)"
)
GROWTHS = ("linear", "exponential")
# The release adds four samples per mini-batch when k is the cap.
CAP_INCREMENT = 4
# Workers hand their mini-batches over through files in this folder.
SHARED_MEMORY = "/dev/shm"


class DataLoader(TorchDataLoader):
    """torch.utils.data.DataLoader with the mini-batch schedule `k`.

    In each epoch mini-batch t = 0, 1, ... has
      k=None:             batch_size samples, as in torch;
      0 < k < 1:          floor(batch_size*(1+k*t)), up to max_batch_size (default 2*batch_size);
      k >= batch_size:    batch_size+4*t, up to k (the release's `--batch_size 64 --k 128`).

    `len(loader)` is the exact number of mini-batches of the current epoch, `loader.sizes()` their sizes. Every sample
    comes once per epoch. Each `iter(loader)` is the next epoch; `set_epoch` chooses one.

    Args:
        dataset: map-style. One with `__getitems__(indices)` and `returns_batches = True` makes whole mini-batches; they
            are not collated.
        batch_size: samples in the first mini-batch, over all ranks together.
        sampler: gives the order instead of shuffle; batch_sampler: replaces the schedule, so k must be None.
        growth, restart, max_batch_size, num_replicas, rank: see GrowingBatchSampler. The last two default to those of
            torch.distributed; with a `sampler` to one process, as a DistributedSampler has taken the share already.
        seed: of the order and of the workers' random numbers, which depend on (seed, epoch) alone; None draws one from
            torch's global generator (0 with several ranks, which must agree).
        torch_options: further keywords of torch's. A `generator` of your own is never reseeded here.

    Raises:
        ValueError: an argument out of range; an invalid k names the three meanings above.
    """

    def __init__(
        self,
        dataset,
        batch_size: int = 1,
        k: float | None = None,
        shuffle: bool = False,
        sampler=None,
        batch_sampler=None,
        num_workers: int = 0,
        collate_fn=None,
        pin_memory: bool = False,
        drop_last: bool = False,
        *,
        growth: str = "linear",
        restart: bool = True,
        max_batch_size: int | None = None,
        seed: int | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        **torch_options,
    ):
        if isinstance(dataset, IterableDataset):
            raise ValueError("an IterableDataset has no indices to order; use torch.utils.data.DataLoader")
        if sampler is not None and shuffle:
            raise ValueError("sampler and shuffle exclude each other: the sampler gives the order")
        in_group = dist.is_available() and dist.is_initialized() and sampler is None
        num_replicas = num_replicas if num_replicas is not None else dist.get_world_size() if in_group else 1
        rank = rank if rank is not None else dist.get_rank() if in_group else 0
        if seed is None:
            seed = int(torch.randint(2**31, ())) if num_replicas == 1 else 0
        if batch_sampler is None:
            order = len(dataset) if sampler is None else sampler
            options = dict(shuffle=shuffle, drop_last=drop_last, seed=seed, num_replicas=num_replicas, rank=rank)
            options |= dict(growth=growth, restart=restart, max_batch_size=max_batch_size)
            batch_sampler = GrowingBatchSampler(order, batch_size, k, **options)
        elif k is not None or shuffle or drop_last or sampler is not None or batch_size != 1:
            raise ValueError(
                f"batch_sampler replaces batch_size, k, shuffle, sampler and drop_last; got k={k!r} beside it"
            )
        if collate_fn is None:
            collate_fn = _unchanged if getattr(dataset, "returns_batches", False) else _collate_share
        self.seed = seed
        self._grows = isinstance(batch_sampler, GrowingBatchSampler)
        self._seed_workers = torch_options.get("generator") is None
        if self._seed_workers:
            torch_options["generator"] = torch.Generator()
        torch_options |= dict(num_workers=num_workers, collate_fn=collate_fn, pin_memory=pin_memory)
        super().__init__(dataset, batch_sampler=batch_sampler, **torch_options)
        self._epoch = 0  # of the next iter(), or the current one
        self._position = 0  # mini-batches of epoch _epoch that were handed out
        # Identifies the iterator of epoch _epoch, once it has begun; older ones change nothing any more.
        self._pass = None

    @property
    def epoch(self) -> int:
        """Number of the epoch being iterated, or of the one that the next iter() begins."""
        return self._epoch

    def sizes(self, epoch: int | None = None) -> list[int]:
        """Sizes of the mini-batches of an epoch (the current one by default), over all ranks together."""
        return self.batch_sampler.sizes(self._epoch if epoch is None else epoch)

    def close(self) -> None:
        """Ends persistent workers now rather than with the process; the next iter() starts new ones."""
        iterator, self._iterator = getattr(self, "_iterator", None), None
        if iterator is not None:
            iterator._shutdown_workers()

    def set_epoch(self, epoch: int) -> None:
        """The next iter() begins this epoch, from its first mini-batch."""
        if not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch must be a whole number >= 0, got {epoch!r}")
        self._move_to(epoch, 0)

    def state_dict(self) -> dict:
        """{"seed", "epoch", "position"}: position counts the mini-batches of that epoch that were handed out."""
        return {"seed": self.seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict) -> None:
        """The next iter() continues where `state_dict` was taken: the same remaining mini-batches of the same epoch."""
        seed, epoch, position = (state[name] for name in ("seed", "epoch", "position"))
        if not all(isinstance(value, int) for value in (seed, epoch, position)) or epoch < 0 or position < 0:
            raise ValueError(f"a loader's state is whole numbers, epoch and position >= 0; got {state!r}")
        self.seed = seed
        if self._grows:
            self.batch_sampler.seed = seed
        if position and position >= len(self.sizes(epoch) if self._grows else self.batch_sampler):
            epoch, position = epoch + 1, 0
        self._move_to(epoch, position)

    def _move_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position, self._pass = epoch, position, None
        if self._grows:
            self.batch_sampler.epoch = epoch

    def __iter__(self):
        if self._pass is not None:
            self._move_to(self._epoch + 1, 0)
        this_pass = self._pass = object()
        epoch, skip = self._epoch, self._position
        if self._grows:
            self.batch_sampler.epoch, self.batch_sampler.start = epoch, skip
            skip = 0
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        if self._seed_workers:
            # torch draws the workers' seeds from it.
            self.generator.set_state(seeded_generator(self.seed, epoch, purpose=2).get_state())
        # A batch_sampler of the user's own starts at its beginning: what was handed out is made again.
        for batch in islice(super().__iter__(), skip, None):
            if self._pass is this_pass:
                self._position += 1
            yield batch
        if self._pass is this_pass:
            self._move_to(epoch + 1, 0)


def check_shared_memory(loader: DataLoader, *, epochs: int = 1, processes: int = 1) -> None:
    """Raises UserError if mini-batches of workers may not fit into /dev/shm, where the run would die with a bus error.

    Counted at worst: every worker has prefetched the largest mini-batches, and one is in use.

    Args:
        loader: over an image data set of this package.
        epochs: of the run; without restart the mini-batch grows over all of them.
        processes: training processes on this machine, each with such a loader.
    """
    if not loader.num_workers or not os.path.isdir(SHARED_MEMORY):
        return
    largest = max([*loader.sizes(0), *loader.sizes(epochs - 1)], default=0)
    images = -(-largest // loader.batch_sampler.num_replicas)
    batches = loader.num_workers * loader.prefetch_factor + 1
    needed = processes * batches * images * math.prod(loader.dataset.image_shape)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, {processes * loader.num_workers} workers with "
            f"{loader.prefetch_factor} mini-batches of {images} images each may need {needed / 2**20:.0f}; use fewer "
            "--workers, a smaller --prefetch_factor or --batch_size, or enlarge it (docker run --shm-size)"
        )


def first_images(dataset, count: int) -> torch.Tensor:
    """The first readable images of an image data set, normalised (B, C, H, W), B <= count: the same on every rank.

    Raises:
        UserError: there is none.
    """
    for images, _ in DataLoader(dataset, count, num_replicas=1, rank=0):
        if len(images):
            return dataset.normalise(images)
    raise UserError("not one image of the data can be read; check the data path")


def _unchanged(batch):
    return batch


def _collate_share(samples):
    """An empty share of a mini-batch (fewer samples than ranks) comes through as []."""
    return default_collate(samples) if samples else []


class GrowingBatchSampler(Sampler[list[int]]):
    """Yields lists of indices whose length grows over the epoch, or over the whole training.

    Args:
        sampler: a number of samples N, whose indices 0..N-1 are ordered here, or an iterable of indices with a length.
        batch_size: samples in mini-batch 0, over all ranks together, as all sizes here.
        k: None, a step size in (0, 1), or a cap >= batch_size; see K_MEANINGS.
        growth: "linear" (the release), or "exponential": batch_size*(1+k)^t (the paper), for a step size only.
        max_batch_size: bound for a step size; None: 2*batch_size for linear growth, no bound for exponential growth.
        shuffle: with a number of samples, a new permutation every epoch, from (seed, epoch).
        drop_last: leave out a last mini-batch that is shorter than the schedule asks for.
        restart: True starts the schedule again every epoch (the release); False continues it (the paper).
        seed: of the permutations; the same on every rank.
        num_replicas, rank: rank r of R takes entries r, r+R, r+2R, ... of the mini-batch that one process would get. A
            share may be empty when the mini-batch has fewer samples than there are ranks.

    Raises:
        ValueError: an argument out of range, named with its value.
    """

    def __init__(
        self,
        sampler: Sized | int,
        batch_size: int,
        k: float | None = None,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        growth: str = "linear",
        restart: bool = True,
        max_batch_size: int | None = None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ):
        _check_schedule(batch_size, k, growth, max_batch_size)
        if not (isinstance(num_replicas, int) and isinstance(rank, int) and 0 <= rank < num_replicas):
            raise ValueError(f"rank must be in 0..num_replicas-1, got rank={rank!r} and num_replicas={num_replicas!r}")
        if not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, got {seed!r}")
        self.sampler, self.shuffle, self.drop_last, self.restart = sampler, shuffle, drop_last, restart
        self.batch_size, self.k, self.growth, self.max_batch_size = batch_size, k, growth, max_batch_size
        self.num_replicas, self.rank = num_replicas, rank
        self.seed = seed
        self.epoch = self.start = 0
        self._first_t_of = [0]

    def sizes(self, epoch: int | None = None) -> list[int]:
        """Sizes of the mini-batches of one epoch (the current one by default), over all ranks together."""
        epoch = 0 if self.restart else self.epoch if epoch is None else epoch
        while len(self._first_t_of) <= epoch:
            before = self._first_t_of[-1]
            self._first_t_of.append(before + len(self._sizes_from(before)))
        return self._sizes_from(self._first_t_of[epoch])

    def _size_at(self, t: int) -> int:
        """Samples in mini-batch t of the schedule, before the end of the data cuts it short."""
        first, k = self.batch_size, self.k
        if k is None or k >= 1:
            return first if k is None else min(first + CAP_INCREMENT * t, int(k))
        if self.growth == "exponential":
            # In logarithms, because (1+k)^t overflows long before a bound that is far away matters.
            exponent = math.log(first) + t * math.log1p(k)
            size = math.inf if exponent > 40 else first * (1 + k) ** t
            bound = self.max_batch_size or 2**40
        else:
            size = first * (1 + k * t)
            bound = self.max_batch_size or 2 * first
        # The factor lifts products such as 28.999999999999996 to the decimal number that was meant.
        return bound if size >= bound else math.floor(size * (1 + 1e-12))

    def _sizes_from(self, t: int) -> list[int]:
        sizes, left = [], self.sampler if isinstance(self.sampler, int) else len(self.sampler)
        while left > 0:
            wanted = self._size_at(t)
            if wanted > left and self.drop_last:
                break
            sizes.append(min(wanted, left))
            left -= sizes[-1]
            t += 1
        return sizes

    def __len__(self) -> int:
        return len(self.sizes())

    def __iter__(self) -> Iterator[list[int]]:
        """Mini-batches of epoch `self.epoch`, from number `self.start` on; `start` returns to 0."""
        sizes, skip, self.start = self.sizes(), self.start, 0
        if not isinstance(self.sampler, int):
            order = list(self.sampler)
        elif self.shuffle:
            order = torch.randperm(self.sampler, generator=seeded_generator(self.seed, self.epoch)).tolist()
        else:
            order = range(self.sampler)
        begin = sum(sizes[:skip])
        for size in sizes[skip:]:
            yield list(order[begin : begin + size][self.rank :: self.num_replicas])
            begin += size


def seeded_generator(seed: int, epoch: int, purpose: int = 0) -> torch.Generator:
    """A generator for one epoch of one seed and one purpose (order of samples, augmentation, ...)."""
    # The large factors keep neighbours apart (seed 1 in epoch 2, seed 2 in epoch 1).
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch * 0x9E3779B1 + purpose * 0xC2B2AE3D27 + 1) % 2**63)


def _check_schedule(batch_size: int, k: float | None, growth: str, max_batch_size: int | None) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
    if growth not in GROWTHS:
        raise ValueError(f"growth must be one of {GROWTHS}, got {growth!r}")
    is_number = isinstance(k, (int, float)) and not isinstance(k, bool) and -math.inf < k < math.inf
    is_step = is_number and 0 < k < 1
    is_cap = is_number and k >= batch_size and k == int(k)
    if k is not None and not is_step and not is_cap:
        raise ValueError(f"{K_MEANINGS}; got k={k!r} with batch_size={batch_size}")
    if growth == "exponential" and not is_step:
        raise ValueError(f'growth="exponential" needs a step size 0 < k < 1, got k={k!r}')
    if max_batch_size is not None and not is_step:
        raise ValueError(f"max_batch_size={max_batch_size!r} bounds a step size 0 < k < 1, got k={k!r}")
    if max_batch_size is not None and not (isinstance(max_batch_size, int) and max_batch_size >= batch_size):
        raise ValueError(f"max_batch_size must be a whole number >= batch_size={batch_size}, got {max_batch_size!r}")
