"""Scalars on the CPU in a region on a GPU: tensors without dims, which operators on a GPU may read but no graph can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from cudagraph_backend.compile.capturable import tensors_of
from cudagraph_backend.drivers.platforms import is_accelerator
from cudagraph_backend.torch_internals import fake_mode_of, is_operator, number_of

aten, prims = torch.ops.aten, torch.ops.prims

_CONSTANTS = (aten.full.default, aten.scalar_tensor.default)
_COPIES = (aten._to_copy.default, prims.device_put.default)


def move_scalars(graph: Graph, device: torch.device) -> frozenset[int]:
    """Let a graph have on ``device`` all scalars on the CPU that nothing but operators there read.

    Others, which are also returned, written, or read on the CPU, get a copy on ``device`` for the operators there.
    Returns the indices of inputs among those moved, which calls of the graph must move.
    """
    if is_accelerator(device):
        _write_out_constants(graph)
    moved = {node for node in graph.nodes if _is_scalar(node)} if is_accelerator(device) else set()
    while fixed := {node for node in moved if not _can_move(node, moved, device)}:
        moved -= fixed
    for node in moved:
        if node.target in _CONSTANTS:
            node.kwargs = {**node.kwargs, "device": device}
        with fake_mode_of(graph):
            node.meta["val"] = torch.empty((), dtype=node.meta["val"].dtype, device=device)
    if is_accelerator(device):
        _copy_scalars(graph, device)
    return frozenset(i for i, node in enumerate(graph.find_nodes(op="placeholder")) if node in moved)


def _write_out_constants(graph: Graph) -> None:
    """Let numbers that were tensors in the user's code (``torch.tensor(2.0)``) be made in the graph, on any device."""
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
            continue
        number = number_of(node) if _is_scalar(node) else None
        if number is not None:
            with graph.inserting_before(node):
                settings = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device}
                made = graph.call_function(aten.full.default, ((), number), settings)
            made.meta.update(node.meta)
            node.replace_all_uses_with(made)
            graph.erase_node(node)


def _copy_scalars(graph: Graph, device: torch.device) -> None:
    for node in [node for node in graph.nodes if _is_scalar(node)]:
        readers = [user for user in node.users if _is_on(user, device) and user.target not in _COPIES]
        if not readers:
            continue
        first = next(other for other in graph.nodes if other in readers)
        with graph.inserting_before(first), fake_mode_of(graph):
            if node.target in _CONSTANTS:
                copy = graph.call_function(node.target, node.args, {**node.kwargs, "device": device})
            else:
                copy = graph.call_function(prims.device_put.default, (node, device))  # which Inductor lowers as it is
            copy.meta.update({k: v for k, v in first.meta.items() if k in ("stack_trace", "nn_module_stack")})
            copy.meta["val"] = torch.empty((), dtype=node.meta["val"].dtype, device=device)
        for reader in readers:
            reader.replace_input_with(node, copy)


def moving(call: Callable[[list[Any]], Sequence[Any]], indices: frozenset[int], device: torch.device) -> Any:
    """Wrap ``call`` so that it gets the arguments at ``indices`` on ``device``."""

    def call_with_moved(args: list[Any]) -> Sequence[Any]:
        for index in indices:
            # Of pinned memory such a copy is read later, when the caller may have changed the scalar.
            args[index] = args[index].to(device, non_blocking=not args[index].is_pinned())
        return call(args)

    return call_with_moved


def _is_scalar(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.ndim == 0 and value.device.type == "cpu"


def _can_move(node: Node, moved: set[Node], device: torch.device) -> bool:
    is_made = node.op == "placeholder" or node.target in _CONSTANTS or (_is_pointwise(node) and _reads(node) <= moved)
    is_read = len(node.users) > 0
    return is_made and is_read and all(user in moved or _is_on(user, device) for user in node.users)


def _is_pointwise(node: Node) -> bool:
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return is_pointwise or node.target is prims.convert_element_type.default


def _reads(node: Node) -> set[Node]:
    return {read for read in node.all_input_nodes for _ in tensors_of(read)}


def _is_on(node: Node, device: torch.device) -> bool:
    return is_operator(node.target) and {t.device for t in tensors_of(node)} == {device}
