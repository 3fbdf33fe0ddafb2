"""Nodes of FX graphs: their values, the graphs inside them, what their attributes hold."""

from __future__ import annotations

from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from cudagraph_backend.torch_internals.schemas import is_operator


def fake_mode_of(graph: torch.fx.Graph) -> Any:
    """Return the mode that the values of a graph were traced in; new values must be made in the same one."""
    return detect_fake_mode(
        [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    )


def dispatch_to_proxies() -> Any:
    """Return a context in which operators that are called on proxies add nodes.

    A tensor subclass turns that off while it is differentiated, which is when backwards are compiled.
    """
    return torch._C._EnableTorchFunction()


def trace_missing_values(graph: torch.fx.Graph) -> None:
    """Give operators that have no traced value one: Inductor's passes put some in without (for tensors on ``meta``)."""
    mode = fake_mode_of(graph)
    for node in graph.nodes:
        if is_operator(node.target) and "val" not in node.meta and mode is not None:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda read: read.meta["val"])
            with mode:
                node.meta["val"] = node.target(*args, **kwargs)


def flat_arguments(node: torch.fx.Node) -> list[Any]:
    """Return what a node is called with, without the lists, tuples and dicts around it."""
    return tree_leaves([node.args, node.kwargs])


def subgraphs_of(node: torch.fx.Node) -> list[torch.fx.GraphModule]:
    """Return the graphs that a higher-order operator is given, each once."""
    found = [submodule_of(read) for read in node.all_input_nodes if read.op == "get_attr"]
    return [module for module in found if module is not None]


def submodule_of(node: torch.fx.Node) -> torch.fx.GraphModule | None:
    """Return the graph that a node gives to a higher-order operator; ``None`` if it gives anything else."""
    found = attribute_of(node)
    return found if isinstance(found, torch.fx.GraphModule) else None


def attribute_of(node: torch.fx.Node) -> Any:
    """Return what a ``get_attr`` node reads; ``None`` if its graph has no module, or that not this attribute."""
    found: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    return found


def number_of(node: torch.fx.Node) -> Any:
    """Return the number in a tensor without dims that a ``get_attr`` node reads; ``None`` if it isn't known."""
    found = attribute_of(node)
    if not isinstance(found, torch.Tensor) or isinstance(found, FakeTensor):
        return None
    with unset_fake_temporarily():
        return found.item()
