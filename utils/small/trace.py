"""The graph of operations of a network, by torch.fx, with the shape of every value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.resnet_cifar import OptionA

ROOT = "net"


class _Called(nn.Module):
    """Calls a network on one tensor, so that its other arguments (return_features) keep their defaults while it is traced."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor):
        return self.net(x)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, OptionA) or super().is_leaf_module(module, qualified_name)

    def path_of_module(self, module: nn.Module) -> str:
        try:
            return super().path_of_module(module)
        except NameError:
            # A slice of a Sequential is a new Sequential that no name leads to; its layers have theirs.
            if isinstance(module, nn.Sequential):
                return ROOT
            raise

    def call_module(self, module: nn.Module, forward, args: tuple, kwargs: dict) -> Any:
        stack = dict(self.module_stack)
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:  # whatever a module's Python does with a value that is not there yet
            self.module_stack.clear()
            self.module_stack.update(stack)
            # It becomes one opaque operation; what was traced of it stays in the graph and only makes the analysis more careful.
            return self.create_proxy("call_module", self.path_of_module(module), args, kwargs)


class _Recorder(fx.Interpreter):
    """Runs a graph and yields every node with its value, in order; values are dropped when no later node reads them."""

    def records(self, x: Tensor) -> Iterator[tuple[fx.Node, Any]]:
        self.env = {}
        self.args_iter = iter([x])
        for node in self.module.graph.nodes:
            self.env[node] = self.run_node(node)
            yield node, self.env[node]
            for used in self.user_to_last_uses.get(node, []):
                del self.env[used]


def trace(net: nn.Module, example: Tensor) -> fx.GraphModule:
    """The graph of net(example).

    Args:
        net: in eval mode. Modules and functions that torch.fx cannot see through become single operations.
        example: a mini-batch that the network takes, on its device.

    Returns:
        A GraphModule over the network's own modules; their names in it start with "net.", and node.meta["shape"] is the shape of a tensor value, None for
        what is no single tensor.
    """
    root = _Called(net)
    graph = fx.GraphModule(root, _Tracer().trace(root))
    for node, value in run(graph, example):
        node.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
    return graph


@torch.no_grad()
def run(graph: fx.GraphModule, x: Tensor) -> Iterator[tuple[fx.Node, Any]]:
    """Yields (node, value) of every operation for the input x, in the order of execution."""
    yield from _Recorder(graph).records(x)


def layer_name(node: fx.Node) -> str:
    """A node in the user's words: the module's name in the network, or the operation and the module that it is written in."""
    if node.op == "call_module":
        return node.target.removeprefix(ROOT).removeprefix(".") or "the network"
    operation = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    inside = list(node.meta.get("nn_module_stack", {}).values())
    owner = inside[-1][0].removeprefix(ROOT).removeprefix(".") if inside else ""
    return f"{operation} in {owner}" if owner else str(operation)
