"""Number format and compilation of a training run, chosen by device and printed.

`--amp` computes convolutions and matrix products in bfloat16 (torch.autocast); weights, momentum, filter norms,
BatchNorm statistics and losses stay float32, and no gradient scaling is needed. `--compile` fuses what lies between
the convolutions.
"""

import argparse
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.base.errors import UserError
from utils.train.distillation import Distillation


@dataclass(frozen=True)
class Acceleration:
    """How a run computes."""

    amp: bool = False
    compile: bool = False
    deterministic: bool = False
    tf32: bool = False

    @property
    def arithmetic(self) -> str:
        """bfloat16, TF32 or float32."""
        return "bfloat16" if self.amp else "TF32" if self.tf32 else "float32"

    def __str__(self) -> str:
        """One line for the log."""
        return (
            f"arithmetic: {self.arithmetic}, {'compiled' if self.compile else 'eager'}, channels_last"
            f"{', deterministic' if self.deterministic else ''}"
        )


def choose_acceleration(args: argparse.Namespace, device: torch.device) -> Acceleration:
    """What --amp, --tf32, --compile and --deterministic mean on a device.

    --amp is the default on GPUs that compute in bfloat16. CPUs default to float32: with AVX-512 instructions alone a
    training step of ResNet-20 took 1.4 times as long in bfloat16.

    Raises:
        UserError: --amp on a GPU without bfloat16, or --compile where there is no compiler.
    """
    on_gpu = device.type == "cuda"
    # is_bf16_supported() also counts emulation, which is slow.
    has_bf16 = on_gpu and (torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8)
    if args.amp and on_gpu and not has_bf16:
        raise UserError("--amp needs a GPU of compute capability 8.0 or more, which computes in bfloat16; leave it out")
    if args.compile:
        check_compiler(device)
    # cuDNN's convolutions compute in TF32 by default, 10 bits of mantissa instead of 23.
    tf32 = args.tf32 and on_gpu
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    return Acceleration(has_bf16 if args.amp is None else args.amp, args.compile, args.deterministic, tf32)


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile would find nothing to compile with."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    missing = None if any(shutil.which(name.split()[0]) for name in compilers) else "a C++ compiler"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        missing = "the package triton on a GPU"
    if missing:
        raise UserError(f"--compile needs {missing}; install it or leave --compile out")


def make_deterministic() -> None:
    """Only algorithms that give the same bits in every run; torch names an operation that has none in a warning.

    On a CPU every run is so for one number of threads. Call it before the first computation on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def fewest_compiled(largest: int) -> int:
    """Size from which mini-batches go through the compiled network, so that one compilation serves them all.

    torch compiles again on either side of 1 image (a constant to it), of 16 (its choice of a convolution kernel
    depends on it) and, on a CPU, where a sum over a channel passes 4096 numbers, which is at 64 images of 8x8 pixels.
    What is smaller is an epoch's first mini-batch, or its last one, and runs uncompiled.
    """
    return 65 if largest > 64 else 16


class CompiledForward:
    """A network's forward pass through torch.compile, compiled once for mini-batches of every size from `fewest` on.

    The network itself is left as it is, so that checkpoints, tracing and copies of it do not notice.
    """

    def __init__(self, net: nn.Module, fewest: int):
        self.net, self.fewest, self.compiled = net, fewest, torch.compile(net)

    def __call__(self, images: Tensor, **options):
        if len(images) < self.fewest:
            return self.net(images, **options)
        # "maybe": where a network does depend on the size, it is compiled again rather than refused.
        torch._dynamo.maybe_mark_dynamic(images, 0)
        return self.compiled(images, **options)


def accelerate(net: nn.Module, objective: Callable, device: torch.device, how: Acceleration, largest: int) -> Callable:
    """The objective (utils.train.engine) computed in bfloat16, compiled, or both.

    Args:
        net: the network that the objective is called with.
        objective: a Distillation has its teacher compiled, too.
        largest: images of the largest mini-batch.
    """
    if not (how.amp or how.compile):
        return objective
    forward = net
    if how.compile:
        fewest = fewest_compiled(largest)
        forward = CompiledForward(getattr(objective, "student", net), fewest)
        if isinstance(objective, Distillation):
            objective.teacher_forward = CompiledForward(objective.teacher, fewest)

    def fast(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=how.amp):
            return objective(forward, images, labels)

    fast.adapters = getattr(objective, "adapters", None)
    return fast
