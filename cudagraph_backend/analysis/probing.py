"""What the probe must know of a region's graph: may it run with extremes, and how precisely are its values computed?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from cudagraph_backend.analysis.capturable import tensors_of
from cudagraph_backend.analysis.padding.call import leaves
from cudagraph_backend.errors import Refusal
from cudagraph_backend.torch_internals import is_generator, is_operator, operator_name

_NUMBERS_FROM_FLOATS = (
    "prims::convert_element_type",
    "aten::_to_copy",
    "aten::view.dtype",
    "aten::bucketize",
    "aten::searchsorted",
)


def draws_random_numbers(graph: Graph) -> bool:
    return any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in graph.nodes) or any(
        is_generator(n.meta.get("val")) and n.users for n in graph.find_nodes(op="placeholder")
    )


def may_draw_random_numbers(graph: Graph) -> bool:
    """Whether the graph draws random numbers, or has operators of the user's, of which that is not known."""
    operators = [node.target for node in graph.nodes if is_operator(node.target)]
    known = all(operator_name(target).startswith(("aten::", "prims::")) for target in operators)
    return not known or draws_random_numbers(graph)


def precision(graph: Graph) -> float:
    """The largest machine epsilon among the graph's values, 0 without floats: how far right results may be apart."""
    dtypes = {tensor.dtype for node in graph.nodes for tensor in tensors_of(node)}
    return max((torch.finfo(d).eps for d in dtypes if d.is_floating_point or d.is_complex), default=0.0)


def probe_refusal(graph: Graph, unproven: Refusal) -> Refusal | None:
    """Why a dim that is ``unproven`` can't be probed either."""
    if draws_random_numbers(graph):
        reason = "the region draws random numbers, so runs can't be compared"
    elif (node := number_from_floats(graph)) is not None:
        reason = f"integers are made of floats ({node.target}), so extremes might become an index out of range"
    else:
        return None
    return Refusal(f"{unproven.reason}; no probe: {reason}", unproven.op, unproven.source)


def number_from_floats(graph: Graph) -> Node | None:
    """The first operator that makes integers of floats in a way that NaN or a large number gives any integer.

    One of them may be an index: out of range it raises on a CPU, and ends the process's CUDA context on a GPU. ATen's
    positions (argmax, sort, …) stay in range whatever they read; of a custom operator nothing is known.
    """
    for node in graph.nodes:
        if is_operator(node.target) and any(_is_integer(t) for t in tensors_of(node)):
            name = operator_name(node.target)
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
