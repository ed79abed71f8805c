"""The graph of a network's operations, by torch.fx: shapes of values, and what each operation changes in place."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.resnet_cifar import OptionA
from utils.base.errors import UserError

PREFIX = "net"


class _Called(nn.Module):
    """Calls a network on one tensor; its other arguments (return_features) keep their defaults in the trace."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor):
        return self.net(x)


class _Proxy(fx.Proxy):
    """torch.fx records x += y as x + y, which would leave views of x as they were."""

    def _in_place(function):
        return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})

    __iadd__, __isub__ = _in_place(operator.iadd), _in_place(operator.isub)
    __imul__, __itruediv__ = _in_place(operator.imul), _in_place(operator.itruediv)


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, OptionA) or super().is_leaf_module(module, qualified_name)

    def path_of_module(self, module: nn.Module) -> str:
        try:
            return super().path_of_module(module)
        except NameError:
            # A slice of a Sequential is a new Sequential without a name; its layers have theirs.
            if isinstance(module, nn.Sequential):
                return PREFIX
            raise

    def call_module(self, module: nn.Module, forward, args: tuple, kwargs: dict) -> Any:
        stack = dict(self.module_stack)
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:  # whatever a module's Python does with a value that does not exist yet
            self.module_stack.clear()
            self.module_stack.update(stack)
            # It becomes one opaque operation; what was traced of it stays in the graph, which is harmless.
            return self.create_proxy("call_module", self.path_of_module(module), args, kwargs)


class _Recorder(fx.Interpreter):
    """Runs a graph and fills in node.meta["shape"] and node.meta["changed"], see `trace`."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.versions: dict[fx.Node, int] = {}
        self.extra_traceback = False  # errors keep their message

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        node.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
        # Tensors that share storage share this counter, too.
        now = {n: v._version for n, v in {**self.env, node: value}.items() if isinstance(v, Tensor)}
        node.meta["changed"] = [n for n in now if now[n] != self.versions.get(n, now[n])]
        self.versions = now
        return value


@torch.no_grad()
def trace(net: nn.Module, example: Tensor) -> fx.GraphModule:
    """The graph of net(example) in eval mode; the network is not changed.

    Args:
        net: modules and functions of it that torch.fx cannot trace become single operations.
        example: a mini-batch that the network takes, on its device.

    Returns:
        A GraphModule over the network's own modules, whose names in it start with "net.". node.meta["shape"] is the
        shape of a tensor value, None for other values; node.meta["changed"] lists the earlier nodes whose values this
        one changes in place, views and detached tensors included.

    Raises:
        UserError: the network does not run on the example.
    """
    modes = {module: module.training for module in net.modules()}
    root = _Called(net.eval())
    try:
        graph = fx.GraphModule(root, _Tracer().trace(root))
        _Recorder(graph).run(example)
    except Exception as error:
        raise UserError(f"the network does not run on an input of shape {tuple(example.shape)}: {error}") from None
    finally:
        for module, training in modes.items():
            module.training = training
    return graph


def module_name(node: fx.Node) -> str:
    """The name in the network of the module that a node calls; "" for the network itself."""
    return node.target.removeprefix(PREFIX).removeprefix(".")


def layer_name(node: fx.Node) -> str:
    """A node's name for messages: its module's, or the operation and the module in which it is written."""
    if node.op == "call_module":
        return module_name(node) or "the network"
    operation = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    inside = list(node.meta.get("nn_module_stack", {}).values())
    owner = inside[-1][0].removeprefix(PREFIX).removeprefix(".") if inside else ""
    return f"{operation} in {owner}" if owner else str(operation)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a value: a tensor, or lists, tuples and dicts of them."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for item in inner for tensor in tensors(item)]
