"""A DataLoader whose mini-batch grows while it trains; torch's own in every other respect."""

import math
import os
import shutil
from itertools import islice

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset, default_collate

from data.sampler import GrowingBatchSampler, seeded_generator
from utils.base.errors import UserError

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
