"""Inputs of a region: sizes, static inputs, staged inputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph

from cudagraph_backend.fill import Fills, InputName, fill_for
from cudagraph_backend.region import Role, SizeInput, TensorInput
from cudagraph_backend.torch_internals import call_input, expr


def tensor_inputs(
    graph: Graph, example_inputs: Sequence[Any], static: Collection[int], names: Sequence[InputName], fills: Fills
) -> tuple[TensorInput, ...]:
    """One record per tensor argument. A static input with a dynamic dim is staged: each size has its own address.

    ``names`` are those of the inputs of the user's call, in Dynamo's order.
    """
    inputs = []
    for index, (node, value) in enumerate(zip(graph.find_nodes(op="placeholder"), example_inputs, strict=True)):
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            continue
        size, stride = tuple(map(expr, value.shape)), tuple(map(expr, value.stride()))
        is_dynamic = any(e.free_symbols for e in (*size, *stride))
        role: Role = "static" if index in static and not is_dynamic else "staged"
        position = call_input(node)
        given = names[position] if position is not None and position < len(names) else None
        fill = fill_for(fills, given, value.dtype, padded=is_dynamic)
        inputs.append(TensorInput(index, str(node.target), role, False, value.dtype, size, stride, given, fill))
    return tuple(inputs)


def size_inputs(example_inputs: Sequence[Any]) -> tuple[SizeInput, ...]:
    """Where a call's sizes are read: symbolic int arguments, then the dims of symbols that no such argument gives."""
    sizes = [
        SizeInput(index, None, expr(value))
        for index, value in enumerate(example_inputs)
        if isinstance(value, torch.SymInt)
    ]
    known = {s.size for s in sizes}
    for index, value in enumerate(example_inputs):
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(expr(size), sympy.Symbol) and expr(size) not in known:
                known.add(expr(size))
                sizes.append(SizeInput(index, dim, expr(size)))
    return tuple(sizes)
