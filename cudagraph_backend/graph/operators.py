"""What a node of a graph runs: its own operator, and what a higher-order one runs in its turn."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from cudagraph_backend.torch_internals import (
    MAKE_TOKEN,
    flat_arguments,
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
_SIZES = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)
_STRIDES = (torch.ops.aten.sym_stride.int, torch.ops.aten.sym_storage_offset.default)
_PROCESS_GROUPS = ("group_name", "process_group")


def targets_of(node: Node) -> Iterator[Any]:
    """Yield the operators that a node runs: its own, those that it wraps, and all in the graphs that it is given."""
    if node.op == "call_function":
        yield node.target
        yield from wrapped(node)
        for inner in nodes_inside(node):
            yield from targets_of(inner)


def wrapped(node: Node) -> Iterator[Any]:
    """Yield the operators that a higher-order one is given by name, as ``auto_functionalized`` is."""
    if is_higher_order(node.target):
        yield from (leaf for leaf in flat_arguments(node) if is_operator(leaf) or is_higher_order(leaf))


def nodes_inside(node: Node) -> Iterator[Node]:
    """Yield the nodes of the graphs that a higher-order operator is given; not of those that these give in turn."""
    if is_higher_order(node.target):
        for module in subgraphs_of(node):
            yield from module.graph.nodes


def nodes_in(graph: Graph) -> Iterator[Node]:
    """Yield the nodes of a graph, and of those inside it, at all levels."""
    for node in graph.nodes:
        yield node
        for module in subgraphs_of(node) if is_higher_order(node.target) else ():
            yield from nodes_in(module.graph)


def targets_in(graph: Graph) -> Iterator[Any]:
    """Yield the operators that a graph runs, at all levels."""
    for node in graph.nodes:
        yield from targets_of(node)


def measures_size(node: Node) -> bool:
    """Return whether a node reads the size of a tensor alone."""
    return node.target in _SIZES


def measures(node: Node) -> bool:
    """Return whether a node reads the size or the strides of a tensor, and none of its memory."""
    return node.target in _SIZES + _STRIDES


def writes_in_place(node: Node) -> bool:
    """Return whether a node changes what it is given. A functional wrapper changes a copy."""
    if is_operator(node.target):
        return operator_schema(node.target).is_mutable
    if is_higher_order(node.target):
        is_mutation = node.target.name().endswith("_mutation")
        return is_mutation or any(map(writes_in_place, nodes_inside(node)))
    return False


# ---- effects


def is_token(node: Node) -> bool:
    """Return whether a value is no tensor, but only orders operators with effects (``with_effects``)."""
    if node.target is operator.getitem:
        source, index = node.args
        return index == 0 and isinstance(source, Node) and has_token(source)
    return node.target is MAKE_TOKEN


def has_token(node: Node) -> bool:
    """Return whether a node takes a token as its first argument, and gives one as its first result."""
    return is_higher_order(node.target) and node.target.name() == "with_effects"


def read_by(node: Node) -> list[Node]:
    """Return what a node reads; tokens are not read, as each part of a graph has its own."""
    return [read for read in node.all_input_nodes if not is_token(read)]


def is_named(target: Any, names: Collection[str]) -> bool:
    """Return whether ``names`` has an operator, with its overload (``aten::mm.default``) or without (``aten::mm``)."""
    if is_higher_order(target):
        return f"higher_order::{target.name()}" in names
    if not is_operator(target):
        return False
    packet = operator_schema(target).name
    return packet in names or f"{packet}.{operator_schema(target).overload_name or 'default'}" in names


def communicates(target: Any) -> bool:
    """Return whether an operator exchanges data with other processes, as far as its name and its arguments tell."""
    if not is_operator(target):
        return False
    arguments = operator_schema(target).arguments
    takes_group = any(a.name in _PROCESS_GROUPS or "ProcessGroup" in str(a.type) for a in arguments)
    return takes_group or operator_name(target).startswith(_COMMUNICATION)


def waits(target: Any) -> bool:
    """Return whether an operator waits for a collective that another one began."""
    return is_operator(target) and operator_schema(target).name.endswith("c10d_functional::wait_tensor")
