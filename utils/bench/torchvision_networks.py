"""Does every torchvision network have an equal small network? `python -m utils.bench.torchvision_networks [NAMES]`.

Each network, with random weights and BatchNorm statistics, is thresholded once and cut.
"""

import gc
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import models
from AHSG_HT import hard_threshold
from models.load import last_layer
from utils.base.errors import UserError, run_main
from utils.base.torchvision_import import import_torchvision
from utils.bench.common import benchmark_parser, parse_benchmark, publish
from utils.small.counts import multiply_adds
from utils.small.cut import make_small
from utils.small.filters import filter_additives

HTRATE = 0.7
COLUMNS = ("network", "pixels", "result", "multiply-adds (M)", "saved (%)", "relative difference", "kept whole")
SIZES = (64, 96, 224)  # pixels; the smallest that a network takes is used
Norm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def make_network(name: str) -> tuple[nn.Module, Tensor]:
    """(a network with random BatchNorm parameters and statistics, and logits of at most 1; two images)."""
    torch.manual_seed(0)
    net = models.build_torchvision(name).eval()
    head = net.get_submodule(last_layer(net))
    head.reset_parameters()  # some heads are zero
    for norm in (module for module in net.modules() if isinstance(module, Norm)):
        for value, mean, std in ((norm.weight, 1, 0.1), (norm.bias, 0, 0.3), (norm.running_mean, 0, 0.3)):
            value.normal_(mean, std)
        norm.running_var.uniform_(0.5, 1.5)
    for size in SIZES:
        images = torch.randn(2, 3, size, size)
        try:
            largest = net(images).abs().max()
            break
        except (RuntimeError, AssertionError, ValueError):
            if size == SIZES[-1]:
                raise
    for parameter in head.parameters():
        parameter /= largest
    return net, images


@torch.no_grad()
def threshold(net: nn.Module, images: Tensor, random_means: bool) -> None:
    """AHSG_HT's H on every convolution."""
    additives = filter_additives(net, images)
    hard_threshold([*net.parameters()], HTRATE, additives=additives)
    own = {bias for biases in additives.values() for bias in biases}
    for norm in [] if random_means else net.modules():
        if isinstance(norm, Norm) and norm.bias in own:
            # After training the running mean of a removed filter is 0: it decays by a tenth in every step.
            norm.running_mean[norm.bias == 0] = 0


@torch.no_grad()
def make_row(name: str, random_means: bool) -> dict:
    """The result for one network, which may be a refusal or an error."""
    row = dict.fromkeys(COLUMNS, "-") | {"network": name, "result": "equal", "saved (%)": 0.0}
    try:
        net, images = make_network(name)
        row["pixels"] = images.shape[-1]
        threshold(net, images, random_means)
        small, report = make_small(net, images, images)
    except Exception as error:  # the table has it, and the next network is tried
        kind = "refused" if isinstance(error, (UserError, ValueError)) else f"failed, {type(error).__name__}"
        return row | {"result": f"{kind}: {' '.join(str(error).split())}"}
    before, after = (multiply_adds(n, images[:1]) for n in (net, small))
    expected = net(images)
    difference = float((expected - small(images)).abs().max() / expected.abs().max())
    row |= {"multiply-adds (M)": before / 1e6, "saved (%)": 100 * (1 - after / before)}
    whole = [f"{layer}: {reason}" for layer, reason in report.kept_whole.items()]
    more = f" (and {len(whole) - 1} more)" if len(whole) > 1 else ""
    return row | {"relative difference": f"{difference:.1e}", "kept whole": whole[0] + more if whole else "-"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, repeats=1)
    parser.add_argument("names", nargs="*", help="networks (all classification networks of torchvision.models)")
    parser.add_argument("--random_means", action="store_true", help="removed filters have a running mean other than 0")
    args = parse_benchmark(parser, "torchvision_networks", argv)
    torchvision, rows = import_torchvision(), []
    for name in args.names or torchvision.models.list_models(torchvision.models):
        rows.append(make_row(name, args.random_means))
        print(", ".join(map(str, rows[-1].values())), flush=True)
        gc.collect()  # traced graphs are cyclic and hold the networks
    equal, saved = sum(row["result"] == "equal" for row in rows), sum(row["saved (%)"] >= 15 for row in rows)
    note = f"{equal} of {len(rows)} have an equal small network, {saved} of them one that saves at least 15 %."
    note += f" Running means of removed filters: {'random' if args.random_means else '0, as after training'}."
    publish(args, "networks_random_means" if args.random_means else "networks", note, rows)


if __name__ == "__main__":
    run_main(main)
