"""What --resume means: the same run, another run that starts from a file, or a file of others."""

import json

import pytest
import torch

import cifar10_resnet_test as script
import models
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError, run_main
from utils.train.optimizer_state import restore_optimizer
from utils.train.run_folder import RunFolder
from utils.train.setup import build_optimizer

NAME = "checkpoint.resnet8.pth.tar"


def settings(folder):
    return json.loads((folder / "results.json").read_text())["settings"]


def bare(tree, *flags):
    """The script with nothing but the network and the given flags."""
    return script.main([str(tree), "--arch", "resnet8", *map(str, flags)])


def test_resume_alone_is_the_same_run(train, tree):
    flags = ["--HTrate", 0.5, "--k", 0.3, "--v", 0.2, "--manualSeed", 7, "--learning_rate", 0.02]
    whole = train("--epochs", 2, "--save_path", "whole", *flags)
    part = train("--epochs", 1, "--save_path", "part", *flags)
    assert bare(tree, "--epochs", 2, "--resume", part / NAME) == part
    a, b = (torch.load(folder / NAME, weights_only=True)["state_dict"] for folder in (whole, part))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert settings(part)["HTrate"] == 0.5


def test_a_constant_mini_batch_stays_constant(train, tree):
    part = train("--epochs", 1, "--recipe", "baseline")
    bare(tree, "--epochs", 2, "--resume", part / NAME)
    assert settings(part)["k"] is None and settings(part)["recipe"] == "baseline"


def test_changed_settings_are_in_the_log(train, tree):
    part = train("--epochs", 1)
    bare(tree, "--epochs", 2, "--resume", part / NAME, "--HTrate", 0.5)
    assert "HTrate 0.7 -> 0.5" in next(part.glob("log_seed_*")).read_text()


def test_another_recipe_starts_a_new_run_from_the_weights(train, tree):
    dense = train("--epochs", 1, "--recipe", "baseline")
    before = (dense / NAME).read_bytes()
    pruned = bare(tree, "--epochs", 1, "--recipe", "prune", "--batch_size", 16, "--k", 24, "--resume", dense / NAME)
    assert pruned != dense and (dense / NAME).read_bytes() == before
    assert torch.load(pruned / NAME, weights_only=True)["epoch"] == 1
    assert settings(dense)["started_from"] is None and settings(pruned)["started_from"] == str(dense / NAME)
    # Where it came from is not forgotten when it goes on.
    bare(tree, "--epochs", 2, "--resume", pruned / NAME)
    assert settings(pruned)["started_from"] == str(dense / NAME)


def test_a_finetune_run_is_resumed_like_any_other(train, tree):
    pruned = train("--epochs", 1, "--HTrate", 0.5) / NAME
    tune = ["--recipe", "finetune", "--batch_size", 16, "--k", 24]
    whole = bare(tree, *tune, "--epochs", 2, "--resume", pruned, "--save_path", "whole")
    part = bare(tree, *tune, "--epochs", 1, "--resume", pruned, "--save_path", "part")
    assert bare(tree, "--epochs", 2, "--resume", part / NAME) == part
    a, b = (torch.load(folder / NAME, weights_only=True)["state_dict"] for folder in (whole, part))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert settings(part)["HTrate"] == 0.5, "fine-tuning keeps the rate that the network was pruned with"


def test_finetune_auto_without_such_a_run_is_refused(train):
    with pytest.raises(UserError, match="finds no such run"):
        train("--recipe", "finetune", "--resume", "auto", "--batch_size", 16, "--k", 24)


def test_auto_tells_runs_by_their_content_not_by_paths(train, tree, tmp_path, teacher):
    """The data may lie elsewhere (a scratch folder per job), and so may the teacher."""
    (tmp_path / "linked").symlink_to(tree)
    first = train("--epochs", 1, "--resume", "auto", "--teacher", teacher)
    (tmp_path / "copy.pth.tar").write_bytes(teacher.read_bytes())
    again = ["--epochs", 2, "--resume", "auto", "--teacher", "./copy.pth.tar"]
    assert train(*again, data=tmp_path / "linked") == first
    assert train("--epochs", 1, "--resume", "auto", "--teacher", teacher) != first, "it is longer than this run"


def test_auto_refuses_a_folder_of_another_run(train):
    train("--epochs", 1, "--save_path", "out")
    with pytest.raises(UserError, match=r"'out' holds another run.*head_width None -> 20"):
        train("--epochs", 1, "--save_path", "out", "--resume", "auto", "--head_width", 20)


def test_auto_finds_the_run_in_a_numbered_folder(train):
    train("--epochs", 1, "--resume", "auto", "--learning_rate", 0.03)
    second = train("--epochs", 1, "--resume", "auto")
    assert second.name.endswith("-2")
    assert train("--epochs", 2, "--resume", "auto") == second


def test_a_damaged_latest_checkpoint_does_not_block_the_best(train, tree):
    folder = train("--epochs", 1)
    (folder / NAME).write_bytes(b"damaged")
    assert bare(tree, "--epochs", 2, "--resume", folder / "best.resnet8.pth.tar") == folder
    assert torch.load(folder / NAME, weights_only=True)["epoch"] == 2


def test_results_lost_in_a_crash_are_written_again(train, tree):
    folder = train("--epochs", 1)
    for name in ("results.json", "curves.png", "metrics.csv"):
        (folder / name).unlink()
    bare(tree, "--resume", folder / NAME)
    assert json.loads((folder / "results.json").read_text())["finished"]
    assert (folder / "curves.png").is_file() and (folder / "metrics.csv").is_file()


@pytest.mark.parametrize(
    "entries",
    [
        dict(best_prec1=None, epoch=None, optimizer=None),
        dict(best_prec1=torch.ones(3), epoch="3", optimizer=[1]),
        dict(settings=None, history=[{"x": 1}], random_states=3, loader=None, arch=None),
        dict(arch=["resnet8"], epoch=-1, optimizer={"state": {}, "param_groups": None}),
    ],
)
def test_odd_entries_in_files_of_others_are_passed_over(train, tree, tmp_path, entries):
    weights = torch.load(train("--epochs", 1) / NAME, weights_only=True)["state_dict"]
    torch.save({"state_dict": weights, **entries}, tmp_path / "other.pth.tar")
    folder = train("--epochs", 1, "--resume", tmp_path / "other.pth.tar")
    assert json.loads((folder / "results.json").read_text())["epochs_run_here"] == 1


def test_epochs_of_others_do_not_count_as_this_runs(train, tmp_path):
    saved = torch.load(train("--epochs", 1) / NAME, weights_only=True)
    other = {"state_dict": saved["state_dict"], "epoch": 3, "best_prec1": torch.tensor(99.0), "arch": "resnet8"}
    torch.save(other, tmp_path / "other.pth.tar")
    folder = train("--epochs", 4, "--resume", tmp_path / "other.pth.tar")
    results = json.loads((folder / "results.json").read_text())
    assert (results["epochs_done"], results["epochs_run_here"]) == (4, 1)
    assert (folder / "best.resnet8.pth.tar").is_file()
    assert results["best_epoch_accuracy"] < 99


def test_momentum_takes_the_parameters_memory_layout(train, tmp_path):
    folder = train("--epochs", 1)
    saved = torch.load(folder / NAME, weights_only=True)
    for state in saved["optimizer"]["state"].values():
        for name, value in state.items():
            state[name] = value.contiguous()
    torch.save(saved, folder / NAME)
    args = script.parse_args(["--k", "24", "--batch_size", "16"])
    net = models.build("resnet8").to(memory_format=torch.channels_last)
    optimizer = build_optimizer(net, None, args, torch.zeros(2, 3, 32, 32))
    restore_optimizer(optimizer, checkpoints.read(folder / NAME)["optimizer"], "file")
    buffer = optimizer.state[net.stage_3[0].conv_b.weight]["momentum_buffer"]
    assert buffer.is_contiguous(memory_format=torch.channels_last)


def test_two_runs_never_begin_in_one_folder(tmp_path):
    RunFolder(tmp_path, 1).close()
    with pytest.raises(UserError, match="has just begun"):
        RunFolder(tmp_path, 1)


@pytest.mark.parametrize("flag", ["--resume", "--teacher", "--save_path"])
def test_an_empty_path_is_a_mistake(train, flag):
    with pytest.raises(UserError, match="must be a path"):
        train(flag, "")


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (["--recipe", "prune", "--teacher", "x"], "prune_distill"),
        (["--recipe", "baseline", "--teacher", "x"], "use --recipe distill"),
        (["--recipe", "baseline", "--v", "0.5"], "plain SGD"),
        (["--share_classifier"], "needs a teacher"),
        (["--kd", "stages:MSE"], "needs a teacher"),
        (["--macs_cut", "0.5"], "--macs_cut is for --recipe prune_gradual"),
        (["--recipe", "prune_gradual", "--macs_cut", "0.5", "--HTrate", "0.7"], "exclude each other"),
        (["--recipe", "prune_gradual", "--prune_begin", "0.7"], "comes after"),
        (["--heavy_ball", "released", "--threshold_every", "epoch"], "every step"),
    ],
)
def test_flags_that_contradict_each_other(flags, pattern):
    with pytest.raises(UserError, match=pattern):
        script.parse_args(flags)


def test_evaluation_does_not_mind_the_batch_size(train, tree, capsys):
    folder = train("--epochs", 1)
    bare(tree, "--evaluate", "--resume", folder / NAME, "--batch_size", 1000)
    assert "**Test**" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "/locked"), OSError(36, "File name too long", "aaa")]
)
def test_what_the_system_refuses_is_one_line_and_status_2(error, capsys):
    def refuse():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(refuse)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and error.filename in printed and error.strerror in printed
