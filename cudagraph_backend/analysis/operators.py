"""What a node of a graph runs: its own operator, and what a higher-order one runs in its turn."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch.fx import Graph, Node

from cudagraph_backend.analysis.padding.call import leaves
from cudagraph_backend.torch_internals import (
    is_higher_order,
    is_operator,
    operator_name,
    operator_schema,
    subgraphs_of,
)

_COMMUNICATION = (
    "_c10d_functional::",
    "_c10d_functional_autograd::",
    "c10d::",
    "c10d_functional::",
    "symm_mem::",
    "_dtensor::",
)
_PROCESS_GROUPS = ("group_name", "process_group")


def targets_of(node: Node) -> Iterator[Any]:
    """The operators that a node runs: its own, those that it wraps, and all in the graphs that it is given."""
    if node.op != "call_function":
        return
    yield node.target
    if is_higher_order(node.target):
        yield from (leaf for leaf in leaves([node.args, node.kwargs]) if is_operator(leaf) or is_higher_order(leaf))
        for inner in nodes_inside(node):
            yield from targets_of(inner)


def nodes_inside(node: Node) -> Iterator[Node]:
    """The nodes of the graphs that a higher-order operator is given; not of those that these give in turn."""
    for module in subgraphs_of(node):
        yield from module.graph.nodes


def targets_in(graph: Graph) -> Iterator[Any]:
    """The operators that a graph runs, at all levels."""
    for node in graph.nodes:
        yield from targets_of(node)


def is_named(target: Any, names: Collection[str]) -> bool:
    """Whether an operator is among ``names``, with its overload (``aten::mm.default``) or without (``aten::mm``)."""
    if is_higher_order(target):
        return f"higher_order::{target.name()}" in names
    if not is_operator(target):
        return False
    packet = operator_schema(target).name
    return packet in names or f"{packet}.{operator_schema(target).overload_name or 'default'}" in names


def communicates(target: Any) -> bool:
    """Whether an operator exchanges data with other processes, as far as its name and its arguments tell."""
    if not is_operator(target):
        return False
    arguments = operator_schema(target).arguments
    takes_group = any(a.name in _PROCESS_GROUPS or "ProcessGroup" in str(a.type) for a in arguments)
    return takes_group or operator_name(target).startswith(_COMMUNICATION)


def waits(target: Any) -> bool:
    """Whether an operator waits for a collective that another one began."""
    return is_operator(target) and operator_schema(target).name.endswith("c10d_functional::wait_tensor")
