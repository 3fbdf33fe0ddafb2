"""Inputs of a region: sizes, static inputs, staged inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from cudagraph_backend.errors import Refusal
from cudagraph_backend.fill import Fills, InputName, fill_for
from cudagraph_backend.graph.operators import measures_size
from cudagraph_backend.graph.source import first_use
from cudagraph_backend.region import Role, SizeInput, TensorInput
from cudagraph_backend.torch_internals import call_input, expr, is_generator, is_jagged_size, kind_of, never_changes


def tensor_inputs(
    graph: Graph,
    example_inputs: Sequence[Any],
    device: torch.device,
    static: Collection[int],
    names: Sequence[InputName],
    fills: Fills,
) -> tuple[TensorInput, ...]:
    """Return one record per tensor argument.

    A static input with a dynamic dim is staged: each size has its own address. A tensor on the device ``meta`` has
    none. One on another ``device`` than the region's is none of its inputs if it is only handed back or asked for its
    size. ``names`` are those of the inputs of the user's call, in Dynamo's order.
    """
    inputs = []
    for index, (node, value) in enumerate(zip(graph.find_nodes(op="placeholder"), example_inputs, strict=True)):
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            continue
        if value.device not in (device, _META) and not is_read(node):
            continue
        size, stride = tuple(map(expr, value.shape)), tuple(map(expr, value.stride()))
        is_dynamic = any(e.free_symbols for e in (*size, *stride))
        keeps_address = value.device.type == "meta" or (index in static and not is_dynamic)
        role: Role = "static" if keeps_address else "staged"
        position = call_input(node)
        given = names[position] if position is not None and position < len(names) else None
        fill = fill_for(fills, given, value.dtype, padded=is_dynamic)
        inputs.append(TensorInput(index, str(node.target), role, False, value.dtype, size, stride, given, fill))
    return tuple(inputs)


def plain_inputs(example_inputs: Sequence[Any]) -> tuple[TensorInput, ...]:
    """Return one record per strided tensor, of its shape and dtype alone."""
    return tuple(
        TensorInput(index, "", "staged", False, v.dtype, tuple(map(expr, v.shape)), tuple(map(expr, v.stride())))
        for index, v in enumerate(example_inputs)
        if isinstance(v, torch.Tensor) and v.layout == torch.strided
    )


def size_inputs(example_inputs: Sequence[Any]) -> tuple[SizeInput, ...]:
    """Return where a call's sizes are read: symbolic int arguments, then dims of symbols that none of these gives."""
    sizes = [
        SizeInput(index, None, expr(value))
        for index, value in enumerate(example_inputs)
        if isinstance(value, torch.SymInt) and not is_jagged_size(value)
    ]
    known = {s.size for s in sizes}
    for index, value in enumerate(example_inputs):
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(expr(size), sympy.Symbol) and expr(size) not in known:
                known.add(expr(size))
                sizes.append(SizeInput(index, dim, expr(size)))
    return tuple(sizes)


def input_refusals(graph: Graph, example_inputs: Sequence[Any]) -> dict[Node, Refusal]:
    """Return those inputs that operators read and no graph can, with the reason."""
    refused = {}
    for node, value in _given(graph, example_inputs):
        refusal = _refused(node, value)
        if refusal is not None and is_read(node):
            refused[node] = refusal
    return refused


def object_inputs(graph: Graph, example_inputs: Sequence[Any]) -> tuple[int, ...]:
    """Return the indices of arguments that operators read and that are neither tensors nor numbers."""
    given = enumerate(_given(graph, example_inputs))
    return tuple(i for i, (node, value) in given if not isinstance(value, _PLAIN) and is_read(node))


_META = torch.device("meta")
_PLAIN = (torch.Tensor, torch.SymInt, int)


def _given(graph: Graph, example_inputs: Sequence[Any]) -> Iterator[tuple[Node, Any]]:
    return zip(graph.find_nodes(op="placeholder"), example_inputs, strict=True)


def is_read(node: Node) -> bool:
    """Return whether an operator reads an input, which may also be handed back, or asked for its size, and no more."""
    return any(user.op != "output" and not measures_size(user) for user in node.users)


def _refused(node: Node, value: Any) -> Refusal | None:
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided:
            return _refuse(node, f"has layout {value.layout}, not torch.strided")
        is_plain = not (value.is_conj() or value.is_neg())
        return None if is_plain else _refuse(node, "is a lazy conjugate or negative view")
    if is_jagged_size(value):
        return _refuse(node, "stands for the lengths of a jagged dim")
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return None
    if is_generator(value) or never_changes(value):
        return None
    return _refuse(node, f"is a {kind_of(value)}, neither a tensor nor a size")


def _refuse(node: Node, reason: str) -> Refusal:
    return Refusal(f"input {node.target} {reason}", source=first_use(node))
