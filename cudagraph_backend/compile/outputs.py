"""Outputs of a region: their sizes and strides as expressions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import sympy
import torch
from torch.fx import Graph, Node

from cudagraph_backend.graph.source import source_line
from cudagraph_backend.region import ArgumentOutput, Output, TensorOutput
from cudagraph_backend.torch_internals import Shapes, expr, is_jagged_size, visible_outputs

_SAVED = "sharedgraph_saved"


def mark_saved(forward: Graph, returned: int) -> None:
    """Mark what a forward saves for its backward, behind what is ``returned``: with whether it is among that, too."""
    results = forward.output_node().args[0]
    for node in results[returned:]:
        if isinstance(node, Node) and node.op == "call_function":
            node.meta[_SAVED] = node in results[:returned]


def graph_outputs(graph: Graph, inputs: Collection[int]) -> tuple[Output, ...]:
    """Return one record per output, strides not yet known: Inductor chooses them.

    ``inputs`` are the indices of the arguments that the region has a record of; others are only handed back.
    """
    arguments = {node: index for index, node in enumerate(graph.find_nodes(op="placeholder"))}
    outputs = tuple(_output(value, arguments, inputs) for value in graph.output_node().args[0])
    visible = {*visible_outputs(graph), *_returned(graph.output_node().args[0])}
    return tuple(
        replace(output, visible=index in visible) if isinstance(output, TensorOutput) else output
        for index, output in enumerate(outputs)
    )


def _returned(results: Sequence[Node | int | None]) -> Iterator[int]:
    """Yield the indices of what others than the backward get."""
    for index, node in enumerate(results):
        if not isinstance(node, Node) or _SAVED not in node.meta or (node.meta[_SAVED] and node not in results[:index]):
            yield index


def _output(value: Node | int | None, arguments: Mapping[Node, int], inputs: Collection[int]) -> Output:
    if not isinstance(value, Node):
        return None if value is None else sympy.Integer(value)
    meta = value.meta.get("val")
    if isinstance(meta, torch.Tensor):
        if value in arguments and arguments[value] not in inputs:
            return ArgumentOutput(arguments[value])
        return TensorOutput(meta.dtype, tuple(map(expr, meta.shape)), None, source_line(value), arguments.get(value))
    is_size = isinstance(meta, (int, torch.SymInt)) and not (isinstance(meta, bool) or is_jagged_size(meta))
    if value in arguments and not is_size:
        return ArgumentOutput(arguments[value])
    return None if meta is None else expr(meta)


def with_strides(
    outputs: Sequence[Output], strides: Sequence[tuple[str, ...] | None] | None, shapes: Shapes
) -> tuple[Output, ...]:
    """Return the same outputs with the strides that Inductor laid them out with."""
    if strides is None or len(strides) != len(outputs):
        return tuple(outputs)
    return tuple(
        replace(o, stride=tuple(map(shapes.parse, stride))) if isinstance(o, TensorOutput) and stride is not None else o
        for o, stride in zip(outputs, strides, strict=True)
    )
