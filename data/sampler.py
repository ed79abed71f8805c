"""The growing mini-batch: which samples make up mini-batch t of an epoch.

Zhou, Yuan, Feng (NeurIPS 2018) let the mini-batch of hybrid stochastic gradient hard thresholding grow as
s_t = s_0*(1+k)^t; the authors' release grows it linearly within each epoch (64 -> 128). Everything here is a function
of (seed, epoch): a position in the training is two integers, every process computes its share without communication.
"""

import math
from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler

K_MEANINGS = (
    "k must be None (--k none: constant batch_size), a step size 0 < k < 1 (mini-batch t has "
    "floor(batch_size*(1+k*t)) samples), or a cap k >= batch_size (mini-batch t has batch_size+4*t samples, up to k)"
)
GROWTHS = ("linear", "exponential")
# The release adds four samples per mini-batch when k is the cap.
CAP_INCREMENT = 4


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
