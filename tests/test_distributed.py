"""Several processes train what one process trains: three gloo processes are started once, and compared here."""

import os
import socket
import time
from argparse import Namespace
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import train_epoch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from AHSG_HT import AHSG_HT
from data import DataLoader, ImageArrays, first_images
from data.synthetic import make_images
from models import narrow_like
from models.resnet_cifar import CifarResNet
from utils.base.errors import UserError
from utils.prune.gradual import GradualPruning
from utils.small.cut import make_small
from utils.small.filters import kept_filters
from utils.train import distributed, engine
from utils.train.distillation import Distillation
from utils.train.engine import cross_entropy, evaluate
from utils.train.losses import parse_term
from utils.train.setup import place_network
from utils.train.trainer import check_same_on_all_ranks

CPU = torch.device("cpu")
RANKS = 3
# Seconds in which ranks must answer.
TIMEOUT = 8
# Of the three shares of the last mini-batch two are empty, others differ in size.
SIZES = [7, 8, 9, 11, 12, 1]


class NoNorm(nn.Module):
    """Convolutions with biases and no BatchNorm."""

    def __init__(self, width=10):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.Conv2d(width, width, 3, 2), nn.ReLU())
        self.classifier = nn.Linear(width, 10)

    def forward(self, images, return_features=False):
        x = self.body(images).mean((2, 3))
        return (self.classifier(x), x, []) if return_features else self.classifier(x)


class InDouble(nn.Module):
    """A ResNet in float64: BatchNorm over a handful of images multiplies rounding errors step by step."""

    def __init__(self):
        super().__init__()
        self.net = CifarResNet(8).double()

    def forward(self, images):
        return self.net(images.double())


def images(augment=True):
    pixels, labels = make_images(sum(SIZES), seed=3)
    return ImageArrays(pixels, labels, [0.5] * 3, [0.25] * 3, augment=augment, seed=5)


def make_loader():
    loader = DataLoader(images(), 7, 0.2, shuffle=True, seed=1)
    assert loader.sizes(0) == SIZES
    return loader


def make_optimizer(groups):
    return AHSG_HT(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, v=0.1, HTrate=0.7)


def train(
    make=NoNorm, *, teacher=False, gradual=False, exchanges_last=False, max_images=None, epochs=range(4), before=None
):
    """Trains with the engine as a run does, alone or with the other processes; returns everything that came of it."""
    torch.manual_seed(0)
    net, objective = make(), cross_entropy
    if before:
        narrow_like(net, before["weights"])
    groups, adapters = [{"params": list(net.parameters())}], nn.ModuleList()
    if teacher:
        objective = Distillation(NoNorm(14), net, first_images(images(False), 2), [parse_term("feature:MSE")])
        adapters = objective.adapters
        groups += [{"params": list(adapters.parameters()), "HTrate": 1}]
    optimizer = make_optimizer(groups)
    if before:
        net.load_state_dict(before["weights"])
        optimizer.load_state_dict(before["optimizer"])
    pruning, loader, kept, results = None, make_loader(), [], []
    if gradual:
        optimizer.param_groups[0]["HTrate"] = 1
        options = dict(steps=4 * len(SIZES), begin=0.1, end=0.6, HTrate=0.5, score="taylor")
        options["state"] = before and before["pruning"]
        pruning = GradualPruning(net, optimizer, first_images(images(False), 2), **options)

    def wrap():
        return distributed.ParallelObjective(net, plain, CPU) if distributed.world_size() > 1 else plain

    plain, objective = objective, None
    objective = wrap()
    if exchanges_last and distributed.world_size() > 1:
        objective.exchanges_last = True
    for epoch in epochs:
        loader.set_epoch(epoch)
        options = dict(epoch=epoch, max_images=max_images, before_step=pruning and pruning.before_step)
        result = train_epoch(net, loader, objective, optimizer, CPU, **options)
        if gradual and pruning.cut((epoch + 1) * len(SIZES)):
            objective = None
            objective = wrap()
        distributed.average_batchnorm(net)
        kept.append(kept_filters(net))
        check_same_on_all_ranks(kept[-1], epoch)
        results.append((result.loss, result.top1, result.top5))
    tested = evaluate(net, DataLoader(images(False), 5), CPU)
    return {
        "weights": {**net.state_dict(), **{f"adapters.{name}": value for name, value in adapters.state_dict().items()}},
        "optimizer": optimizer.state_dict(),
        "pruning": pruning and pruning.state_dict(),
        "kept": kept,
        "results": [*results, (tested.loss, tested.top1, tested.top5)],
    }


RUNS = {"plain": {}, "in parts": {"max_images": 2}, "distilled": {"teacher": True}, "gradual": {"gradual": True}}
RUNS["exchanged last"] = {"max_images": 2, "exchanges_last": True}


def caught(function):
    try:
        return function()
    except (UserError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


def fail_on(rank):
    def make():
        if distributed.rank() == rank:
            raise UserError(f"no data on {rank}")
        return "made"

    return make


def on_one_machine():
    """(what this rank got of first_on_machine, when it made it)."""
    times = []

    def make():
        times.append(time.monotonic())
        time.sleep(TIMEOUT + 1 if distributed.is_first() else 0)
        return distributed.rank()

    return distributed.first_on_machine(make), times


def what_wrapping_changes():
    net = CifarResNet(8).train()
    state, random = {name: value.clone() for name, value in net.state_dict().items()}, torch.get_rng_state()
    distributed.ParallelObjective(net, cross_entropy, CPU)
    changed = [name for name, value in net.state_dict().items() if not torch.equal(value, state[name])]
    changed += [name for name, p in net.named_parameters() if p.grad is not None]
    return changed + ([] if torch.equal(random, torch.get_rng_state()) else ["random state"])


def one_rank(rank, port, folder):
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with distributed.process_group({"ngpu": 0, "dist_timeout": TIMEOUT}):
        report = {name: train(**options) for name, options in RUNS.items()}
        report["plain resumed"] = train(epochs=range(1, 4), before=train(epochs=range(1)))
        begun = train(gradual=True, epochs=range(2))
        report["gradual resumed"] = train(gradual=True, epochs=range(2, 4), before=begun)
        report["batchnorm"] = train(InDouble, epochs=range(1))
        report["wrapping changes"] = what_wrapping_changes()
        agreement = distributed.Agreement()
        report["agreed"] = [agreement(15 if rank and call == 2 else 2 if call == 4 else 0) for call in range(5)]
        report["different"] = caught(lambda: check_same_on_all_ranks({"conv": [rank]}, 7))
        report["from first"] = caught(lambda: distributed.from_first(distributed.rank))
        report["machine"] = on_one_machine()
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(CifarResNet(8))
        # torch refuses SyncBatchNorm on CPUs; it is not run here.
        with mock.patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle"):
            made = [distributed.ParallelObjective(net, cross_entropy, CPU) for net in (CifarResNet(8), synced)]
        report["exchanges last"] = [objective.exchanges_last for objective in made]
        report["first fails"] = caught(lambda: distributed.from_first(fail_on(0)))
        report["second fails"] = caught(lambda: distributed.on_all(fail_on(1)))
        report["none fails"] = caught(lambda: distributed.on_all(fail_on(RANKS)))
        torch.save(report, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the processes report."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(one_rank, (port, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("name", RUNS)
def test_several_processes_train_as_one_does(ranks, name):
    one = train(**{**RUNS[name], "max_images": None})
    for report in ranks:
        several = report[name]
        assert one["weights"].keys() == several["weights"].keys() and one["kept"] == several["kept"]
        for key, value in one["weights"].items():
            assert (value - several["weights"][key]).abs().max() <= 1e-6, key
        assert torch.allclose(torch.tensor(one["results"]), torch.tensor(several["results"]), atol=1e-4)
    if name == "gradual":
        assert len(one["weights"]["body.0.weight"]) == len(one["weights"]["body.2.weight"]) == 5
        return
    torch.manual_seed(0)
    moved = max((value - one["weights"][key]).abs().max() for key, value in NoNorm().state_dict().items())
    assert moved > 0.1, "nothing was learnt, so nothing was compared"


def test_ranks_hold_the_same_bits(ranks):
    for name in (*RUNS, "batchnorm"):
        first, *others = (report[name]["weights"] for report in ranks)
        assert all(torch.equal(first[key], other[key]) for other in others for key in first), name


def test_three_resumed_processes_add_in_the_same_order(ranks):
    for name in ("plain", "gradual"):
        whole, resumed = ranks[0][name]["weights"], ranks[0][f"{name} resumed"]["weights"]
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), name
    assert [report["wrapping changes"] for report in ranks] == [[]] * RANKS


def test_an_accumulated_gradient_is_that_of_the_undivided_mini_batch():
    at_once, parts = train(), train(max_images=3)
    assert all((value - parts["weights"][key]).abs().max() <= 1e-6 for key, value in at_once["weights"].items())
    assert torch.allclose(torch.tensor(at_once["results"]), torch.tensor(parts["results"]), atol=1e-4)


@pytest.mark.parametrize(("size", "expected"), [(260, 2), (512, 2), (513, 3), (1, 1)])
def test_every_rank_takes_its_share_in_as_many_parts(monkeypatch, size, expected):
    """SyncBatchNorm exchanges statistics in every forward pass: 260 images on 8 ranks are shares of 33 and of 32."""
    monkeypatch.setattr(engine, "world_size", lambda: 8)
    net, counts = nn.Linear(2, 2), set()
    for rank in range(8):
        share, calls = torch.zeros(len(range(rank, size, 8)), 2), []

        def objective(net, x, y, calls=calls):
            calls.append(len(y))
            return net(x).sum(), net(x)

        labels = torch.zeros(len(share), dtype=torch.int64)
        engine.add_gradients(net, objective, share, labels, size, 32, engine.RunningMeans(CPU))
        assert sum(calls) == len(share) and max(calls) <= 32
        counts.add(len(calls))
    assert counts == {expected}


def test_sums_of_several_processes_are_continued_by_one():
    sums = torch.tensor([[4.0, 1, 2, 2], [8.0, 0, 2, 4]], dtype=torch.float64)
    found = engine.RunningMeans(CPU, {"sums": sums, "seconds": 1.0}).read()
    assert (found.loss, found.top1, found.top5) == pytest.approx((2, 100 / 6, 400 / 6)) and found.seconds >= 1


def test_one_image_for_batchnorm_of_a_map_of_one_pixel_is_one_line():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten())
    images, labels = torch.randn(1, 3, 1, 1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UserError, match=r"got 1 of the 9 images of a mini-batch .*use another --batch_size") as caught:
        engine.add_gradients(net, cross_entropy, images, labels, 9, None, engine.RunningMeans(CPU))
    assert caught.value.of_one_rank, "other ranks may have two images"


class Shares:
    """The naive version of several ranks with BatchNorm, in one process: the shares of a mini-batch go through the
    network one after the other, each with its own statistics; copies keep running statistics."""

    def __init__(self, net):
        self.nets = [net, *(InDouble().train() for _ in range(RANKS - 1))]
        for copy in self.nets[1:]:
            copy.load_state_dict(net.state_dict())

    def __call__(self, net, x, y):
        loss, logits = 0, []
        for rank, own in enumerate(self.nets):
            share, labels = x[rank::RANKS], y[rank::RANKS]
            if len(labels):
                tensors = {**dict(own.named_buffers()), **dict(net.named_parameters())}
                logits.append(torch.func.functional_call(own, tensors, share))
                loss = loss + nn.functional.cross_entropy(logits[-1], labels, reduction="sum") / len(y)
        return loss, torch.cat(logits)


def test_batchnorm_of_each_rank_sees_its_share_alone(ranks):
    """Per-rank statistics are those of ghost batches: of the naive version, not of one process."""
    torch.manual_seed(0)
    net = InDouble()
    naive = Shares(net)
    train_epoch(net, make_loader(), naive, make_optimizer(net.parameters()), CPU, epoch=0)
    several, alone = ranks[0]["batchnorm"]["weights"], train(InDouble, epochs=range(1))["weights"]
    for name, p in net.named_parameters():
        assert (p - several[name]).abs().max() <= 1e-10, name
    for name, buffer in net.named_buffers():
        copies = torch.stack([dict(copy.named_buffers())[name] for copy in naive.nets])
        expected = copies.mean(0) if buffer.is_floating_point() else copies.amax(0)
        assert torch.allclose(expected, several[name], atol=1e-10, rtol=1e-10), name
    assert max((alone[name] - several[name]).abs().max() for name, _ in net.named_parameters()) > 1e-3


def test_what_one_rank_knows_the_others_get(ranks):
    assert [report["agreed"] for report in ranks] == [[0, 0, 0, 15, 0]] * RANKS
    assert all("after epoch 7 ranks 0 and 1 keep different filters" in report["different"] for report in ranks)
    assert [report["from first"] for report in ranks] == [0] * RANKS
    assert [report["none fails"] for report in ranks] == ["made"] * RANKS
    assert [report["first fails"] for report in ranks] == ["UserError: no data on 0", *["SystemExit: 2"] * (RANKS - 1)]
    expected = ["UserError: on rank 1: no data on 1", *["SystemExit: 2"] * (RANKS - 1)]
    assert [report["second fails"] for report in ranks] == expected


def test_with_sync_batchnorm_gradients_are_exchanged_after_all_backward_passes(ranks):
    """Within one of them a rank with an empty share would communicate in another order than the others."""
    assert [report["exchanges last"] for report in ranks] == [[False, True]] * RANKS
    calls = []

    class Objective:
        exchanges_last = True

        @contextmanager
        def no_sync(self):
            calls.append("begin")
            yield
            calls.append("end")

        def exchange(self):
            calls.append("exchange")

        def __call__(self, net, x, y):
            return net(x).sum(), net(x)

    labels = torch.zeros(4, dtype=torch.int64)
    engine.add_gradients(nn.Linear(2, 2), Objective(), torch.zeros(4, 2), labels, 4, 2, engine.RunningMeans(CPU))
    assert calls == ["begin", "end"] * 2 + ["exchange"]


def test_one_rank_of_a_machine_makes_the_data_before_the_others(ranks):
    """So that files are unpacked once, also where that takes longer than --dist_timeout; every rank makes its own."""
    made, times = zip(*(report["machine"] for report in ranks), strict=True)
    assert made == tuple(range(RANKS)) and all(len(own) == 1 for own in times)
    assert min(own[0] for own in times[1:]) >= times[0][0] + TIMEOUT + 1


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert distributed.own_gpu(1, 2) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="starts 4 processes on this machine, which has 2 GPUs; use --nproc_per_node 2"):
        distributed.own_gpu(2, 2)


def test_sync_batchnorm_is_for_gpus_and_keeps_names():
    with pytest.raises(UserError, match="--sync_bn works on GPUs only"):
        place_network(CifarResNet(8), Namespace(sync_bn=True), CPU)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(CifarResNet(8)).eval()
    small, _ = make_small(synced, torch.zeros(1, 3, 32, 32))
    assert list(small.state_dict()) == list(CifarResNet(8).state_dict()), "it is cut and saved as any other"


LOST = [
    RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1975"),
    RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation"),
    dist.DistNetworkError("The client socket has timed out"),
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited, NCCL 2.27"),
]
NOT_LOST = [
    dist.DistBackendError("NCCL error in: NCCLUtils.cpp:1, ncclInvalidUsage: Duplicate GPU detected"),
    RuntimeError("[enforce fail at ../gloo/allreduce.cc:22] opts.elements > 0"),
    RuntimeError("DataLoader timed out after 5 seconds"),
    RuntimeError("Distributed package doesn't have NCCL built in"),
]


def test_only_errors_of_a_lost_connection_count_as_one(monkeypatch):
    assert not any(distributed.is_lost_connection(error) for error in LOST), "one process has nobody to lose"
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert [error for error in LOST + NOT_LOST if distributed.is_lost_connection(error)] == LOST
