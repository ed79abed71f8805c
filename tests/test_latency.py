"""What latency times and writes. Not how fast anything is: that depends on the machine."""

import json

import torch

import models
from AHSG_HT import hard_threshold
from utils import get_small_model
from utils.bench import latency
from utils.bench.common import take_turns

FLAGS = ["--batch_sizes", "1", "2", "--repeats", "2", "--device", "cpu"]


def time_file(path, folder):
    latency.main([str(path), *FLAGS, "--save_path", str(folder)])
    return json.loads((folder / "latency.resnet8.json").read_text())


def test_a_network_is_thresholded_and_timed(tmp_path, capsys):
    latency.main(["--arch", "resnet8", "--HTrate", "0.5", *FLAGS, "--save_path", str(tmp_path / "speed")])
    content = json.loads((tmp_path / "speed" / "latency.resnet8.json").read_text())
    assert [(row["device"], row["batch_size"]) for row in content["timings"]] == [("cpu", 1), ("cpu", 2)]
    for row in content["timings"]:
        assert row["multiply_add_ratio"] > 1.3 and row["speed_up"] == row["dense_ms"] / row["small_ms"] > 0
    text = (tmp_path / "speed" / "latency.resnet8.md").read_text()
    assert text in capsys.readouterr().out and content["command"] in text and "| cpu | 2 | " in text


def test_a_small_networks_file_is_timed_against_the_unpruned_network_of_its_name(tmp_path):
    net = models.build("resnet8")
    with torch.no_grad():
        hard_threshold(list(net.parameters()), 0.5)
    torch.save({"arch": "resnet8", "state_dict": net.state_dict()}, tmp_path / "checkpoint.pth")
    get_small_model.main([str(tmp_path / "checkpoint.pth"), "--save_path", str(tmp_path)])
    masked = time_file(tmp_path / "checkpoint.pth", tmp_path / "a")["timings"]
    small = time_file(tmp_path / "small.resnet8.pth.tar", tmp_path / "b")["timings"]
    assert masked[0]["multiply_add_ratio"] == small[0]["multiply_add_ratio"] > 1.3


def test_calls_take_turns():
    called = []
    calls = [lambda: called.append("a"), lambda: called.append("b")]
    seconds = take_turns(calls, torch.device("cpu"), repeats=4, warm_up=1)
    assert called == ["a", "b"] * 5 and [len(s) for s in seconds] == [4, 4]
