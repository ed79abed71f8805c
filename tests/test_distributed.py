"""Several processes train what one process trains: two gloo processes are started once, and what they report is looked at here."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from AHSG_HT import AHSG_HT
from data import DataLoader, ImageArrays
from data.synthetic import make_images
from models.resnet_cifar import CifarResNet
from utils.base.errors import UserError
from utils.small.filters import kept_filters
from utils.train import distributed
from utils.train.distillation import Distillation
from utils.train.engine import evaluate, train_epoch
from utils.train.objective import cross_entropy
from utils.train.trainer import check_same_on_all_ranks

CPU = torch.device("cpu")
# Of the two shares of the last mini-batch one is empty, others differ in size.
SIZES = [7, 8, 9, 11, 12, 1]
EPOCHS = 4


class NoNorm(nn.Module):
    """Convolutions with biases and no BatchNorm."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.Conv2d(width, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.classifier = nn.Linear(width, 10)

    def forward(self, images, return_features=False):
        x = self.body(images).flatten(1)
        logits = self.classifier(x)
        return (logits, x, []) if return_features else logits


def images(augment=True):
    pixels, labels = make_images(sum(SIZES), seed=3)
    return ImageArrays(pixels, labels, [0.5] * 3, [0.25] * 3, augment=augment, seed=5)


def make_objective(net, device, teacher):
    objective = cross_entropy
    if teacher:
        torch.manual_seed(9)
        objective = Distillation(NoNorm(14), net, images(False).__getitems__([0, 1])[0])
    return objective


def train(net, *, teacher=False, max_images=None, epochs=EPOCHS):
    """Trains with the engine as a run does, alone or with the other processes; returns everything that came of it."""
    objective = make_objective(net, CPU, teacher)
    adapters = getattr(objective, "adapters", nn.ModuleList())
    groups = [{"params": list(net.parameters())}]
    groups += [{"params": list(adapters.parameters()), "HTrate": 1}] if teacher else []
    optimizer = AHSG_HT(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, v=0.1, HTrate=0.7)
    if distributed.world_size() > 1:
        objective = distributed.ParallelObjective(net, objective, CPU)
    loader = DataLoader(images(), 7, 0.2, shuffle=True, seed=1)
    assert loader.sizes(0) == SIZES
    kept, results = [], []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        result = train_epoch(net, loader, objective, optimizer, CPU, epoch=epoch, max_images=max_images)
        distributed.average_batchnorm(net)
        check_same_on_all_ranks(kept_filters(net), epoch)
        kept.append(kept_filters(net))
        results.append((result.loss, result.top1, result.top5))
    tested = evaluate(net, DataLoader(images(False), 5), CPU)
    return {
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
        "adapters": {name: value.clone() for name, value in adapters.state_dict().items()},
        "kept": kept,
        "trained": results,
        "tested": (tested.loss, tested.top1, tested.top5),
    }


def no_norm():
    torch.manual_seed(0)
    return NoNorm(10)


class InDouble(nn.Module):
    """A ResNet in float64: BatchNorm over a handful of images multiplies rounding errors step by step."""

    def __init__(self):
        super().__init__()
        self.net = CifarResNet(8).double()

    def forward(self, images):
        return self.net(images.double())


def with_norm():
    torch.manual_seed(0)
    return InDouble()


RUNS = {
    "plain": lambda: train(no_norm()),
    "in parts": lambda: train(no_norm(), max_images=2),
    "distilled": lambda: train(no_norm(), teacher=True),
}


def agreed(give):
    """What five calls return when a rank gives 15 in the third and 2 in the last."""
    agreement = distributed.Agreement()
    return [agreement(15 if give and call == 2 else 2 if call == 4 else 0) for call in range(5)]


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


def one_rank(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with distributed.process_group(0, 60):
        report = {name: run() for name, run in RUNS.items()}
        report["batchnorm"] = train(with_norm(), epochs=1)
        report["agreed"] = agreed(rank == 1)
        report["different"] = caught(lambda: check_same_on_all_ranks({"conv": [rank]}, 7))
        report["from first"] = caught(lambda: distributed.from_first(lambda: distributed.rank()))
        report["first fails"] = caught(lambda: distributed.from_first(fail_on(0)))
        report["second fails"] = caught(lambda: distributed.on_all(fail_on(1)))
        report["none fails"] = caught(lambda: distributed.on_all(fail_on(2)))
        torch.save(report, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes report."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(one_rank, (port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_does(ranks, name):
    one = RUNS["plain" if name == "in parts" else name]()
    for report in ranks:
        two = report[name]
        for entry in ("weights", "adapters"):
            assert one[entry].keys() == two[entry].keys()
            for key, value in one[entry].items():
                assert (value - two[entry][key]).abs().max() <= 1e-6, key
        assert one["kept"] == two["kept"]
        assert torch.allclose(torch.tensor(one["trained"]), torch.tensor(two["trained"]), atol=1e-4)
        assert one["tested"] == pytest.approx(two["tested"], abs=1e-4)
    moved = max((value - one["weights"][key]).abs().max() for key, value in no_norm().state_dict().items())
    assert moved > 0.1, "nothing was learnt, so nothing was compared"


def test_ranks_hold_the_same_bits(ranks):
    for name in (*RUNS, "batchnorm"):
        first, second = (report[name]["weights"] for report in ranks)
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_an_accumulated_gradient_is_that_of_the_whole_mini_batch():
    whole, parts = train(no_norm()), train(no_norm(), max_images=3)
    assert all((value - parts["weights"][key]).abs().max() <= 1e-6 for key, value in whole["weights"].items())
    assert torch.allclose(torch.tensor(whole["trained"]), torch.tensor(parts["trained"]), atol=1e-4)


class Shares:
    """The naive version of two ranks with BatchNorm, in one process: the halves of a mini-batch go through the network one after
    the other, each with its own statistics; two copies keep running statistics."""

    def __init__(self, net):
        self.nets = [net, InDouble()]
        self.nets[1].load_state_dict(net.state_dict())

    def __call__(self, net, x, y):
        self.nets[1].train()
        loss, logits = 0, []
        for own, share, labels in ((n, x[r::2], y[r::2]) for r, n in enumerate(self.nets)):
            if not len(labels):
                continue
            out = torch.func.functional_call(own, {**dict(own.named_buffers()), **dict(net.named_parameters())}, share)
            loss = loss + nn.functional.cross_entropy(out, labels, reduction="sum") / len(y)
            logits.append(out)
        return loss, torch.cat(logits)


def test_batchnorm_of_each_rank_sees_its_share_alone(ranks):
    """Per-rank statistics are those of ghost batches: other weights than one process's, exactly those of the naive version."""
    net = with_norm()
    naive = Shares(net)
    loader = DataLoader(images(), 7, 0.2, shuffle=True, seed=1)
    optimizer = AHSG_HT(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, v=0.1, HTrate=0.7)
    train_epoch(net, loader, naive, optimizer, CPU, epoch=0)
    two, whole = ranks[0]["batchnorm"]["weights"], train(with_norm(), epochs=1)["weights"]
    for name, p in net.named_parameters():
        assert (p - two[name]).abs().max() <= 1e-10, name
    for name, buffer in net.named_buffers():
        mean = (buffer + dict(naive.nets[1].named_buffers())[name]) / 2 if buffer.is_floating_point() else buffer
        assert torch.allclose(mean, two[name], atol=1e-10, rtol=1e-10), name
    assert max((whole[name] - two[name]).abs().max() for name, _ in net.named_parameters()) > 1e-3


def test_a_request_to_stop_reaches_every_rank_after_the_same_mini_batch(ranks):
    assert [report["agreed"] for report in ranks] == [[0, 0, 0, 15, 0]] * 2


def test_other_kept_filters_on_another_rank_end_the_run(ranks):
    for report in ranks:
        assert "after epoch 7 ranks 0 and 1 keep different filters" in report["different"]


def test_what_one_rank_knows_the_others_get(ranks):
    first, second = ranks
    assert first["from first"] == second["from first"] == 0
    assert first["none fails"] == second["none fails"] == "made"
    assert (first["first fails"], second["first fails"]) == ("UserError: no data on 0", "SystemExit: 2")
    assert (first["second fails"], second["second fails"]) == ("UserError: on rank 1: no data on 1", "SystemExit: 2")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert distributed.own_gpu(1, 2) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="starts 4 processes on this machine, which has 2 GPUs; use --nproc_per_node 2"):
        distributed.own_gpu(2, 2)


def test_sync_batchnorm_keeps_names_and_tensors():
    net = with_norm()
    before = net.state_dict(keep_vars=True)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert all(value is before[name] for name, value in synced.state_dict(keep_vars=True).items())
