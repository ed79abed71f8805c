"""The growing mini-batch and its DataLoader, against a reference written from the schedule's definition."""

import inspect
import itertools
import math
import os
import shutil
from fractions import Fraction

import pytest
import torch
from torch.utils.data import ChainDataset, Dataset, DistributedSampler, Sampler
from torch.utils.data import DataLoader as TorchDataLoader

from data import DataLoader, GrowingBatchSampler, ImageArrays, check_shared_memory
from data import loader as loader_module
from utils.base.errors import UserError

# (batch_size, k, further arguments): each meaning of k, growths that end in decimals, and bounds.
SCHEDULES = [
    *((8, k, {}) for k in (None, 0.1, 11, 32, 32.0)),
    (3, 0.999, {}),
    (1, 1, {}),
    (8, 0.37, {"max_batch_size": 50}),
    (8, 0.37, {"max_batch_size": 8}),
    (8, 0.1, {"growth": "exponential"}),
    (8, 0.25, {"growth": "exponential", "max_batch_size": 20}),
    *((100, k, {"max_batch_size": 5000}) for k in (0.01, 0.03, 0.07, 0.15, 0.3, 0.7)),
]
SCHEDULE = pytest.mark.parametrize(("batch_size", "k", "options"), SCHEDULES)
DROP = pytest.mark.parametrize("drop_last", [False, True])
WORKERS = pytest.mark.parametrize("workers", [0, 2])


def wanted_size(t, batch_size, k, growth="linear", max_batch_size=None):
    """Samples in mini-batch t, in exact arithmetic."""
    if k is None:
        return batch_size
    if k >= batch_size:
        return min(batch_size + 4 * t, int(k))
    step = Fraction(str(k))
    if growth == "exponential":
        size = math.floor(batch_size * (1 + step) ** t)
        return size if max_batch_size is None else min(size, max_batch_size)
    return min(math.floor(batch_size * (1 + step * t)), max_batch_size or 2 * batch_size)


def wanted_sizes(n, batch_size, k, drop_last=False, first_t=0, **options):
    """Sizes of one epoch's mini-batches over n samples, the schedule standing at first_t."""
    sizes, left = [], n
    for t in itertools.count(first_t):
        size = wanted_size(t, batch_size, k, **options)
        if left == 0 or (drop_last and size > left):
            return sizes
        sizes.append(min(size, left))
        left -= sizes[-1]


class Numbers(Dataset):
    """Sample i is the number i."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return index


class Noise(Numbers):
    """Sample i is a random number of the process that reads it."""

    def __getitem__(self, index):
        return torch.rand(())


def growing(seed=1, n=203, **options):
    return DataLoader(Numbers(n), 8, 0.1, True, seed=seed, **options)


def epoch_of(loader):
    """One epoch's mini-batches as lists of numbers."""
    return [batch if isinstance(batch, list) else batch.tolist() for batch in loader]


def lengths(batches):
    return [len(batch) for batch in batches]


# The schedule


@DROP
@SCHEDULE
@pytest.mark.parametrize("n", [0, 1, 8, 997, 40_000])
def test_sampler_yields_what_it_announces_which_is_the_schedule(n, batch_size, k, options, drop_last):
    """floor(100*1.29) must not lose a sample to 128.99999999999997."""
    sampler = GrowingBatchSampler(n, batch_size, k, drop_last=drop_last, **options)
    wanted = wanted_sizes(n, batch_size, k, drop_last, **options)
    assert (len(sampler), sampler.sizes(), lengths(sampler)) == (len(wanted), wanted, wanted)


def test_a_generator_of_ones_own_is_never_reseeded():
    own = torch.Generator().manual_seed(123)
    given, plain = (DataLoader(Numbers(20), 4, shuffle=True, seed=1, **more) for more in ({"generator": own}, {}))
    assert epoch_of(given) == epoch_of(plain)
    assert own.initial_seed() == 123


def test_schedules_to_know():
    """The release's; torch's; a bound where (1+k)^t has overflowed; a cap that is no float."""
    release = DataLoader(Numbers(50_000), 64, 128)
    assert len(release) == 395 and release.sizes() == [*range(64, 128, 4), *[128] * 378, 112]
    assert epoch_of(DataLoader(Numbers(103), 10)) == epoch_of(TorchDataLoader(Numbers(103), 10))
    far = GrowingBatchSampler(40_000, 1, 0.9, growth="exponential", max_batch_size=16)
    assert far.sizes() == [1, 1, 3, 6, 13, *[16] * 2498, 8]
    assert DataLoader(Numbers(40), 5, 10**400).sizes() == [5, 9, 13, 13]


@DROP
@pytest.mark.parametrize(("k", "options"), [(0.1, {}), (32, {}), (None, {}), (0.05, {"growth": "exponential"})])
def test_schedule_continues_over_epochs(k, options, drop_last):
    """Also where an epoch is chosen without those before it."""
    loader, chosen = (DataLoader(Numbers(101), 8, k, drop_last=drop_last, restart=False, **options) for _ in range(2))
    first_t = 0
    for epoch in range(5):
        sizes = wanted_sizes(101, 8, k, drop_last, first_t, **options)
        assert len(loader) == len(sizes) and lengths(epoch_of(loader)) == chosen.sizes(epoch) == sizes
        first_t += len(sizes)


# The loader


@WORKERS
@DROP
def test_loader_yields_the_schedule_and_every_sample_once(workers, drop_last):
    """Shuffled, through workers that outlive the epoch and close with it, and in the order of a sampler."""
    options = {"num_workers": workers, "persistent_workers": workers > 0, "drop_last": drop_last}
    loader = growing(restart=False, **options)
    first_t = 0
    for _ in range(3):
        sizes, batches = wanted_sizes(203, 8, 0.1, drop_last, first_t), epoch_of(loader)
        assert lengths(batches) == sizes and len(set(itertools.chain(*batches))) == sum(sizes)
        first_t += len(sizes)
    started = loader._iterator._workers if workers else []
    loader.close()
    assert not any(worker.is_alive() for worker in started)
    order = list(range(50, -1, -1))
    batches = epoch_of(DataLoader(Numbers(203), 8, 0.1, sampler=order, **options))
    assert list(itertools.chain(*batches)) == order[: sum(map(len, batches))]
    assert lengths(batches) == wanted_sizes(51, 8, 0.1, drop_last)


def test_it_is_torchs_loader_with_its_keywords():
    loader = DataLoader(Numbers(4), num_workers=2, prefetch_factor=5, timeout=7, worker_init_fn=print, collate_fn=tuple)
    assert isinstance(loader, TorchDataLoader) and isinstance(loader.batch_sampler, Sampler)
    found = loader.prefetch_factor, loader.timeout, loader.worker_init_fn, loader.collate_fn
    assert found == (5, 7, print, tuple)
    assert list(inspect.signature(DataLoader).parameters)[:4] == ["dataset", "batch_size", "k", "shuffle"]


# Several processes


@DROP
@pytest.mark.parametrize(("n", "workers"), [(0, 0), (2, 0), (81, 0), (104, 0), (81, 1)])
def test_the_union_of_four_ranks_is_the_single_process(n, workers, drop_last):
    """Also where the last mini-batch has fewer samples than there are ranks."""
    options = {"n": n, "restart": False, "drop_last": drop_last}
    single = growing(**options)
    ranks = [growing(num_replicas=4, rank=r, num_workers=workers, **options) for r in range(4)]
    for _ in range(2):
        together = [list(share) for share in zip(*map(epoch_of, ranks), strict=True)]
        assert [sorted(itertools.chain(*shares)) for shares in together] == [sorted(b) for b in epoch_of(single)]
        assert all(max(map(len, shares)) - min(map(len, shares)) <= 1 for shares in together)


def test_rank_comes_from_the_process_group_unless_a_sampler_has_shared_already(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        ours = DataLoader(Numbers(81), 8, 0.1)
        assert epoch_of(ours) == epoch_of(DataLoader(Numbers(81), 8, 0.1, num_replicas=2, rank=rank))
        sampler = DistributedSampler(Numbers(40), num_replicas=2, rank=rank)
        seen += itertools.chain(*epoch_of(DataLoader(Numbers(40), 5, sampler=sampler)))
    assert sorted(seen) == list(range(40))


# The order


def test_order_depends_on_seed_and_epoch_alone():
    """Neither on workers and sizes nor on what torch's generator has given and on how epoch 2 was reached."""
    reached = growing()
    orders = [list(itertools.chain(*epoch_of(reached))) for _ in range(3)]
    torch.manual_seed(77)
    chosen = DataLoader(Numbers(203), 50, shuffle=True, seed=1, num_workers=2)
    for epoch in (2, 0, 0):
        chosen.set_epoch(epoch)
        assert list(itertools.chain(*epoch_of(chosen))) == orders[epoch] and chosen.epoch == epoch + 1
    assert list(itertools.chain(*epoch_of(DataLoader(Numbers(203), 8)))) == list(range(203))
    several = [DataLoader(Numbers(80), 8, shuffle=True, num_replicas=2, rank=rank).seed for rank in range(2)]
    assert several[0] == several[1]  # without a seed of their own
    shuffled = {str(epoch_of(growing(seed, 30))) for seed in range(9) for _ in range(2)}
    assert len(shuffled) == 9


def test_random_numbers_of_workers_depend_on_seed_and_epoch():
    loader, same, other = (DataLoader(Noise(20), 8, num_workers=2, seed=s) for s in (1, 1, 2))
    same.set_epoch(1)
    other.set_epoch(1)
    first, second = epoch_of(loader), epoch_of(loader)
    assert second == epoch_of(same) and second not in (first, epoch_of(other))


# Epochs and positions


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_abandoned_epoch_is_followed_by_a_new_one(workers, persistent):
    plain = growing()
    epochs = [epoch_of(plain) for _ in range(2)]
    loader = growing(num_workers=workers, persistent_workers=persistent)
    for _ in zip(range(3), loader, strict=False):
        pass
    assert epoch_of(loader) == epochs[1]


PREFETCHING = {"num_workers": 2, "prefetch_factor": 4}


@pytest.mark.parametrize("taken", [0, 3, 100])  # 100: all
@pytest.mark.parametrize("options", [{"restart": False}, {"num_replicas": 4, "rank": 2}, PREFETCHING])
def test_saved_position_continues_with_the_same_batches(taken, options):
    """From epoch 1, after `taken` of its mini-batches, to the end of epoch 2; to a loader of another seed."""
    loader, other = growing(1, **options), growing(999, **options)
    epoch_of(loader)
    running = iter(loader)
    for _ in range(min(taken, len(loader))):
        next(running)
    other.load_state_dict(loader.state_dict())
    remaining = epoch_of(running)
    continued = epoch_of(other) if remaining else []
    assert continued + epoch_of(other) == remaining + epoch_of(loader)


def test_state_within_the_last_round_and_below_a_running_iterator():
    """Before the loop has noticed the end; and an older iterator moves nothing."""
    loader, other = growing(), growing()
    for _ in loader:
        state = loader.state_dict()
    other.load_state_dict(state)
    assert epoch_of(other) == epoch_of(loader)
    running = iter(loader)
    next(running)
    state = loader.state_dict()
    loader.load_state_dict(state)
    next(running)
    assert loader.state_dict() == state


# The arguments of torch's loader that replace ours


@WORKERS
def test_batch_sampler_is_passed_through_and_its_position_continues(workers):
    batches = [[5, 4], [3], [0, 1, 2]]
    loader, other = (DataLoader(Numbers(6), batch_sampler=batches, num_workers=workers) for _ in range(2))
    assert (len(loader), epoch_of(loader)) == (3, batches)
    running = iter(loader)
    next(running)
    other.load_state_dict(loader.state_dict())
    assert epoch_of(other) == batches[1:]


# What is refused


@pytest.mark.parametrize("k", [0, 1, -0.1, 63.5, 64.5, math.nan, math.inf, "0.1", True, [0.1]])
def test_invalid_k_is_answered_with_the_three_meanings(k):
    with pytest.raises(ValueError, match=r"(?s)None.*0 < k < 1.*k >= batch_size") as error:
        DataLoader(Numbers(203), 64, k)
    assert repr(k) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"batch_size": 0}, "batch_size.*0"),
        ({"batch_size": 8.5}, r"batch_size.*8\.5"),
        ({"k": 0.1, "growth": "cubic"}, "growth.*cubic"),
        ({"growth": "exponential"}, "exponential.*None"),
        ({"k": 0.1, "max_batch_size": 7}, "max_batch_size.*7"),
        ({"k": 32, "max_batch_size": 16}, "max_batch_size.*16"),
        ({"num_replicas": 0}, "num_replicas.*0"),
        ({"num_replicas": 4, "rank": 4}, "rank.*4"),
        ({"shuffle": True, "sampler": range(5)}, "sampler.*shuffle"),
        ({"shuffle": True, "seed": 1.5}, r"seed.*1\.5"),
        ({"batch_sampler": [[0]], "batch_size": 1, "k": 0.1}, "batch_sampler"),
        ({"dataset": ChainDataset([])}, "IterableDataset"),
    ],
)
def test_bad_argument_is_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        DataLoader(**({"dataset": Numbers(203), "batch_size": 8} | arguments))


@pytest.mark.parametrize("bad", [{"position": -1}, {"epoch": -3}, {"position": 1.5}, {"seed": "1"}])
def test_bad_epoch_and_state_are_refused(bad):
    with pytest.raises(ValueError, match="whole numbers"):
        growing().load_state_dict({"seed": 1, "epoch": 0, "position": 0} | bad)
    with pytest.raises(ValueError, match=r"epoch must be .* 0\.5"):
        growing().set_epoch(0.5)


def test_shared_memory_that_is_too_small_is_one_line(monkeypatch):
    """2 workers with 3 mini-batches each and one in use, in 2 processes: 2 * 7 * 8 images of 3*64*64 bytes."""
    pixels = torch.zeros(20, 3, 64, 64, dtype=torch.uint8)
    images = ImageArrays(pixels, torch.arange(20), [0] * 3, [1] * 3, augment=False)
    needed = 2 * 7 * 8 * 3 * 64 * 64
    monkeypatch.setattr(loader_module, "SHARED_MEMORY", os.curdir)
    made = DataLoader(images, 4, 8, num_workers=2, prefetch_factor=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, needed))
    check_shared_memory(made, processes=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, needed - 1))
    check_shared_memory(DataLoader(images, 4, 8), processes=2)  # no workers
    with pytest.raises(UserError, match=r"1 MiB free, 4 workers with 3 mini-batches of 8 .*--prefetch_factor"):
        check_shared_memory(made, processes=2)
