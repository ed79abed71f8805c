"""A DataLoader whose mini-batch grows while it trains; torch's own in every other respect."""

from __future__ import annotations

import os
from itertools import islice

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset, default_collate

from data.sampler import GrowingBatchSampler, seeded_generator


class DataLoader(TorchDataLoader):
    """torch.utils.data.DataLoader with the mini-batch schedule `k`.

    In each epoch mini-batch t = 0, 1, ... has
      k=None:             batch_size samples, as in torch;
      0 < k < 1:          floor(batch_size*(1+k*t)), up to max_batch_size (default 2*batch_size);
      k >= batch_size:    batch_size+4*t, up to k (the release's `--batch_size 64 --k 128`).

    `len(loader)` is the exact number of mini-batches of the epoch at hand, `loader.sizes()` their sizes. Every sample comes
    once per epoch. Each `iter(loader)` is the next epoch; `set_epoch` chooses one.

    Args:
        dataset: a map-style dataset. One that has `__getitems__(indices)` and sets `returns_batches = True` makes
            whole mini-batches itself; they are passed on without collating.
        batch_size: samples in the first mini-batch, over all ranks together.
        k, growth, restart, max_batch_size, num_replicas, rank: see GrowingBatchSampler. num_replicas and rank default to those
            of torch.distributed where it is initialised, unless a `sampler` gives the order: that is not split unasked.
        seed: of the order of samples and of the workers' random numbers; None draws one from torch's global generator (0 with
            several ranks, which must agree). An epoch's order depends on nothing but (seed, epoch).
        sampler: gives the order instead of shuffle.
        batch_sampler: torch's own argument: replaces the schedule, so k must be None.
        collate_fn, num_workers, pin_memory, persistent_workers and further keywords: as in torch. A `generator` of your own is
            used for the workers' seeds and never reseeded here.

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
            raise ValueError(
                "this DataLoader orders samples by index; an IterableDataset has none: use torch.utils.data.DataLoader"
            )
        if sampler is not None and shuffle:
            raise ValueError("sampler and shuffle exclude each other: the sampler gives the order")
        in_group = dist.is_available() and dist.is_initialized()
        # A sampler of the user's own (a DistributedSampler) may have taken the rank's share already: it is not split unasked.
        in_group = in_group and sampler is None
        num_replicas = num_replicas if num_replicas is not None else dist.get_world_size() if in_group else 1
        rank = rank if rank is not None else dist.get_rank() if in_group else 0
        if seed is None:
            seed = int(torch.randint(2**31, ())) if num_replicas == 1 else 0
        if batch_sampler is None:
            batch_sampler = GrowingBatchSampler(
                len(dataset) if sampler is None else sampler,
                batch_size,
                k,
                shuffle=shuffle,
                drop_last=drop_last,
                growth=growth,
                restart=restart,
                max_batch_size=max_batch_size,
                seed=seed,
                num_replicas=num_replicas,
                rank=rank,
            )
        elif k is not None or shuffle or drop_last or sampler is not None or batch_size != 1:
            raise ValueError(
                f"batch_sampler replaces batch_size, k, shuffle, sampler and drop_last; got k={k!r} beside it"
            )
        if collate_fn is None:
            collate_fn = _as_it_is if getattr(dataset, "returns_batches", False) else default_collate
            if num_replicas > 1:
                collate_fn = _CollateShare(collate_fn)
        torch_options.setdefault("worker_init_fn", _leave_process_group)
        own_generator = torch_options.get("generator") is None
        if own_generator:
            torch_options["generator"] = torch.Generator()
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            **torch_options,
        )
        self.seed = seed
        self._own_generator = own_generator
        self._epoch = 0  # of the next iter(), or of the one at hand
        self._position = 0  # mini-batches of epoch _epoch that were handed out
        self._pass = None  # the pass over epoch _epoch, once it has begun; an older iterator changes nothing any more

    @property
    def epoch(self) -> int:
        """Number of the epoch at hand: the one being iterated, or the one that the next iter() begins."""
        return self._epoch

    def sizes(self, epoch: int | None = None) -> list[int]:
        """Sizes of the mini-batches of an epoch (that at hand by default), over all ranks together."""
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
        """Where the loader stands: {"seed", "epoch", "position"}, position in mini-batches of that epoch handed out so far."""
        return {"seed": self.seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict) -> None:
        """The next iter() continues where `state_dict` was taken: the same remaining mini-batches of the same epoch."""
        seed, epoch, position = (state[name] for name in ("seed", "epoch", "position"))
        if not all(isinstance(value, int) for value in (seed, epoch, position)) or epoch < 0 or position < 0:
            raise ValueError(f"a loader's state is whole numbers, epoch and position >= 0; got {state!r}")
        self.seed = seed
        if isinstance(self.batch_sampler, GrowingBatchSampler):
            self.batch_sampler.seed = seed
        if position and position >= self._length_of(epoch):
            epoch, position = epoch + 1, 0
        self._move_to(epoch, position)

    def _length_of(self, epoch: int) -> int:
        own = isinstance(self.batch_sampler, GrowingBatchSampler)
        return len(self.batch_sampler.sizes(epoch)) if own else len(self.batch_sampler)

    def _move_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position, self._pass = epoch, position, None
        if isinstance(self.batch_sampler, GrowingBatchSampler):
            self.batch_sampler.epoch = epoch

    def __iter__(self):
        if self._pass is not None:
            self._move_to(self._epoch + 1, 0)
        this_pass = self._pass = object()
        epoch, skip = self._epoch, self._position
        if isinstance(self.batch_sampler, GrowingBatchSampler):
            self.batch_sampler.epoch, self.batch_sampler.start = epoch, skip
            skip = 0
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        if self._own_generator:
            # torch draws the workers' seeds from it.
            self.generator.set_state(seeded_generator(self.seed, epoch, purpose=2).get_state())
        # A batch_sampler of the user's own cannot start in the middle: what was handed out is made again and left out.
        for batch in islice(super().__iter__(), skip, None):
            if self._pass is this_pass:
                self._position += 1
            yield batch
        if self._pass is this_pass:
            self._move_to(epoch + 1, 0)


def _leave_process_group(worker: int) -> None:
    """Ctrl-C at a terminal, and a signal to a process group, reach the training process alone, which ends its workers itself."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def first_images(dataset, count: int) -> torch.Tensor:
    """The first images of a data set of (image, label), (B, C, H, W), B <= count: on this rank alone, and without those that cannot be read.

    Raises:
        ValueError: there is none.
    """
    for images, _ in DataLoader(dataset, count, num_replicas=1, rank=0):
        if len(images):
            return images
    raise ValueError("not one image can be read")


def _as_it_is(batch):
    return batch


class _CollateShare:
    """Collates a rank's share of a mini-batch; an empty share (fewer samples than ranks) comes through as []."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, samples):
        return self.collate(samples) if len(samples) else []
