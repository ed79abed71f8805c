"""The optimizer's benchmark: its table, its per-filter baseline, and the check that no step waits for the GPU."""

import json

import pytest
import torch

from AHSG_HT import AHSG_HT
from utils.base.errors import UserError
from utils.bench import optimizer as bench_optimizer
from utils.bench.optimizer import HT_RECIPE, OPTIMIZERS, count_synchronisations, one_step, parameters_with_gradients
from utils.bench.original_loop import PerFilterLoop

CPU = torch.device("cpu")


def test_table_has_a_row_and_a_ratio_for_every_optimizer(capsys, tmp_path):
    flags = ["--device", "cpu", "--arch", "resnet8", "--repeats", "2", "--channels_last", "--save_path", str(tmp_path)]
    bench_optimizer.main(flags)
    saved = json.loads((tmp_path / "optimizer_cpu_channels_last.json").read_text())
    assert [row["optimizer"] for row in saved["timings"]] == list(OPTIMIZERS)
    assert all(0 < row["fastest"] <= row["median ms"] <= row["slowest"] for row in saved["timings"])
    assert all(row["ratio"] == row["median ms"] / saved["timings"][0]["median ms"] for row in saved["timings"])
    text = (tmp_path / "optimizer_cpu_channels_last.md").read_text()
    assert text in capsys.readouterr().out and "| resnet8 | AHSG-HT | " in text
    assert saved["command"].startswith("python -m utils.bench.optimizer --device cpu") and saved["command"] in text


def test_a_step_that_waits_for_the_gpu_is_an_error(monkeypatch):
    rows = [dict(network="resnet8", optimizer=name, synchronisations=int(name == "AHSG-HT")) for name in OPTIMIZERS]
    monkeypatch.setattr(bench_optimizer, "bench", lambda *_: rows)
    with pytest.raises(UserError, match="waited for the GPU on resnet8"):
        bench_optimizer.main(["--device", "cpu", "--arch", "resnet8"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_synchronisations_are_counted():
    params = parameters_with_gradients("resnet20", torch.device("cuda"), True)
    assert count_synchronisations(OPTIMIZERS["AHSG-HT"](params)) == 0
    assert count_synchronisations(OPTIMIZERS["per-filter loop"](params)) > 0


@pytest.mark.parametrize("arch", ["resnet8", "vgg11", "vgg11_bn"], ids=["norm", "bias", "bias and norm"])
def test_per_filter_loop_takes_the_steps_of_AHSG_HT(arch):
    fast, slow = (parameters_with_gradients(arch, CPU, False) for _ in range(2))
    recipe = HT_RECIPE | {"lr": 0.1}
    optimizers = AHSG_HT(fast, **recipe), PerFilterLoop(slow, **recipe)
    torch.manual_seed(0)
    for _ in range(3):
        for p, q in zip(fast, slow, strict=True):
            q.grad = p.grad = torch.randn(p.shape)
        for optimizer in optimizers:
            one_step(optimizer)
    for p, q in zip(fast, slow, strict=True):
        assert torch.equal(p == 0, q == 0)
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
