"""Latency's table, picture and sentences. Not how fast anything is: that depends on the machine."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from utils import get_small_model
from utils.base.errors import UserError
from utils.bench import latency
from utils.bench.latency import Timing, median_and_spread, take_turns, verdict

TIMING = Timing("cpu", 128, dense=2.0, dense_spread=0.1, small=1.0, small_spread=0.1, ratio=2.1)


def test_command_writes_table_and_picture(tmp_path, capsys):
    flags = ["--arch", "resnet8", "--HTrate", "0.5", "--batch_sizes", "1", "2", "--repeats", "3", "--layers"]
    latency.main([*flags, "--save_path", str(tmp_path / "speed")])
    out = capsys.readouterr().out
    assert "batch 1 on cpu:" in out and "batch 2 on cpu:" in out and "all Conv2d" in out
    content = json.loads((tmp_path / "speed" / "latency.resnet8.json").read_text())
    assert [row["batch_size"] for row in content["timings"]] == [1, 2]
    assert all(row["ratio"] > 1.3 and row["dense"] > 0 and row["small"] > 0 for row in content["timings"])
    assert (tmp_path / "speed" / "latency.resnet8.png").read_bytes().startswith(b"\x89PNG")
    # Every convolution is timed in both networks.
    assert sum(kind == "Conv2d" for _, kind, _, _ in content["layers"]) == 7


@pytest.mark.parametrize(
    "changes, says",
    [
        ({}, "2.00 times as fast with 2.10 times fewer multiply-adds: as expected"),
        ({"small": 1.95}, "within the spread"),
        ({"small": 1.6}, "lose efficiency as they get narrower"),
        ({"small": 1.6, "batch_size": 1}, "hardly depends on their width"),
        ({"small": 1.6, "device": "cuda"}, "hardly depends on their width"),
        ({"ratio": 1.0}, "nothing was removed"),
    ],
)
def test_verdict_says_why(changes, says):
    assert says in verdict(replace(TIMING, **changes))


def test_verdict_names_other_operations():
    layers = [("Conv2d", 1.0, 0.4), ("BatchNorm2d", 0.6, 0.5), ("relu", 0.2, 0.1)]
    assert "60 % of the small network's time goes into other operations" in verdict(replace(TIMING, small=1.6), layers)


def test_networks_take_turns():
    called = []
    calls = [lambda: called.append("a"), lambda: called.append("b")]
    seconds = take_turns(calls, torch.device("cpu"), repeats=4)
    assert called == ["a", "b"] * (latency.WARM_UP + 4) and [len(s) for s in seconds] == [4, 4]


def test_median_and_spread():
    assert median_and_spread([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 2.0)
    assert median_and_spread([5.0]) == (5.0, 0.0)


def test_command_line_errors(monkeypatch):
    with pytest.raises(UserError, match="name a checkpoint, or a network with --arch"):
        latency.main([])
    with pytest.raises(UserError, match="unknown network 'lenet'"):
        latency.main(["--arch", "lenet"])
    with pytest.raises(UserError, match=r"0\.001 keeps no filter"):
        latency.main(["--arch", "resnet8", "--HTrate", "0.001"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU here"):
        latency.main(["--arch", "resnet8", "--device", "cuda"])


def test_layers_of_a_plain_network():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    rows = latency.layer_timings(net, net, torch.zeros(2, 3, 8, 8), repeats=2)
    assert [(name, kind) for name, kind, _, _ in rows] == [
        ("0", "Conv2d"), ("1", "ReLU"), ("2", "Flatten"), ("3", "Linear"),
    ]  # fmt: skip


def test_a_small_networks_file_is_timed_against_the_dense_network_of_its_name(tmp_path, capsys):
    net = latency.models.build("resnet8")
    with torch.no_grad():
        latency.hard_threshold(list(net.parameters()), 0.5)
    torch.save({"arch": "resnet8", "state_dict": net.state_dict()}, tmp_path / "checkpoint.pth")
    get_small_model.main([str(tmp_path / "checkpoint.pth"), "--save_path", str(tmp_path)])
    capsys.readouterr()
    found = []
    for file in ("checkpoint.pth", "small.resnet8.pth.tar"):
        latency.main(
            [str(tmp_path / file), "--batch_sizes", "2", "--repeats", "2", "--save_path", str(tmp_path / file[:5])]
        )
        found += json.loads((tmp_path / file[:5] / "latency.resnet8.json").read_text())["timings"]
    assert found[0]["ratio"] == found[1]["ratio"] > 1.3
