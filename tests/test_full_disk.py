"""A disk that fills up: one line, and every earlier file stays."""

import errno
import resource
from contextlib import contextmanager

import pytest
import torch

from utils.base import checkpoint as checkpoints
from utils.base import files
from utils.base.errors import UserError
from utils.base.files import append_line
from utils.train.run_folder import METRICS, RunFolder

NAME = "checkpoint.resnet8.pth.tar"


@contextmanager
def largest_file(size):
    """In here a file takes so many bytes: writing more fails in the middle, as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_during_save_loses_nothing(train):
    whole = train("--epochs", 2, "--save_path", "whole")
    folder = train("--epochs", 1, "--save_path", "out")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    refused = pytest.raises(UserError, match=r"^cannot write '.*pth.tar' \(File too large\)[^\n]*$")
    with largest_file(100_000), refused:
        train("--epochs", 2, "--resume", folder / NAME)
    for name, content in before.items():
        now = (folder / name).read_bytes()
        assert now == content or (name.startswith("log_") and now.startswith(content)), name
    assert not list(folder.glob(".*.tmp"))
    train("--epochs", 2, "--resume", "auto", "--save_path", folder)
    a, b = (torch.load(path / NAME, weights_only=True)["state_dict"] for path in (folder, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_line_that_was_written_in_part_is_taken_back(tmp_path):
    append_line(tmp_path / "log", "first")
    with largest_file(20), pytest.raises(OSError):
        append_line(tmp_path / "log", "x" * 100)
    assert (tmp_path / "log").read_text() == "first\n"


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_an_error_at_any_point_of_a_save_leaves_good_checkpoints(tmp_path, monkeypatch, name):
    def checkpoint(value):
        return {"arch": "net", "state_dict": {"w": torch.tensor([value])}}

    with RunFolder(tmp_path, 1) as run:
        for value in (1.0, 2.0):
            run.save_checkpoint(checkpoint(value), is_best=True)
        monkeypatch.setattr(files.os, name, full)
        with pytest.raises(UserError, match="No space left"):
            run.save_checkpoint(checkpoint(3.0), is_best=False)
        monkeypatch.undo()
    kinds = {p.name: float(checkpoints.read(p)["state_dict"]["w"]) for p in tmp_path.glob("*.pth.tar")}
    assert kinds.get("checkpoint.net.pth.tar", kinds["previous.net.pth.tar"]) == 2.0
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("what", ["utils.train.run_folder.append_line", "os.fsync"])
def test_other_files_that_cannot_be_written_are_one_line(train, monkeypatch, what):
    folder = train("--epochs", 1, "--save_path", "out")
    before = (folder / NAME).read_bytes()
    monkeypatch.setattr(what, full)
    with pytest.raises(UserError, match=r"^cannot write.*No space left[^\n]*$"):
        train("--resume", folder / NAME)
    assert (folder / NAME).read_bytes() == before


def test_a_torn_last_line_of_the_log_is_ended(tmp_path):
    (tmp_path / "log_seed_1.txt").write_bytes(b"whole\nhal")
    with RunFolder(tmp_path, 1) as run:
        run.log("next", show=False)
        run.write_metrics([dict.fromkeys(METRICS, 1.5)])
    assert (tmp_path / "log_seed_1.txt").read_bytes() == b"whole\nhal\nnext\n"
    assert (tmp_path / "metrics.csv").read_text() == f"{','.join(METRICS)}\n{','.join(['1.5'] * len(METRICS))}\n"
