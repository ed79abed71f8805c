"""The growing mini-batch and its DataLoader, against a reference written from the schedule's definition."""

import inspect
import itertools
import json
import math
import warnings
from fractions import Fraction

import pytest
import torch
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Dataset, DistributedSampler, IterableDataset, Sampler

from data import DataLoader, GrowingBatchSampler, ImageArrays

# (batch_size, k, further arguments): each meaning of k, growths that end in decimals, and bounds.
SCHEDULES = [
    (8, None, {}),
    (8, 0.1, {}),
    (8, 0.37, {"max_batch_size": 50}),
    (8, 0.37, {"max_batch_size": 8}),
    (10, 0.01, {}),
    (100, 0.07, {"max_batch_size": 1000}),
    (3, 0.999, {}),
    (8, 32, {}),
    (8, 32.0, {}),
    (8, 8, {}),
    (8, 11, {}),
    (1, 1, {}),
    (8, 0.1, {"growth": "exponential"}),
    (8, 0.5, {"growth": "exponential"}),
    (8, 0.25, {"growth": "exponential", "max_batch_size": 20}),
]
SCHEDULE_IDS = [f"{b}-{k}-{'-'.join(map(str, o.values()))}" for b, k, o in SCHEDULES]
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
    sizes = []
    for t in itertools.count(first_t):
        size = wanted_size(t, batch_size, k, **options)
        left = n - sum(sizes)
        if left == 0 or (drop_last and size > left):
            return sizes
        sizes.append(min(size, left))


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


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


def epoch_of(loader):
    """One epoch's mini-batches as lists of numbers."""
    return [batch if isinstance(batch, list) else batch.tolist() for batch in loader]


def lengths(batches):
    return [len(batch) for batch in batches]


# The schedule


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("batch_size", "k", "options"), SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 500, 997])
def test_sampler_yields_the_schedule(n, batch_size, k, options, drop_last):
    sampler = GrowingBatchSampler(n, batch_size, k, drop_last=drop_last, **options)
    assert lengths(sampler) == wanted_sizes(n, batch_size, k, drop_last, **options)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("batch_size", "k", "options"), SCHEDULES, ids=SCHEDULE_IDS)
def test_sampler_announces_what_it_yields(batch_size, k, options, drop_last):
    sampler = GrowingBatchSampler(997, batch_size, k, drop_last=drop_last, **options)
    announced = len(sampler), sampler.sizes()
    yielded = lengths(sampler)
    assert announced == (len(yielded), yielded)


@pytest.mark.parametrize("k", [0.01, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.7])
def test_step_sizes_mean_their_decimal_number(k):
    """floor(batch_size*(1+k*t)) must not lose a sample to binary fractions such as 100*1.29 = 128.99999999999997."""
    sampler = GrowingBatchSampler(100_000, 100, k, max_batch_size=5_000)
    assert sampler.sizes() == wanted_sizes(100_000, 100, k, max_batch_size=5_000)


def test_release_makes_395_mini_batches():
    assert len(DataLoader(Numbers(50_000), 64, 128)) == 395


def test_release_sizes():
    assert DataLoader(Numbers(50_000), 64, 128).sizes() == [*range(64, 128, 4), *[128] * 378, 112]


def test_step_size_doubles_by_default():
    assert max(DataLoader(Numbers(50_000), 64, 0.1).sizes()) == 128


def test_step_size_adds_k_to_k_sum_each_mini_batch():
    assert DataLoader(Numbers(1_000), 100, 0.1).sizes() == [100, 110, 120, 130, 140, 150, 160, 90]


def test_constant_sizes_are_torchs():
    ours, torchs = DataLoader(Numbers(103), 10), TorchDataLoader(Numbers(103), 10)
    assert epoch_of(ours) == epoch_of(torchs)


def test_exponential_growth_far_from_its_bound():
    """(1+k)^t overflows a float at t of a few thousand; the bound holds on."""
    sampler = GrowingBatchSampler(40_000, 1, 0.9, growth="exponential", max_batch_size=16)
    assert sampler.sizes() == wanted_sizes(40_000, 1, 0.9, growth="exponential", max_batch_size=16)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("k", "options"),
    [(0.1, {}), (32, {}), (None, {}), (0.05, {"growth": "exponential"}), (0.1, {"max_batch_size": 90})],
)
def test_schedule_goes_on_over_epochs(k, options, drop_last):
    loader = DataLoader(Numbers(101), 8, k, drop_last=drop_last, restart=False, **options)
    first_t = 0
    for _ in range(5):
        sizes = wanted_sizes(101, 8, k, drop_last, first_t, **options)
        assert lengths(epoch_of(loader)) == sizes
        first_t += len(sizes)


def test_schedule_restarts_each_epoch():
    loader = DataLoader(Numbers(101), 8, 0.1)
    assert [lengths(epoch_of(loader)) for _ in range(3)] == [wanted_sizes(101, 8, 0.1)] * 3


def test_continued_schedule_needs_no_earlier_epochs():
    """Epoch 4 chosen at once has the sizes that it has after epochs 0 to 3."""
    loader, fresh = (DataLoader(Numbers(101), 8, 0.1, restart=False) for _ in range(2))
    for _ in range(4):
        epoch_of(loader)
    fresh.set_epoch(4)
    assert fresh.sizes() == loader.sizes() != fresh.sizes(0)


@pytest.mark.parametrize("restart", [True, False])
def test_len_before_within_and_after_an_epoch(restart):
    loader = DataLoader(Numbers(101), 8, 0.1, restart=restart)
    for _ in range(3):
        announced = len(loader)
        within = [len(loader) for _ in loader]
        assert within == [announced] * announced


# The loader


@WORKERS
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("k", "options"), [(None, {}), (0.1, {}), (32, {}), (0.2, {"growth": "exponential"})])
def test_loader_yields_the_schedule(workers, drop_last, k, options):
    loader = DataLoader(Numbers(203), 8, k, num_workers=workers, drop_last=drop_last, **options)
    sizes = wanted_sizes(203, 8, k, drop_last, **options)
    assert (len(loader), lengths(epoch_of(loader))) == (len(sizes), sizes)


@WORKERS
def test_every_sample_once_per_epoch(workers):
    loader = DataLoader(Numbers(203), 8, 0.1, True, num_workers=workers)
    for _ in range(2):
        assert sorted(itertools.chain(*epoch_of(loader))) == list(range(203))


def test_persistent_workers_serve_every_epoch():
    """Continued schedule and shuffle through workers that outlive the epoch: the batches of a loader without workers."""
    arguments = {"shuffle": True, "restart": False, "seed": 3}
    loader = DataLoader(Numbers(203), 8, 0.1, num_workers=2, persistent_workers=True, **arguments)
    plain = DataLoader(Numbers(203), 8, 0.1, **arguments)
    assert [epoch_of(loader) for _ in range(3)] == [epoch_of(plain) for _ in range(3)]


def test_dropped_samples_are_the_last_of_the_order():
    whole, dropped = (epoch_of(DataLoader(Numbers(203), 8, 0.1, True, drop_last=d, seed=1)) for d in (False, True))
    assert dropped == whole[:-1]


def test_drop_last_of_less_than_one_mini_batch():
    loader = DataLoader(Numbers(7), 8, 0.1, drop_last=True)
    assert (len(loader), epoch_of(loader)) == (0, [])


def test_is_torchs_loader():
    assert isinstance(DataLoader(Numbers(4)), TorchDataLoader)


def test_batch_sampler_is_torchs_sampler():
    assert isinstance(DataLoader(Numbers(4)).batch_sampler, Sampler)


def test_signature_begins_with_dataset_batch_size_k_shuffle():
    parameters = inspect.signature(DataLoader).parameters
    assert {name: parameters[name].default for name in list(parameters)[1:4]} == {
        "batch_size": 1,
        "k": None,
        "shuffle": False,
    }


def test_arguments_by_position():
    loader = DataLoader(Numbers(203), 8, 0.1, True)
    by_name = DataLoader(dataset=Numbers(203), batch_size=8, k=0.1, shuffle=True, seed=loader.seed)
    assert epoch_of(loader) == epoch_of(by_name)


def test_torchs_keywords_are_passed_on():
    loader = DataLoader(Numbers(4), num_workers=2, prefetch_factor=5, timeout=7, worker_init_fn=print)
    assert (loader.prefetch_factor, loader.timeout, loader.worker_init_fn) == (5, 7, print)


def test_own_collate_function():
    assert list(DataLoader([1, 2, 3], 2, collate_fn=tuple)) == [(1, 2), (3,)]


def test_pinned_memory():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where there is no accelerator
        loader = DataLoader(Numbers(20), 8, pin_memory=True)
        pinned = [batch.is_pinned() for batch in loader]
    assert loader.pin_memory and pinned == [torch.cuda.is_available()] * 3


# Several processes


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("n", [0, 2, 81, 101, 104])  # with tails of fewer samples than ranks
def test_four_ranks_share_every_mini_batch(n, shuffle, drop_last):
    arguments = {"shuffle": shuffle, "drop_last": drop_last, "seed": 5}
    single = list(GrowingBatchSampler(n, 8, 0.1, **arguments))
    shares = [list(GrowingBatchSampler(n, 8, 0.1, num_replicas=4, rank=r, **arguments)) for r in range(4)]
    together = [sorted(itertools.chain(*batch)) for batch in zip(*shares, strict=True)]
    assert together == [sorted(batch) for batch in single]


def test_shares_are_even():
    shares = [lengths(GrowingBatchSampler(101, 8, 0.1, num_replicas=4, rank=r)) for r in range(4)]
    assert all(max(batch) - min(batch) <= 1 for batch in zip(*shares, strict=True))


@WORKERS
def test_four_loaders_share_every_mini_batch(workers):
    arguments = {"shuffle": True, "seed": 5, "restart": False}
    single = DataLoader(Numbers(81), 8, 0.1, **arguments)
    loaders = [
        DataLoader(Numbers(81), 8, 0.1, num_workers=workers, num_replicas=4, rank=r, **arguments) for r in range(4)
    ]
    for _ in range(2):
        shares = zip(*map(epoch_of, loaders), strict=True)
        assert [sorted(itertools.chain(*batch)) for batch in shares] == [sorted(batch) for batch in epoch_of(single)]


def test_every_rank_gets_len_mini_batches():
    """81 samples end in a mini-batch of one, which three of the ranks get as an empty one."""
    loaders = [DataLoader(Numbers(81), 8, num_replicas=4, rank=r) for r in range(4)]
    assert [(len(loader), lengths(epoch_of(loader))[-1]) for loader in loaders] == [(11, 1), (11, 0), (11, 0), (11, 0)]


def test_ranks_agree_without_a_seed():
    """Every process has drawn other random numbers, so an order drawn from torch's generator would differ."""
    torch.manual_seed(1)
    first = DataLoader(Numbers(80), 8, shuffle=True, num_replicas=2, rank=0)
    torch.manual_seed(2)
    second = DataLoader(Numbers(80), 8, shuffle=True, num_replicas=2, rank=1)
    assert sorted(itertools.chain(*epoch_of(first), *epoch_of(second))) == list(range(80))


def test_rank_and_replicas_come_from_the_process_group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    loader = DataLoader(Numbers(81), 8, 0.1)
    assert epoch_of(loader) == epoch_of(DataLoader(Numbers(81), 8, 0.1, num_replicas=4, rank=3))


def test_empty_share_of_an_image_set_is_an_empty_batch():
    images = ImageArrays(
        torch.zeros(9, 3, 4, 4, dtype=torch.uint8), torch.arange(9), [0.5] * 3, [0.5] * 3, augment=True
    )
    *_, (last, labels) = DataLoader(images, 8, num_replicas=4, rank=3)
    assert (last.shape, labels.shape) == ((0, 3, 4, 4), (0,))


# The order


def test_without_shuffle_the_order_is_that_of_the_data():
    assert list(itertools.chain(*epoch_of(DataLoader(Numbers(203), 8, 0.1)))) == list(range(203))


def test_order_depends_on_the_epoch():
    loader = DataLoader(Numbers(203), 8, 0.1, True, seed=1)
    assert epoch_of(loader) != epoch_of(loader)


def test_order_depends_on_the_seed():
    assert epoch_of(DataLoader(Numbers(203), 8, shuffle=True, seed=1)) != epoch_of(
        DataLoader(Numbers(203), 8, shuffle=True, seed=2)
    )


def test_neighbouring_seeds_and_epochs_never_meet():
    orders = set()
    for seed, epoch in itertools.product(range(20), range(20)):
        sampler = GrowingBatchSampler(30, 30, shuffle=True, seed=seed)
        sampler.epoch = epoch
        orders.update(map(tuple, sampler))
    assert len(orders) == 400


def test_order_depends_on_nothing_but_seed_and_epoch():
    """Neither on workers, sizes and ranks nor on what torch's generator has given and on how epoch 2 was reached."""
    reached = DataLoader(Numbers(203), 8, 0.1, True, seed=1)
    for _ in range(2):
        epoch_of(reached)
    torch.manual_seed(77)
    chosen = DataLoader(Numbers(203), 50, shuffle=True, seed=1, num_workers=2)
    chosen.set_epoch(2)
    assert list(itertools.chain(*epoch_of(reached))) == list(itertools.chain(*epoch_of(chosen)))


def test_order_is_uniform():
    """Each sample is as often in each place: chi-square of 5 x 5 counts over 2,000 epochs, 16 degrees of freedom."""
    counts = torch.zeros(5, 5)
    sampler = GrowingBatchSampler(5, 5, shuffle=True, seed=0)
    for sampler.epoch in range(2_000):
        for place, sample in enumerate(next(iter(sampler))):
            counts[place, sample] += 1
    assert ((counts - 400) ** 2 / 400).sum() < 39.3  # p = 0.001


def test_seed_is_drawn_from_torchs_generator():
    torch.manual_seed(4)
    first = DataLoader(Numbers(203), 8, shuffle=True)
    second = DataLoader(Numbers(203), 8, shuffle=True)
    torch.manual_seed(4)
    assert DataLoader(Numbers(203), 8, shuffle=True).seed == first.seed != second.seed


def test_random_numbers_of_workers_depend_on_seed_and_epoch():
    """Epoch 1 of a seed has its own, however it was reached."""
    loader, same, other = (DataLoader(Noise(20), 8, num_workers=2, seed=s) for s in (1, 1, 2))
    same.set_epoch(1)
    other.set_epoch(1)
    first, second = epoch_of(loader), epoch_of(loader)
    assert second == epoch_of(same) and second not in (first, epoch_of(other))


# Epochs and positions


def test_set_epoch_chooses_the_next_epoch():
    loader, other = (DataLoader(Numbers(203), 8, 0.1, True, seed=1) for _ in range(2))
    epochs = [epoch_of(loader) for _ in range(4)]
    other.set_epoch(3)
    assert epoch_of(other) == epochs[3]


def test_set_epoch_repeats_an_epoch():
    loader = DataLoader(Numbers(203), 8, 0.1, True, seed=1)
    first = epoch_of(loader)
    loader.set_epoch(0)
    assert epoch_of(loader) == first


def test_epochs_follow_a_chosen_one():
    loader = DataLoader(Numbers(20), 8)
    loader.set_epoch(5)
    before = loader.epoch
    epoch_of(loader)
    assert (before, loader.epoch) == (5, 6)


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_abandoned_epoch_is_followed_by_a_new_one(workers, persistent):
    plain = DataLoader(Numbers(203), 8, 0.1, True, seed=1)
    epochs = [epoch_of(plain) for _ in range(2)]
    loader = DataLoader(Numbers(203), 8, 0.1, True, seed=1, num_workers=workers, persistent_workers=persistent)
    for _ in zip(range(3), loader, strict=False):
        pass
    assert epoch_of(loader) == epochs[1]


@pytest.mark.parametrize("taken", [0, 1, 7, 100])  # 100: all
@pytest.mark.parametrize("restart", [True, False])
def test_saved_position_continues_with_the_same_batches(taken, restart):
    """From epoch 1, after `taken` of its mini-batches, to the end of epoch 2; through JSON, into a loader of another seed."""
    loader, other = (DataLoader(Numbers(203), 8, 0.1, True, seed=s, restart=restart) for s in (1, 999))
    epoch_of(loader)
    running = iter(loader)
    for _ in range(min(taken, len(loader))):
        next(running)
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    remaining = [batch.tolist() for batch in running]
    continued = epoch_of(other) if remaining else []
    assert continued + epoch_of(other) == remaining + epoch_of(loader)


@pytest.mark.parametrize("persistent", [False, True])
def test_position_counts_what_was_handed_out_not_what_was_prefetched(persistent):
    arguments = {"num_workers": 2, "prefetch_factor": 4, "persistent_workers": persistent}
    loader = DataLoader(Numbers(203), 8, 0.1, True, seed=1, **arguments)
    running = iter(loader)
    for _ in range(3):
        next(running)
    state = loader.state_dict()
    remaining = [batch.tolist() for batch in running]
    other = DataLoader(Numbers(203), 8, 0.1, True, **arguments)
    other.load_state_dict(state)
    assert (state["position"], epoch_of(other)) == (3, remaining)


def test_state_between_epochs():
    loader, other = (DataLoader(Numbers(203), 8, 0.1, True) for _ in range(2))
    epoch_of(loader)
    other.load_state_dict(loader.state_dict())
    assert epoch_of(other) == epoch_of(loader)


def test_state_after_the_last_mini_batch_leads_to_the_next_epoch():
    """Saved inside the loop's last round, before the loop has noticed the end."""
    loader = DataLoader(Numbers(203), 8, 0.1, True)
    for _ in loader:
        state = loader.state_dict()
    other = DataLoader(Numbers(203), 8, 0.1, True)
    other.load_state_dict(state)
    assert epoch_of(other) == epoch_of(loader)


def test_state_loads_into_a_loader_in_use():
    loader = DataLoader(Numbers(203), 8, 0.1, True, seed=1)
    running = iter(loader)
    next(running)
    state = loader.state_dict()
    remaining = [batch.tolist() for batch in running]
    next(iter(loader))
    loader.load_state_dict(state)
    assert epoch_of(loader) == remaining


def test_resumed_epoch_is_followed_by_whole_ones():
    loader = DataLoader(Numbers(203), 8, 0.1, True, seed=1)
    loader.load_state_dict({"seed": 1, "epoch": 0, "position": 5})
    epoch_of(loader)
    assert lengths(epoch_of(loader)) == wanted_sizes(203, 8, 0.1)


def test_position_of_every_rank_continues():
    loader, other = (DataLoader(Numbers(81), 8, 0.1, True, seed=1, num_replicas=4, rank=2) for _ in range(2))
    running = iter(loader)
    next(running)
    other.load_state_dict(loader.state_dict())
    assert epoch_of(other) == [batch if isinstance(batch, list) else batch.tolist() for batch in running]


@WORKERS
def test_resumed_augmentation_is_bit_identical(workers):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=generator)
    loader, other = (
        DataLoader(ImageArrays(pixels, torch.arange(60), [0.5] * 3, [0.2] * 3, augment=True), 8, 0.1, True, seed=1)
        for _ in range(2)
    )
    list(loader)
    running = iter(loader)
    next(running)
    other.load_state_dict(loader.state_dict())
    expected = list(running)
    assert all(torch.equal(a, b) for x, y in zip(expected, other, strict=True) for a, b in zip(x, y, strict=True))


def test_sampler_starts_late_once():
    sampler = GrowingBatchSampler(203, 8, 0.1, shuffle=True)
    whole = list(sampler)
    sampler.start = 5
    assert (list(sampler), list(sampler)) == (whole[5:], whole)


# The arguments of torch's loader that replace ours


def test_sampler_gives_the_order():
    order = list(range(202, -1, -1))
    assert list(itertools.chain(*epoch_of(DataLoader(Numbers(203), 8, 0.1, sampler=order)))) == order


def test_sampler_of_a_part_of_the_data_sets_the_sizes():
    assert DataLoader(Numbers(203), 8, 0.1, sampler=range(50)).sizes() == wanted_sizes(50, 8, 0.1)


def test_sampler_is_shared_by_ranks():
    order = list(range(80, -1, -1))
    shares = [epoch_of(DataLoader(Numbers(81), 8, sampler=order, num_replicas=4, rank=r)) for r in range(4)]
    assert [len(list(itertools.chain(*batch))) for batch in zip(*shares, strict=True)] == wanted_sizes(81, 8, None)


@WORKERS
def test_batch_sampler_is_passed_through(workers):
    batches = [[5, 4], [3], [0, 1, 2]]
    loader = DataLoader(Numbers(6), batch_sampler=batches, num_workers=workers)
    assert (len(loader), epoch_of(loader), epoch_of(loader)) == (3, batches, batches)


def test_own_generator_is_used_as_torch_uses_it():
    """After the same epochs it stands where torch's loader leaves it: never reseeded."""
    ours, torchs = (torch.Generator().manual_seed(9) for _ in range(2))
    loaders = [DataLoader(Numbers(20), 8, generator=ours), TorchDataLoader(Numbers(20), 8, generator=torchs)]
    for loader in loaders:
        for _ in range(2):
            list(loader)
    assert torch.equal(ours.get_state(), torchs.get_state())


# What is refused


@pytest.mark.parametrize(
    "k",
    [0, 0.0, 1, 1.0, -1, -0.1, 2, 63, 63.5, 64.5, math.nan, math.inf, -math.inf, "x", "0.1", True, False, [0.1], 1j],
)
def test_invalid_k_is_answered_with_the_three_meanings(k):
    with pytest.raises(ValueError, match=r"(?s)None.*0 < k < 1.*k >= batch_size") as error:
        DataLoader(Numbers(203), 64, k)
    assert repr(k) in str(error.value)


def test_true_is_no_cap_of_one():
    with pytest.raises(ValueError, match=r"0 < k < 1.*k=True"):
        DataLoader(Numbers(203), 1, True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"batch_size": 0}, "batch_size.*0"),
        ({"batch_size": -8}, "batch_size.*-8"),
        ({"batch_size": 8.5}, r"batch_size.*8\.5"),
        ({"batch_size": True}, "batch_size.*True"),
        ({"batch_size": "8"}, "batch_size.*'8'"),
        ({"k": 0.1, "growth": "cubic"}, "growth.*cubic"),
        ({"growth": "exponential"}, "exponential.*None"),
        ({"k": 32, "growth": "exponential"}, "exponential.*32"),
        ({"k": 0.1, "max_batch_size": 7}, "max_batch_size.*7"),
        ({"k": 0.1, "max_batch_size": 16.5}, r"max_batch_size.*16\.5"),
        ({"max_batch_size": 16}, "max_batch_size.*16"),
        ({"k": 32, "max_batch_size": 16}, "max_batch_size.*16"),
        ({"num_replicas": 0}, "num_replicas.*0"),
        ({"num_replicas": 4, "rank": 4}, "rank.*4"),
        ({"num_replicas": 4, "rank": -1}, "rank.*-1"),
        ({"rank": 1}, "rank.*1"),
        ({"shuffle": True, "sampler": range(5)}, "sampler.*shuffle"),
    ],
)
def test_bad_argument_is_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        DataLoader(Numbers(203), **({"batch_size": 8} | arguments))


@pytest.mark.parametrize("argument", [{"k": 0.1}, {"shuffle": True}, {"drop_last": True}, {"sampler": [0]}])
def test_batch_sampler_excludes_the_schedule(argument):
    with pytest.raises(ValueError, match="batch_sampler"):
        DataLoader(Numbers(6), batch_sampler=[[0]], **argument)


@pytest.mark.parametrize("epoch", [-1, 0.5, "1", None])
def test_bad_epoch_is_named(epoch):
    with pytest.raises(ValueError, match=str(epoch)):
        DataLoader(Numbers(6)).set_epoch(epoch)


def test_iterable_dataset_is_refused():
    with pytest.raises(ValueError, match="IterableDataset"):
        DataLoader(Stream())


def test_batch_sampler_position_continues():
    batches = [[0], [1], [2], [3]]
    loader, other = (DataLoader(Numbers(4), batch_sampler=batches) for _ in range(2))
    running = iter(loader)
    next(running)
    other.load_state_dict(loader.state_dict())
    assert epoch_of(other) == batches[1:]


def test_old_iterator_does_not_move_a_restored_position():
    loader = DataLoader(Numbers(40), 5, shuffle=True, seed=1)
    running = iter(loader)
    next(running)
    state = loader.state_dict()
    loader.load_state_dict(state)
    next(running)
    assert loader.state_dict() == state


def test_huge_k_is_a_value_error_or_a_cap():
    """10**400 is an integer >= batch_size; math.isfinite raises OverflowError for it."""
    assert DataLoader(Numbers(40), 5, 10**400).sizes() == [5, 9, 13, 13]


@pytest.mark.parametrize(
    "state",
    [
        {"seed": 1, "epoch": 0, "position": -1},
        {"seed": 1, "epoch": -3, "position": 0},
        {"seed": 1, "epoch": 0, "position": 1.5},
        {},
    ],
)
def test_bad_state_is_refused(state):
    with pytest.raises((ValueError, KeyError)):
        DataLoader(Numbers(40), 5).load_state_dict(state)


@pytest.mark.parametrize("seed", ["x", 1.5])
def test_bad_seed_is_named(seed):
    with pytest.raises((ValueError, TypeError), match=str(seed)):
        DataLoader(Numbers(40), 5, shuffle=True, seed=seed)


def test_distributed_sampler_is_not_shared_twice(monkeypatch):
    """Inside a process group a DistributedSampler has already taken the rank's share."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        sampler = DistributedSampler(Numbers(40), num_replicas=2, rank=rank)
        seen += [i for batch in epoch_of(DataLoader(Numbers(40), 5, sampler=sampler)) for i in batch]
    assert sorted(seen) == list(range(40))
