"""Where a run computes and with which software, saved with every result; seeds and float arithmetic of a process."""

import ctypes
import os
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from utils.base.errors import UserError
from utils.base.torchvision_import import import_torchvision


def choose_device(ngpu: int | None) -> torch.device:
    """The CPU for ngpu 0 or where there is no GPU, else the first GPU.

    Raises:
        UserError: more than one GPU per process.
    """
    if ngpu is not None and ngpu > 1:
        raise UserError(
            f"--ngpu {ngpu}: one process trains on one GPU; start {ngpu} with torchrun --nproc_per_node {ngpu} "
            "SCRIPT ... --ngpu 1"
        )
    if ngpu == 1 and not torch.cuda.is_available() and os.environ.get("RANK", "0") == "0":
        # The release's command lines all have --ngpu 1; on a machine without a GPU the CPU does the same work.
        print("--ngpu 1, but there is no CUDA GPU here: using the CPU")
    return torch.device("cuda" if ngpu != 0 and torch.cuda.is_available() else "cpu")


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def flush_denormals() -> None:
    """Makes CPU arithmetic round numbers below 1e-38 to zero. Call it before the first parallel computation: threads
    inherit it.

    Momentum and BatchNorm statistics of a removed filter shrink by a factor per step and end as denormal numbers,
    which CPUs compute with many times slower: a ResNet-20 was tested 13 times slower after four epochs of pruning.
    """
    torch.set_flush_denormal(True)


def reuse_freed_memory() -> None:
    """Makes the C library keep freed memory for the next tensor instead of giving it back to the system.

    By default glibc returns blocks of activations at every step, and the next step faults each of their pages in
    again: 12,000 of 4 KiB per step of ResNet-20 at batch 128, a tenth to a quarter of the time. Nothing happens with
    other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, 2**31 - 1)


def seed_everything(seed: int) -> None:
    """Seeds torch (every device), numpy and Python."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def describe_machine(device: torch.device) -> dict:
    """Hardware of a run, for results.json."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return dict(device=device.type, gpu=gpu, cpu_cores=cores, threads=threads, machine=platform.machine())


def describe_versions() -> dict:
    """Software of a run, for results.json."""
    packages = {"torch": str(torch.__version__), "torchvision": str(import_torchvision().__version__)}
    return {"python": platform.python_version(), **packages, "numpy": np.__version__, "cuda": torch.version.cuda}


@contextmanager
def true_float32() -> Iterator[None]:
    """Within it convolutions and matrix products of a GPU compute in float32, not in TF32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
