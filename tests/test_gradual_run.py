"""`--recipe prune_gradual` from the command line: cuts while it trains, resumption across them, refusals."""

import os
import re

import pytest
import tiny
import torch
from crash_lab import same

import models
from utils.base.errors import UserError
from utils.tables.runs import read_run

NAME = "checkpoint.resnet8.pth.tar"
GRADUAL = ["--recipe", "prune_gradual", "--batch_size", 16, "--lr", 0.05, "--warmup", 0, "--epochs", 4]


def load(folder):
    return torch.load(folder / NAME, weights_only=True)


@pytest.fixture
def whole(train):
    return train(*GRADUAL, "--macs_cut", 0.5, "--save_path", "whole")


def test_a_run_is_cut_while_it_trains(whole):
    results, log = (tiny.results(whole), (whole / "log_seed_1.txt").read_text())
    full, left = (results["small"][when]["multiply_adds"] for when in ("before", "after"))
    assert full == results["network"]["multiply_adds"] == 12_239_488 and left <= full / 2
    assert log.count("network cut before step") >= 2 and "multiply-adds 12,239,488" in log
    differences = re.findall(r"network cut .*logits differ by at most (\S+) on 20 images", log)
    assert len(differences) >= 2 and all(float(difference) < 1e-5 for difference in differences)
    weights = load(whole)["state_dict"]
    for layer in results["filters"]:
        assert layer["kept"] == len(layer["kept_indices"]) == len(weights[layer["name"]]) < layer["shape"][0]
    small = torch.load(whole / "small.resnet8.pth.tar", weights_only=True)
    assert small["kept"]["conv_1_3x3.weight"] == results["filters"][0]["kept_indices"], "in the unpruned numbering"
    assert sum(p.numel() for p in models.load(whole / NAME).parameters()) == results["small"]["after"]["parameters"]


@pytest.mark.parametrize(("steps", "stop"), [(8, []), (9, ["--save_every", 1])], ids=["between epochs", "within one"])
def test_a_run_resumes_across_a_cut_to_the_last_bit(train, whole, steps, stop, monkeypatch):
    """The schedule is over all steps, so the run is interrupted rather than shortened."""
    flags = [*GRADUAL, "--macs_cut", 0.5, "--save_path", "part", *stop]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, steps)
        train(*flags)
    part = train(*flags, "--resume", "auto")
    assert same(load(whole), load(part))
    assert tiny.results(part)["pieces"] == 2


def test_auto_continues_a_run_that_began_trained_where_its_folder_is_named(train, teacher, monkeypatch):
    """Its recipe has other numbers than from random weights; a run from random weights does not continue it."""
    flags = ["--recipe", "prune_gradual", "--macs_cut", 0.3, "--epochs", 2]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 5)
        train(*flags, "--resume", teacher, "--save_path", "runs/prune_gradual-cifar10-resnet8-cut0.3-seed1")
    trained = train(*flags, "--save_path", "./runs/prune_gradual-cifar10-resnet8-cut0.3-seed1", "--resume", "auto")
    settings = tiny.results(trained)["settings"]
    assert (settings["started_from"], settings["learning_rate"], settings["prune_end"]) == (str(teacher), 0.05, 0.0)
    as_trained = ["--learning_rate", 0.05, "--warmup", 0, "--prune_begin", 0, "--prune_end", 0]
    assert train(*flags, *as_trained, "--resume", "auto") != trained


def stop_at(monkeypatch, step):
    """Interrupts a run at a step (of 4 an epoch)."""
    from utils.train import trainer

    real, calls = trainer.train_step, []

    def train_step(*args, **options):
        calls.append(1)
        if len(calls) > step:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(trainer, "train_step", train_step)


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_images_per_step", 8],
        ["--teacher", "TEACHER", "--kd", "logits:KL:0.5", "--ce_weight", 0.5],
        ["--HTrate", 0.6, "--allocation", "global", "--prune_score", "taylor", "--v", 0.1],
        ["--HTrate", 0.5, "--tied", "off", "--prune_score", "gamma", "--shrink", "off", "--round_to", 4],
        ["--HTrate", 0.5, "--prune_begin", 0, "--prune_end", 0],
    ],
    ids=["in parts", "teacher", "global taylor", "untied masked", "one-shot"],
)
def test_other_options_end_with_an_equal_small_network(train, teacher, flags):
    flags = [str(teacher) if flag == "TEACHER" else flag for flag in flags]
    rate = [] if "--HTrate" in flags else ["--macs_cut", 0.4]
    folder = train(*GRADUAL[:-1], 2, *rate, *flags)
    small = tiny.results(folder)["small"]
    assert small["after"]["multiply_adds"] < small["before"]["multiply_adds"]
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cut, trained = (models.load(folder / name)(images) for name in ("small.resnet8.pth.tar", NAME))
    assert (cut - trained).abs().max() <= 1e-4 * trained.abs().max()


@pytest.mark.parametrize("score", ["norm", "taylor"])
def test_one_shot_trains_the_small_network_from_the_first_step(train, teacher, score):
    """Unless the score needs gradients."""
    folder = train(*GRADUAL[:-1], 1, "--HTrate", 0.5, "--resume", teacher, "--prune_score", score)
    log = (folder / "log_seed_1.txt").read_text()
    assert (log.index("network cut before step") < log.index("Epoch: [000][000")) == (score == "norm")


def test_a_run_that_goes_on_removes_at_once_where_it_is_unless_it_is_over(train, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 5)
        train(*GRADUAL, "--HTrate", 0.5, "--prune_begin", 0.8, "--prune_end", 0.9, "--save_path", "part")
    at_once = ["--resume", f"part/{NAME}", "--prune_begin", 0, "--prune_end", 0, "--epochs"]
    over, goes_on = (train(*at_once, epochs, "--save_path", f"to-{epochs}") for epochs in (1, 2))
    texts = [(folder / "log_seed_1.txt").read_text() for folder in (over, goes_on)]
    assert not re.search(r"filters removed, \d+ left", texts[0]), "it would be untested"
    assert "\nstep 3: " in texts[1] and "network cut before step 3" in texts[1]


@pytest.mark.parametrize(
    "change", [["--macs_cut", 0.9], ["--HTrate", 0.5], ["--round_to", 8], ["--tied", "off"], ["--allocation", "global"]]
)
def test_a_run_that_goes_on_keeps_its_plan(train, whole, change):
    """Which would ignore another amount, that results.json and the tables would name."""
    with pytest.raises(UserError, match=r"goes on with the plan that it began with, --(macs_cut|round_to|tied|alloc)"):
        train("--resume", whole / NAME, *change, "--epochs", 5, "--save_path", "other")


def test_a_run_that_begins_before_the_first_cut_begins_whole(train, monkeypatch):
    flags = [*GRADUAL, "--macs_cut", 0.5, "--save_path", "part"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 5)
        train(*flags)
    folder = train("--recipe", "baseline", "--resume", f"part/{NAME}", "--epochs", 1)
    assert not tiny.results(folder)["began_cut"] and read_run(folder / "results.json").name.startswith("baseline")


def test_the_best_epoch_is_one_of_the_pruned_network(train, teacher):
    """A trained network that hardly trains and then loses most of its filters: the first epoch has them all."""
    flags = ["--warmup", 0, "--lr", 1e-4, "--HTrate", 0.3, "--prune_begin", 0.5, "--prune_end", 0.9]
    folder = train(*GRADUAL[:4], *flags, "--epochs", 4, "--resume", teacher, "--save_path", "best")
    results = tiny.results(folder)
    accuracies = [float(line.split(",")[5]) for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    assert accuracies[0] > accuracies[3] and results["best_epoch"] == 3
    best = torch.load(folder / "best.resnet8.pth.tar", weights_only=True)
    assert best["epoch"] == 4 and best["best_prec1"] == results["best_epoch_accuracy"] == accuracies[3]


def test_fine_tuning_a_cut_network_counts_in_the_unpruned_one(train, whole):
    file, first = whole / NAME, tiny.results(whole)
    tuned = train("--recipe", "finetune", "--resume", file, "--epochs", 1, "--v", 0, "--batch_size", 16, "--k", 24)
    results = tiny.results(tuned)
    assert (results["network"], results["filters"]) == (first["network"], first["filters"])
    assert results["optimizer"] == "SGD" and results["small"]["after"] == first["small"]["after"]
    assert results["began_cut"] and not first["began_cut"]
    assert read_run(tuned / "results.json").name.startswith("cut network, fine-tuned")
    # The small network's file is as good a start, and is not numbered anew.
    small = ["--resume", whole / "small.resnet8.pth.tar", "--epochs", 1]
    again = train("--recipe", "finetune", *small, "--v", 0, "--batch_size", 16, "--k", 24)
    results = tiny.results(again)
    assert (results["network"], results["filters"]) == (first["network"], first["filters"])
    further = train(*GRADUAL[:-2], "--HTrate", 0.7, *small)
    assert "one-shot 30 % of a cut network" in read_run(further / "results.json").name
    results = tiny.results(further)
    assert results["network"] == first["network"] and results["small"]["before"] == first["network"]
    for layer, before in zip(results["filters"], first["filters"], strict=True):
        assert layer["shape"] == before["shape"] and set(layer["kept_indices"]) < set(before["kept_indices"])


def test_a_cut_network_is_distilled_with_new_adapters(train, whole, teacher):
    """Its features are narrower than the teacher's; the saved optimizer knows nothing of the linear map."""
    flags = ["--arch_small", "resnet8", "--teacher", teacher, "--resume", whole / NAME, "--epochs", 1]
    folder = train("--recipe", "distill", *flags, "--batch_size", 16)
    (weight,) = (value for value in load(folder)["adapters"].values() if value.dim() > 1)
    assert weight.shape[0] == 64 > weight.shape[1] and tiny.results(folder)["began_cut"]


def test_a_network_in_training_is_compiled_after_every_cut(monkeypatch):
    """torch.compile gives up on a function after a few compilations, eight by default."""
    from types import SimpleNamespace

    from utils.train.trainer import Trainer

    compiled = []
    net = torch.nn.Linear(4, 4)

    def backend(graph, inputs):
        compiled.append(1)
        return graph.forward

    run = SimpleNamespace(acceleration=SimpleNamespace(compile=True), net=net, device=None, _largest=8, _objective=None)
    monkeypatch.setattr(
        "utils.train.trainer.accelerate",
        lambda *rest: torch.compile(torch.nn.Linear(4, 4).forward, backend=backend),
    )
    for _ in range(12):
        Trainer._wrap(run)
        run.objective(torch.zeros(2, 4))
    assert len(compiled) == 12


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (["--macs_cut", 0.995], "reach"),
        (["--HTrate", 1], "removes nothing"),
        (["--HTrate", 0.7, "--teacher", "TEACHER", "--kd", "feature:MSE"], "add --shrink off"),
        (["--HTrate", 0.7, "--teacher", "TEACHER", "--kd", "stages:AT", "--teacher_cache", "runs"], "not stages"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(train, teacher, flags, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        train(*GRADUAL, *[str(teacher) if flag == "TEACHER" else flag for flag in flags])
    assert "\n" not in str(caught.value) and not os.path.exists("runs")
