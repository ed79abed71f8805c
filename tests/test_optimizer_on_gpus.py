"""That no step of AHSG_HT makes the host wait for a GPU, on machines with and without one.

Without: on torch's meta device, whose tensors hold no values, it is seen that no operation asks for a value, touches a
tensor of the host or makes one of a host list: each makes the host wait for a GPU.
"""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from AHSG_HT import AHSG_HT
from utils.bench.optimizer import one_step, parameters_with_gradients

META = torch.device("meta")
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
VARIANTS = {
    "recipe": dict(momentum=0.9, nesterov=True, weight_decay=5e-4, v=0.1),
    "released, l1": dict(momentum=0.9, v=0.1, heavy_ball="released", norm=1),
    "element": dict(v=0.1, unit="element"),
    "no-regrow": dict(v=0.1, regrow=False),
}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class DeviceOnly(TorchDispatchMode):
    """Raises on an operation that takes or gives a tensor of the host."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.device.type == "cpu" for t in tree_leaves((args, kwargs, result))):
            raise RuntimeError(f"{operation} touches a tensor of the host")
        return result


class NoHostLists(TorchFunctionMode):
    """Raises where a tensor is made of a Python list, which no dispatch shows."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        indexes = function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        parts = args[1] if indexes and isinstance(args[1], tuple) else args[1:2]
        if function in (torch.tensor, torch.as_tensor) or (indexes and any(isinstance(part, list) for part in parts)):
            raise RuntimeError(f"{function} makes a tensor of a list")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched():
    """Raises on whatever would make the host wait for a GPU."""
    with NoHostLists(), DeviceOnly():
        yield


@contextlib.contextmanager
def no_synchronisation():
    """Raises where the host waits for a GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@LAYOUTS
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_no_step_reads_a_value_or_touches_the_host(options, device, channels_last):
    params = parameters_with_gradients("vgg11_bn", torch.device(device), channels_last)
    optimizer = AHSG_HT(params, lr=0.1, HTrate=0.7, **options)
    with watched() if device == "meta" else no_synchronisation():
        for _ in range(3):  # state is made in the first step, the heavy ball moves from the second on
            one_step(optimizer)


WAITS = {
    "item": lambda t: t.sum().item(),
    "mask": lambda t: t[t > 0],
    "cpu": lambda t: t.cpu(),
    "list": lambda t: t.add_(torch.tensor([1.0, 2.0], device=t.device)),
    "index on host": lambda t: t[torch.tensor([0, 1])],
    "index list": lambda t: t[[1, 0]],
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_the_watch_sees_what_would_wait(wait):
    with pytest.raises((RuntimeError, NotImplementedError)), watched():
        wait(torch.ones(2, device=META))
