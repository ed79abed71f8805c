"""From a command line to the parts of a run: what an option gives arrives at the optimizer, the loader and the loss."""

import copy
import re
import shlex

import pytest
import torch
from crash_lab import same
from test_loader import wanted_sizes
from test_models import public_weights
from tiny import settings_of

import cifar10_resnet_test as script
import data
import imagenet_resnet_test
import models
from AHSG_HT import AHSG_HT
from models import public
from utils.base import arguments
from utils.base import checkpoint as checkpoints
from utils.tables.runs import ROOT
from utils.train import command_line, setup, trainer
from utils.train.engine import evaluate
from utils.train.resume import Start

README = (ROOT / "README.md").read_text(encoding="utf-8")
NAME = "checkpoint.resnet8.pth.tar"
CPU = torch.device("cpu")
TEXTS = ("-1", "0", "0.5", "1", "1.5", "31", "32", "1024", "1025", "4294967296", "nan", "inf", "1e999", "x", "")
# Which of these every type of a number takes; test_options_fuzz.py asks the types themselves.
TYPES = {
    "COUNT": "1 31 32 1024 1025 4294967296",
    "WHOLE": "0 1 31 32 1024 1025 4294967296",
    "SEED": "0 1 31 32 1024 1025",
    "POSITIVE": "0.5 1 1.5 31 32 1024 1025 4294967296",
    "NOT_NEGATIVE": "0 0.5 1 1.5 31 32 1024 1025 4294967296",
    "KEPT_RATE": "0.5 1",
    "PRUNED_RATE": "0 0.5",
    "SHARE": "0 0.5 1",
    "IMAGE_SIZE": "32 1024",
}


@pytest.mark.parametrize("name", TYPES)
def test_a_type_takes_its_range_and_nothing_else(name):
    taken = []
    for text in TEXTS:
        try:
            taken.append((text, float(getattr(arguments, name)(text)) == float(text)))
        except arguments.argparse.ArgumentTypeError as error:
            assert f"got '{text}'" in str(error)
    assert taken == [(text, True) for text in TYPES[name].split()]


def test_the_optimizer_has_the_options_of_the_command_line():
    line = "--decay 0.25 --momentum 0.5 --lr 0.3 --v 0.2 --HTrate 0.6 --heavy_ball released --norm 1 --no_regrow"
    wanted = dict(weight_decay=0.25, momentum=0.5, lr=0.3, v=0.2, HTrate=0.6, heavy_ball="released", norm=1)
    net, example = models.build("resnet8"), torch.zeros(2, 3, 32, 32)
    for nesterov in ("off", "on"):
        args = settings_of(script, [*line.split(), "--nesterov", nesterov])
        (group,) = setup.build_optimizer(net, None, args, example, Start(None)).param_groups
        assert {name: group[name] for name in wanted} == wanted
        assert (group["regrow"], group["nesterov"]) == (False, nesterov == "on")
    adapters = torch.nn.Linear(2, 2)
    for flags, kept in (([], 0.7), (["--recipe", "baseline"], None)):
        args = settings_of(script, flags)
        first, last = setup.build_optimizer(net, adapters, args, example, Start(None)).param_groups
        assert (first.get("HTrate"), last.get("HTrate")) == (kept, kept and 1)
        assert [*last["params"]] == [*adapters.parameters()], "they are trained, and never thresholded"


def test_the_loader_has_the_options_of_the_command_line(tree):
    images = data.load("cifar10", tree)
    line = ["--batch_size", "4", "--k", "0.25", "--growth", "exponential", "--max_batch_size", "12"]
    for flags, passed in ((["--no_restart"], 8), ([], 0)):
        loader = setup.build_train_loader(images, settings_of(script, [*line, *flags]), CPU)
        own = dict(growth="exponential", max_batch_size=12)
        assert len(loader.sizes(0)) == 8 and loader.sizes(0) == wanted_sizes(60, 4, 0.25, **own)
        assert loader.sizes(1) == wanted_sizes(60, 4, 0.25, first_t=passed, **own)


def test_test_images_go_through_the_network_by_their_size(monkeypatch):
    """As many pixels as 500 images of 32x32 have, or as many images as in training."""
    for size, flags, wanted in ((32, [], 500), (64, [], 125), (512, [], 64), (32, ["--max_images_per_step", "7"], 7)):
        pixels = torch.zeros(600, 1, size, size, dtype=torch.uint8)
        images = data.ImageArrays(pixels, torch.zeros(600, dtype=torch.int64), [0.5], [0.5], augment=False)
        loader = setup.build_test_loader(data.Data("own", images, images, ["a"], ""), settings_of(script, flags), CPU)
        assert loader.sizes()[0] == wanted


def test_the_loss_and_the_steps_have_the_options_of_the_command_line(train, teacher, monkeypatch):
    weights, parts, forwards = [], [], []

    def note(function, notes, name):
        return lambda *args, **options: (notes.append(options[name]), function(*args, **options))[1]

    monkeypatch.setattr(setup, "Distillation", note(setup.Distillation, weights, "ce_weight"))
    monkeypatch.setattr(trainer, "train_step", note(trainer.train_step, parts, "max_images"))
    accelerate = trainer.accelerate
    monkeypatch.setattr(trainer, "accelerate", lambda *args: (forwards.append(args[3]), accelerate(*args))[1])
    taught = ["--arch_small", "resnet8", "--teacher", teacher, "--kd", "logits:KL", "--ce_weight", 0.25]
    train("--epochs", 1, *taught, "--max_images_per_step", 5, "--amp")
    assert weights == [0.25] and set(parts) == {5} and [how.amp for how in forwards] == [True]


def test_thresholding_once_per_epoch_is_one_thresholding_per_epoch(train, monkeypatch):
    calls, module = [], AHSG_HT._layers.__globals__
    threshold = module["_threshold"]
    monkeypatch.setitem(module, "_threshold", lambda *args: (calls.append(1), threshold(*args))[1])
    for every, count in (("epoch", 2), ("step", 6)):
        calls.clear()
        train("--epochs", 2, "--threshold_every", every)
        assert len(calls) == count


def test_a_public_networks_normalisation_is_used_and_kept(train, tmp_path, monkeypatch):
    """In training, in the files that the run leaves, and when it is tested."""
    torch.save(public_weights(1), tmp_path / "public.th")
    seen = []

    def note(net, loader, *rest, **options):
        seen.append(loader)
        return evaluate(net, loader, *rest, **options)

    monkeypatch.setattr(setup, "evaluate", note)
    monkeypatch.setattr(trainer, "evaluate", note)
    start = ["--resume", tmp_path / "public.th"]
    folder = train("--epochs", 1, "--recipe", "finetune", *start, "--batch_size", 16, "--k", 24)
    train("--evaluate", *start)
    train("--evaluate", "--resume", folder / "small.resnet8.pth.tar")
    assert len(seen) == 3
    for loader in seen:
        assert loader.dataset.mean.tolist() == pytest.approx(public.NORMALISATION["mean"])
    for name in (NAME, "small.resnet8.pth.tar"):
        kept = models.load_checkpoint(folder / name)["normalisation"]
        assert kept == {part: pytest.approx(values) for part, values in public.NORMALISATION.items()}


def test_fine_tuning_takes_over_momentum_and_what_stays_removed(train, monkeypatch):
    """Of gradual pruning, whose removed filters never return, in a network that was not cut."""
    gradual = ["--recipe", "prune_gradual", "--prune_begin", 0, "--prune_end", 0, "--tied", "off", "--shrink", "off"]
    saved = checkpoints.read(train(*gradual, "--epochs", 1, "--HTrate", 0.5, "--save_path", "out") / NAME)
    begun, run = [], trainer.Trainer.train
    monkeypatch.setattr(
        trainer.Trainer,
        "train",
        lambda self, folder: (begun.append(copy.deepcopy(self.optimizer.state_dict()["state"])), run(self, folder))[1],
    )
    flags = ["--recipe", "finetune", "--resume", f"out/{NAME}", "--epochs", 1, "--v", 0]
    tuned = checkpoints.read(train(*flags, "--batch_size", 16, "--k", 24) / NAME)["state_dict"]
    momentum = {key: state["momentum_buffer"] for key, state in saved["optimizer"]["state"].items()}
    assert same(momentum, {key: state["momentum_buffer"] for key, state in begun[0].items()}) and len(momentum) > 20
    removed = 0
    for name, weight in saved["state_dict"].items():
        if weight.dim() == 4:
            gone = weight.flatten(1).eq(0).all(1)
            removed += int(gone.sum())
            assert not tuned[name][gone].any() and not torch.equal(tuned[name], weight)
    assert removed == 120, "half of the filters"


def test_the_readmes_commands_are_understood():
    commands = re.findall(r"`python (cifar10|imagenet)_resnet_test\.py ([^`]*)`", README)
    for name, flags in commands:
        module = {"cifar10": script, "imagenet": imagenet_resnet_test}[name]
        words = shlex.split(re.sub(r"\[([^]]*)\]", r"\1", flags))
        assert module.settings(command_line.parse(module.parser(), words), {}), flags
    assert len(commands) >= 8


def test_the_readmes_loop_trains():
    """One epoch of it."""
    code = README.partition("```python\n")[2].partition("```")[0]
    assert "range(200)" in code
    net = models.build("resnet8")
    dataset = torch.utils.data.TensorDataset(torch.randn(70, 3, 32, 32), torch.arange(70) % 10)
    exec(code.replace("range(200)", "range(1)"), {"net": net, "dataset": dataset})
    assert [int(w.flatten(1).any(1).sum()) for w in net.parameters() if w.dim() == 4] == [11, 11, 11, 22, 22, 44, 44]
