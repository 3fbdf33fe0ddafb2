"""What the probe must know of a region's graph: may it run with extremes, and how precisely are its values computed?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from cudagraph_backend.compile.capturable import tensors_of
from cudagraph_backend.errors import Refusal
from cudagraph_backend.graph.operators import communicates, has_token, nodes_in, targets_in, wrapped
from cudagraph_backend.graph.source import source_line
from cudagraph_backend.padding.call import leaves
from cudagraph_backend.torch_internals import (
    is_generator,
    is_higher_order,
    is_operator,
    operator_name,
    subgraphs_of,
)

_NUMBERS_FROM_FLOATS = (
    "prims::convert_element_type",
    "aten::_to_copy",
    "aten::view.dtype",
    "aten::bucketize",
    "aten::searchsorted",
)


def draws_random_numbers(graph: Graph) -> bool:
    return any(torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) for target in targets_in(graph)) or any(
        is_generator(node.meta.get("val")) and node.users for node in graph.find_nodes(op="placeholder")
    )


def lasting_effect(graph: Graph) -> Refusal | None:
    """Return an effect of the graph that nothing can put back, so that it must not be run to try something out."""
    for node in nodes_in(graph):
        if has_token(node):
            return Refusal("the region has effects that can't be put back", str(node.args[1]), source_line(node))
        for target in (node.target, *wrapped(node)):
            if communicates(target):
                return Refusal("the region communicates with other processes", str(target), source_line(node))
    return None


def may_draw_random_numbers(graph: Graph) -> bool:
    """Return whether the graph draws random numbers, or has operators of the user's, of which that is not known."""
    operators = [target for target in targets_in(graph) if is_operator(target)]
    known = all(operator_name(target).startswith(("aten::", "prims::")) for target in operators)
    return not known or draws_random_numbers(graph)


def precision(graph: Graph) -> float:
    """Return the largest machine epsilon of the graph's values, 0 without floats: how far results may be apart."""
    dtypes = {tensor.dtype for node in nodes_in(graph) for tensor in tensors_of(node)}
    return max((torch.finfo(d).eps for d in dtypes if d.is_floating_point or d.is_complex), default=0.0)


def probe_refusal(graph: Graph, unproven: Refusal) -> Refusal | None:
    """Return why a dim that is ``unproven`` can't be probed either."""
    if (effect := lasting_effect(graph)) is not None:
        reason = f"{effect.reason} ({effect.op}), which must happen once per call"
    elif draws_random_numbers(graph):
        reason = "the region draws random numbers, so runs can't be compared"
    elif (node := number_from_floats(graph)) is not None:
        reason = f"integers are made of floats ({node.target}), so extremes might become an index out of range"
    else:
        return None
    return Refusal(f"{unproven.reason}; no probe: {reason}", unproven.op, unproven.source)


def number_from_floats(graph: Graph) -> Node | None:
    """Return the first operator that makes integers of floats in a way that NaN or a large number gives any integer.

    One of them may be an index: out of range it raises on a CPU, and ends the process's CUDA context on a GPU. ATen's
    positions (argmax, sort, …) stay in range whatever they read; of a custom operator nothing is known.
    """
    for node in nodes_in(graph):
        if not any(_is_integer(t) for t in tensors_of(node)):
            continue
        # What higher-order operators wrap is foreign, too: a kernel of the user's, for one.
        if is_operator(node.target) or (is_higher_order(node.target) and not subgraphs_of(node)):
            name = operator_name(node.target) if is_operator(node.target) else ""
            is_foreign = not name.startswith(("aten::", "prims::"))
            if (is_foreign or name.startswith(_NUMBERS_FROM_FLOATS)) and any(map(_is_float, _operands(node))):
                return node
    return None


def _operands(node: Node) -> Iterator[torch.Tensor]:
    for argument in leaves([node.args, node.kwargs]):
        value: Any = argument.meta.get("val") if isinstance(argument, Node) else None
        yield from (v for v in leaves(value) if isinstance(v, torch.Tensor))


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _is_integer(tensor: torch.Tensor) -> bool:
    return not _is_float(tensor) and tensor.dtype != torch.bool
