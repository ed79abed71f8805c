"""Numbers that are not finite, and filters that leave the plan: which mini-batch, which layer, and nothing good is overwritten."""

import re

import pytest
import torch
from torch import nn

import models.registry
from AHSG_HT import AHSG_HT
from models.resnet_cifar import CifarResNet
from utils.base.errors import UserError
from utils.train.run_lock import LOCK_NAME

NAME = "checkpoint.spoilt.pth.tar"


class SpoilGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None


class Spoil(nn.Module):
    """Passes images on; in its n-th training step its output, or the gradient behind it, is not finite for the first image."""

    def __init__(self, n, where):
        super().__init__()
        self.n, self.where = n, where
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.steps += 1
            if int(self.steps) == self.n:
                factor = torch.ones_like(x)
                factor[0] = torch.inf
                if self.where == "activation":
                    return x * factor
                if self.where == "gradient":
                    return SpoilGradient.apply(x, factor)
        elif self.where == "test" and int(self.steps) >= self.n:
            return x * torch.inf
        return x


@pytest.fixture
def spoilt(monkeypatch):
    """Registers "spoilt", a resnet8 whose second stage ends in Spoil(n, where)."""

    def register(n, where):
        def make(num_classes=10):
            net = CifarResNet(8, num_classes)
            net.stage_2.append(Spoil(n, where))
            return net

        monkeypatch.setitem(models.registry.REGISTRY, "spoilt", make)

    return register


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("where", "layer"),
    [("activation", "activation of stage_2.1"), ("gradient", r"gradient at the output of stage_2\.0[.\w]*")],
)
def test_the_first_layer_that_is_not_finite_is_named(train, spoilt, where, layer, workers):
    """Epochs of mini-batches 16, 20, 24: the eighth step is mini-batch 1 of epoch 2."""
    spoilt(8, where)
    with pytest.raises(UserError) as caught:
        train("--epochs", 4, "--save_path", "out", "--workers", workers, arch="spoilt")
    message = str(caught.value)
    assert re.search(
        rf"epoch 2, mini-batch 1 \(learning rate 0\.1, batch size 20\): first not finite: {layer};", message
    )
    assert f"'out/{NAME}' holds 2 of 4 epochs" in message and "\n" not in message
    saved = torch.load(f"out/{NAME}", weights_only=True)
    assert saved["epoch"] == 2 and all(v.isfinite().all() for v in saved["state_dict"].values())


def test_within_the_first_epoch_there_is_no_checkpoint_to_name(train, spoilt):
    spoilt(2, "activation")
    with pytest.raises(UserError, match=r"epoch 0, mini-batch 1.*no checkpoint has been written yet"):
        train("--epochs", 1, arch="spoilt")


def test_weights_that_are_not_finite_never_replace_a_checkpoint(train, spoilt):
    """The last step before a save spoils them: no loss has told of it yet."""
    spoilt(5, "gradient")
    with pytest.raises(UserError, match=r"epoch 1, mini-batch 1.*holds 1 of 2 epochs and 1 mini-batches"):
        train("--epochs", 2, "--save_every", 1, "--save_path", "out", arch="spoilt")


def test_a_test_loss_that_is_not_finite_stops_the_run(train, spoilt):
    spoilt(4, "test")
    with pytest.raises(
        UserError, match=r"test loss of epoch 1.*first not finite: activation of stage_2\.1.*holds 1 of"
    ):
        train("--epochs", 2, "--save_path", "out", arch="spoilt")


def test_filters_that_leave_the_plan_are_caught_at_the_mini_batch(train, monkeypatch):
    real = AHSG_HT.step

    def forgets_once(self, closure=None, k_sum=1.0, epoch=0, final=1):
        return real(self, closure, k_sum, epoch, 0 if (epoch, k_sum) == (1, 1.25) else final)

    monkeypatch.setattr(AHSG_HT, "step", forgets_once)
    with pytest.raises(
        UserError, match=r"filters in epoch 1, mini-batch 1 .*conv_1_3x3\.weight has 16 .*plan keeps 11"
    ):
        train("--epochs", 2, "--print_freq", 1, "--save_every", 2, "--save_path", "out")


def test_a_repetition_is_exact(train, spoilt, monkeypatch):
    """What is repeated has the losses of the first time, dropout included."""
    from utils.train import diagnosis, engine

    losses = []
    real = engine.RunningMeans.add

    def add(self, loss, logits, labels):
        losses.append(float(loss.detach()))
        real(self, loss, logits, labels)

    monkeypatch.setattr(engine.RunningMeans, "add", add)
    spoilt(3, "activation")
    make = models.registry.REGISTRY["spoilt"]

    def with_dropout(num_classes=10):
        net = make(num_classes)
        net.stage_1.append(nn.Dropout(0.3))
        return net

    monkeypatch.setitem(models.registry.REGISTRY, "spoilt", with_dropout)
    assert diagnosis.COPY_EVERY > 3
    with pytest.raises(UserError, match="mini-batch 2"):
        train("--epochs", 1, arch="spoilt")
    assert losses[:2] == losses[3:5]


def test_where_the_file_system_knows_no_locks_the_run_goes_on(train, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    import errno

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    folder = train("--epochs", 1)
    assert "no file locks in" in next(folder.glob("log_seed_*")).read_text()
    assert not (folder / LOCK_NAME).exists()
