"""Dynamic dims of a region: which symbols there are, which are padded together, and the padding verdict of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy
from torch.fx import Graph

from cudagraph_backend.analysis.padding import Verdict, prove
from cudagraph_backend.analysis.source import first_use
from cudagraph_backend.errors import Refusal
from cudagraph_backend.options import Options
from cudagraph_backend.region import DynamicDim, SizeInput, TensorInput
from cudagraph_backend.torch_internals import SYMBOLIC, Shapes, expr


def dynamic_dims(
    graph: Graph, sizes: Sequence[SizeInput], inputs: Sequence[TensorInput], shapes: Shapes, options: Options
) -> tuple[DynamicDim, ...]:
    """One record per dim that varies independently, in the order in which its first symbol is read."""
    symbols = [s.size for s in sizes if isinstance(s.size, sympy.Symbol)]
    dims: list[DynamicDim] = []
    for symbol in symbols:
        if any(symbol in dim.symbols for dim in dims):
            continue
        dim = _dim(graph, frozenset([symbol]), inputs, shapes, options)
        dims = [d for d in dims if not d.symbols & dim.symbols]  # a linked dim takes the place of its parts
        dims.append(dim)
    return tuple(dims)


def _dim(
    graph: Graph, symbols: frozenset[sympy.Symbol], inputs: Sequence[TensorInput], shapes: Shapes, options: Options
) -> DynamicDim:
    verdict = _linked_verdict(graph, symbols, options)
    refusal = (
        verdict.refusal
        or _refused_number(graph, verdict.symbols, inputs)
        or next((_located(graph, i, r) for i in inputs if (r := _refused_layout(i, verdict.symbols, options))), None)
    )
    upper = [bound for symbol in verdict.symbols if (bound := shapes.upper_bound(symbol)) is not None]
    return DynamicDim(
        symbols=verdict.symbols,
        upper=min(upper) if upper else None,
        refusal=refusal,
        needs_fill=verdict.needs_fill,
    )


def _linked_verdict(graph: Graph, symbols: frozenset[sympy.Symbol], options: Options) -> Verdict:
    """The verdict on ``symbols``, or on them together with the dims they index by row, where that is provable."""
    if options.pad == "off":
        return Verdict(symbols, Refusal("padding is off (option pad='off')"), False, frozenset(), ())
    if options.pad == "assume":
        return Verdict(symbols, None, True, frozenset(), ())
    alone = verdict = prove(graph, symbols, options.fill)
    while verdict.refusal is not None and verdict.link - verdict.symbols:
        verdict = prove(graph, verdict.symbols | verdict.link, options.fill)
    # A refusal that linking does not cure is the deeper one, and the same for all the dims that would be linked.
    return verdict if verdict.refusal is None else replace(alone, refusal=verdict.refusal)


def _refused_number(graph: Graph, symbols: frozenset[sympy.Symbol], inputs: Sequence[TensorInput]) -> Refusal | None:
    """An int argument that is no dim of a tensor is a value like any other: there are no rows to pad.

    One that is linked to a dim has that dim's rows.
    """
    in_sizes = frozenset().union(*(size.free_symbols for tensor in inputs for size in tensor.size))
    if symbols & in_sizes:
        return None
    strided = next((_located(graph, i, r) for i in inputs if (r := _refused_stride(i, symbols))), None)
    return strided or Refusal("it is the size of no input's dim", source=_read_at(graph, symbols))


def _read_at(graph: Graph, symbols: frozenset[sympy.Symbol]) -> str | None:
    numbers = (n for n in graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), SYMBOLIC))
    return next((first_use(number) for number in numbers if expr(number.meta["val"]) in symbols), None)


def _refused_stride(tensor: TensorInput, symbols: frozenset[sympy.Symbol]) -> Refusal | None:
    in_sizes = frozenset().union(*(size.free_symbols for size in tensor.size))
    if (tensor.symbols - in_sizes) & symbols:
        return Refusal(f"input {tensor.name} has a dynamic stride, not a dynamic size")
    return None


def _refused_layout(tensor: TensorInput, symbols: frozenset[sympy.Symbol], options: Options) -> Refusal | None:
    """Staging fills padded rows behind the real ones, so a padded size must be a whole multiple of the symbol."""
    if (refusal := _refused_stride(tensor, symbols)) is not None:
        return refusal
    for size, stride in zip(tensor.size, tensor.stride, strict=True):
        if size.free_symbols & symbols and not _is_multiple(size, symbols):
            return Refusal(f"input {tensor.name} has size {size}, no fixed multiple of the dynamic dim")
        if size.free_symbols & symbols and stride == 0 and options.fill == "zero":
            return Refusal(f"input {tensor.name} is expanded along the dynamic dim, so its padded rows can't be zero")
    return None


def _located(graph: Graph, tensor: TensorInput, refusal: Refusal) -> Refusal:
    """``refusal`` of an input, with the source line that reads it: the graph's names of inputs are not the user's."""
    placeholder = next(node for node in graph.find_nodes(op="placeholder") if str(node.target) == tensor.name)
    return replace(refusal, source=first_use(placeholder))


def _is_multiple(size: sympy.Expr, symbols: frozenset[sympy.Symbol]) -> bool:
    present = size.free_symbols & symbols
    return len(present) == 1 and (size / next(iter(present))).is_Integer
