"""Times a step of the optimizer beside torch's SGD and a per-filter loop as in the authors' release.

    python -m utils.bench.optimizer                                   # every network, on the GPU where there is one
    python -m utils.bench.optimizer --device cpu --arch resnet56 --channels_last --save_path results/bench_optimizer

Every optimizer has its own copy of the parameters, with fixed gradients; they take turns step by step.
Ratios are those of medians. The recipe is the release's: momentum 0.9 (Nesterov), weight decay 5e-4, v 0.1, HTrate 0.7.
On CUDA a time is taken between two synchronisations, and a step of AHSG-HT that itself waits for the GPU is an error.
"""

import statistics
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import models
from AHSG_HT import AHSG_HT
from utils.base.errors import UserError, run_main
from utils.bench.common import benchmark_parser, parse_benchmark, publish, take_turns
from utils.bench.original_loop import PerFilterLoop

NETS = ("resnet20", "resnet56", "resnet110", "vgg16_bn", "resnet50")
SGD_RECIPE = dict(lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
HT_RECIPE = SGD_RECIPE | dict(v=0.1, HTrate=0.7)

# Name in the table: what makes the optimizer. The first one is what the ratios refer to.
OPTIMIZERS: dict[str, Callable[[list[Tensor]], object]] = {
    "SGD foreach": lambda params: torch.optim.SGD(params, foreach=True, **SGD_RECIPE),
    "SGD fused": lambda params: torch.optim.SGD(params, fused=True, **SGD_RECIPE),
    "AHSG-HT": lambda params: AHSG_HT(params, **HT_RECIPE),
    "per-filter loop": lambda params: PerFilterLoop(params, **HT_RECIPE),
}


def build_net(arch: str) -> nn.Module:
    """A network of the registry for 10 classes, or one of torchvision's for 1,000."""
    return models.build(arch) if arch in models.REGISTRY else models.build_torchvision(arch, 1000)


def parameters_with_gradients(arch: str, device: torch.device, channels_last: bool) -> list[Tensor]:
    """The parameters of a network from a fixed seed, with random gradients of their own layout."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    params = list(build_net(arch).to(device, memory_format=layout).parameters())
    for p in params:
        p.grad = torch.empty_like(p).normal_(std=1e-4)
    return params


def one_step(optimizer: object) -> None:
    """A step, AHSG_HT's in the released calling order."""
    if isinstance(optimizer, AHSG_HT):
        optimizer.update_HSG(1)
        optimizer.step(None, 1.0, 0, 1)
    else:
        optimizer.step()


def count_synchronisations(optimizer: object) -> int:
    """Times that one step makes the host wait for the GPU, as torch's sync debug mode reports them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            one_step(optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # torch also warns once that the debug mode is a prototype, in words that speak of synchronizing operations.
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


def bench(arch: str, device: torch.device, repeats: int, channels_last: bool) -> list[dict]:
    """A row per optimizer: its step's times in ms on one network and, on CUDA, how often a step waits for the GPU."""
    made = {name: make(parameters_with_gradients(arch, device, channels_last)) for name, make in OPTIMIZERS.items()}
    seconds = take_turns([lambda o=optimizer: one_step(o) for optimizer in made.values()], device, repeats)
    base = statistics.median(seconds[0])
    rows = []
    for (name, optimizer), own in zip(made.items(), seconds, strict=True):
        median = statistics.median(own)
        times = {"median ms": 1000 * median, "fastest": 1000 * min(own), "slowest": 1000 * max(own)}
        waits = count_synchronisations(optimizer) if device.type == "cuda" else "-"
        rows.append({"network": arch, "optimizer": name, **times, "ratio": median / base, "synchronisations": waits})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, repeats=50)
    parser.add_argument("--arch", nargs="+", default=NETS, help=f"of the registry or torchvision's ({' '.join(NETS)})")
    parser.add_argument("--channels_last", action="store_true", help="parameters as the scripts train them")
    args = parse_benchmark(parser, "optimizer", argv)
    rows = [row for arch in args.arch for row in bench(arch, args.device, args.repeats, args.channels_last)]
    layout = "channels_last" if args.channels_last else "contiguous"
    note = f"Steps in turn, {layout} parameters; ratio: of medians, to {rows[0]['optimizer']}."
    publish(args, f"optimizer_{args.device.type}_{layout}", note, rows)
    for row in rows:
        if row["optimizer"] == "AHSG-HT" and row["synchronisations"] not in ("-", 0):
            raise UserError(f"a step of AHSG-HT waited for the GPU on {row['network']}; see the last column")


if __name__ == "__main__":
    run_main(main)
