"""What --resume means: the same run, another run that starts from a file, or a file of others."""

import re
from pathlib import Path

import pytest
import torch
from crash_lab import same
from tiny import load, results, settings_of

import cifar10_resnet_test as script
import models
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError, run_main
from utils.train.resume import Start
from utils.train.setup import build_optimizer
from utils.train.snapshot import restore_optimizer

NAME = "checkpoint.resnet8.pth.tar"


def settings(folder):
    return results(folder)["settings"]


def bare(tree, *flags):
    """The script with nothing but the data and the given flags."""
    return script.main([str(tree), *map(str, flags)])


@pytest.mark.parametrize(
    ("arch", "flags"),
    [
        ("resnet8_dropout", ["--HTrate", "0.5", "--v", "0.2", "--manualSeed", "7"]),
        ("resnet8", ["--k", "0.2", "--no_restart", "--heavy_ball", "released", "--workers", "2"]),
        ("resnet8", ["--recipe", "baseline"]),
    ],
    ids=["cap, dropout", "step size over epochs, released, workers", "baseline"],
)
def test_resume_alone_is_the_same_run_to_the_last_bit(train, tree, arch, flags):
    name = f"checkpoint.{arch}.pth.tar"
    whole = train("--epochs", 3, "--save_path", "whole", *flags, arch=arch)
    part = train("--epochs", 1, "--save_path", "part", *flags, arch=arch)
    assert bare(tree, "--epochs", 3, "--resume", part / name) == part
    a, b = load(whole / name), load(part / name)
    assert same(a, b) and not same(a, {**b, "epoch": 2})
    passing = ("save_path", "resume", "epochs", "workers")
    assert {n: v for n, v in a["settings"].items() if n not in passing} == {
        n: v for n, v in b["settings"].items() if n not in passing
    }
    assert len((part / "metrics.csv").read_text().splitlines()) == 4


def test_a_continued_run_tells_how_long_it_needs_from_its_first_epoch_on(train, tree, capsys):
    part = train("--epochs", 1)
    checkpoint = load(part / NAME)
    checkpoint["history"][-1]["seconds"] = 1800.0
    torch.save(checkpoint, part / NAME)
    capsys.readouterr()
    bare(tree, "--resume", part / NAME, "--epochs", 4)
    first, second, third = re.findall(r"\[Need: (.*?)\]", capsys.readouterr().out)
    assert first == "01:30:00" and max(second, third) < "00:30:00"


def test_what_changed_is_named_and_what_is_finished_stays(train, tree, capsys):
    part = train("--epochs", 1)
    hits, recorded = results(part)["test_hits"], (part / "results.json").read_bytes()
    bare(tree, "--resume", part / NAME)
    assert (part / "results.json").read_bytes() == recorded, "no piece of training was added"
    for name in ("results.json", "curves.png", "metrics.csv"):
        (part / name).unlink()
    before = (part / NAME).read_bytes()
    bare(tree, "--resume", part / NAME)
    assert "nothing left to do" in capsys.readouterr().out and (part / NAME).read_bytes() == before
    # Results that were lost in a crash are written again.
    assert results(part)["finished"] and (part / "curves.png").is_file() and (part / "metrics.csv").is_file()
    assert hits and results(part)["test_hits"] == hits
    torch.save({name: value for name, value in load(part / NAME).items() if name != "test_hits"}, part / "old.pth.tar")
    (part / "old.pth.tar").replace(part / NAME)
    bare(tree, "--epochs", 2, "--resume", part / NAME, "--HTrate", 0.5)
    assert "HTrate 0.7 -> 0.5" in next(part.glob("log_seed_*")).read_text()
    older = part / "previous.resnet8.pth.tar"
    with pytest.raises(UserError, match="further on"):
        bare(tree, "--epochs", 3, "--resume", older)
    # A latest checkpoint that is damaged does not block the others.
    (part / NAME).write_bytes(b"damaged")
    assert bare(tree, "--epochs", 2, "--resume", older) == part and load(part / NAME)["epoch"] == 2
    (tree.parent / "cut.pth.tar").write_bytes(before[:5000])
    with pytest.raises(UserError, match=r"cut.*damaged"):
        bare(tree, "--resume", tree.parent / "cut.pth.tar")
    for flag, taught in (("arch", []), ("arch_small", ["--recipe", "prune_distill", "--teacher", "x"])):
        with pytest.raises(UserError, match=f"checkpoint of resnet8, not of resnet20; use --{flag} resnet8"):
            bare(tree, f"--{flag}", "resnet20", "--resume", part / NAME, *taught)


def test_another_recipe_starts_a_new_run_from_weights_and_momentum(train, tree):
    pruned = train("--epochs", 1, "--HTrate", 0.5)
    before = (pruned / NAME).read_bytes()
    tune = ["--recipe", "finetune", "--batch_size", 16, "--k", 24]
    whole = bare(tree, *tune, "--epochs", 2, "--resume", pruned / NAME, "--save_path", "whole")
    part = bare(tree, *tune, "--epochs", 1, "--resume", pruned / NAME, "--save_path", "part")
    assert (pruned / NAME).read_bytes() == before and load(part / NAME)["epoch"] == 1
    change = (
        load(part / NAME)["state_dict"]["classifier.weight"] - load(pruned / NAME)["state_dict"]["classifier.weight"]
    )
    assert 0 < change.abs().max() < 0.1
    # It is resumed like any other run, and where it came from is not forgotten.
    assert bare(tree, "--epochs", 2, "--resume", part / NAME) == part
    assert same(load(whole / NAME), load(part / NAME))
    assert settings(pruned)["started_from"] is None and settings(part)["started_from"] == str(pruned / NAME)
    assert settings(part)["HTrate"] == 0.5 and settings(part)["learning_rate"] == 0.001


def test_auto_continues_the_same_run_and_no_other(train):
    schedule = ("--schedule", 1, "--gammas", 10)
    first = train("--epochs", 1, "--resume", "auto", *schedule)
    assert first.name == "prune-cifar10-resnet8-HT0.7-seed1"
    second = train("--epochs", 1, "--resume", "auto", "--schedule", 2, "--gammas", 10)
    assert second.name == f"{first.name}-2"
    assert train("--epochs", 2, "--resume", "auto", *schedule) == first and load(first / NAME)["epoch"] == 2
    assert load(second / NAME)["epoch"] == 1 and train("--epochs", 1).name == f"{first.name}-3"
    with pytest.raises(UserError, match=rf"'{second}' holds another run.*head_width None -> 20"):
        train("--epochs", 1, "--save_path", second, "--resume", "auto", "--head_width", 20)
    # A recipe's loss without a teacher changes nothing, so an older run, made with another one, is continued.
    saved = checkpoints.read(second / NAME)
    saved["settings"] |= {"kd": ["logits:L1:2"], "ce_weight": 0.25}
    checkpoints.write(saved, second / NAME)
    again = ("--epochs", 1, "--save_path", second, "--resume", "auto", "--schedule", 2, "--gammas", 10)
    assert train(*again) == second
    # Of a run that was killed before its first checkpoint only the log is left.
    for file in second.iterdir():
        file.unlink() if not file.name.startswith("log_") else None
    assert train("--epochs", 1, "--save_path", second, "--resume", "auto") == second


def test_auto_identifies_runs_by_their_content_not_by_paths(train, tree, tmp_path, teacher):
    """The data may lie elsewhere (a scratch folder per job), and so may the teacher."""
    (tmp_path / "linked").symlink_to(tree)
    first = train("--epochs", 1, "--resume", "auto", "--teacher", teacher)
    (tmp_path / "copy.pth.tar").write_bytes(teacher.read_bytes())
    again = ["--epochs", 2, "--resume", "auto", "--teacher", "./copy.pth.tar"]
    assert train(*again, data=tmp_path / "linked") == first
    assert train("--epochs", 1, "--resume", "auto", "--teacher", teacher) != first, "it is longer than this run"
    narrow = ["--recipe", "baseline", "--epochs", 1, "--resume", "auto", "--widths_of"]
    small = first / "small.resnet8.pth.tar"
    assert train(*narrow, small) == train(*narrow, f"./{small}")


def test_files_of_others_count_for_their_weights_and_epoch(train, tmp_path):
    """Entries that are not of the expected kind are passed over; epochs of others are not this run's."""
    weights = load(train("--epochs", 1) / NAME)["state_dict"]
    for entries, done in (
        (dict(epoch=3, best_prec1=torch.tensor(99.0), arch="resnet8"), 3),
        (dict(best_prec1=None, epoch=None, optimizer=None), 0),
        (dict(best_prec1=torch.ones(3), epoch="3", optimizer=[1]), 0),
        (dict(settings=None, history=[{"x": 1}], random_states=3, loader=None, arch=None), 0),
        (dict(arch=["resnet8"], epoch=-1, optimizer={"state": {}, "param_groups": None}), 0),
    ):
        torch.save({"state_dict": weights, **entries}, tmp_path / "other.pth.tar")
        folder = train("--epochs", done + 1, "--resume", tmp_path / "other.pth.tar")
        found = results(folder)
        assert (found["epochs_done"], found["epochs_run_here"]) == (done + 1, 1)
        assert found["best_epoch_accuracy"] < 99 and (folder / "best.resnet8.pth.tar").is_file()


def test_released_momentum_and_prev_data_become_the_optimizers_state(train, tmp_path):
    """The release kept prev_data inside param_groups. Here it is state, in the parameters' memory layout."""
    first = train("--epochs", 1, "--save_path", "first") / NAME
    saved = load(first)
    state = saved["optimizer"]["state"]
    keys = list(range(1000, 1000 + len(state)))
    group = {n: saved["optimizer"]["param_groups"][0][n] for n in ("lr", "momentum", "weight_decay", "nesterov")}
    group |= {"params": keys, "prev_data": [state[i]["prev_data"].contiguous() for i in range(len(state))], "v": 0.1}
    momentum = {k: {"momentum_buffer": state[i]["momentum_buffer"].contiguous()} for i, k in enumerate(keys)}
    old = {name: saved[name] for name in ("epoch", "arch", "state_dict")}
    old |= {"best_prec1": torch.tensor(10.0), "optimizer": {"state": momentum, "param_groups": [group]}}
    torch.save(old, tmp_path / "released.pth.tar")
    net = models.build("resnet8").to(memory_format=torch.channels_last)
    args = settings_of(script, ["--k", "24", "--batch_size", "16"])
    optimizer = build_optimizer(net, None, args, torch.zeros(2, 3, 32, 32), Start(None))
    restore_optimizer(optimizer, checkpoints.read(tmp_path / "released.pth.tar")["optimizer"], "file")
    for value in optimizer.state[net.stage_3[0].conv_b.weight].values():
        assert value.is_contiguous(memory_format=torch.channels_last)
    folder = train("--epochs", 2, "--resume", tmp_path / "released.pth.tar")
    train("--epochs", 2, "--resume", first)
    assert folder.parent.name == "runs" and same(load(folder / NAME)["state_dict"], load(first)["state_dict"])


def test_a_full_gpu_is_one_line_that_names_what_bounds_a_pass(capsys):
    def fill():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SystemExit) as caught:
        run_main(fill)
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and printed.count("\n") == 1 and "--max_images_per_step" in printed


def test_what_the_system_refuses_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        run_main(Path("a" * 300).read_text)
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and printed.count("\n") == 1 and "File name too long: 'aaa" in printed
