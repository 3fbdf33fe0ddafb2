"""Dynamic dims of a region: which symbols there are, which are padded together, and the padding verdict of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy
from torch.fx import Graph

from cudagraph_backend.analysis.padding import Verdict, prove
from cudagraph_backend.errors import Refusal
from cudagraph_backend.options import Options
from cudagraph_backend.region import DynamicDim, SizeInput, TensorInput
from cudagraph_backend.torch_internals import Shapes


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
        or _refused_number(verdict.symbols, inputs)
        or next((r for i in inputs if (r := _refused_layout(i, verdict.symbols, options))), None)
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
    if verdict.refusal is None or verdict is alone:
        return verdict
    return replace(alone, refusal=_both(alone.refusal, verdict.refusal))


def _both(alone: Refusal | None, linked: Refusal) -> Refusal:
    """Why linking dims does not help, which is mostly the deeper reason, and why it was tried."""
    return replace(linked, reason=f"{linked.reason}; as a dim of its own: {alone.reason}" if alone else linked.reason)


def _refused_number(symbols: frozenset[sympy.Symbol], inputs: Sequence[TensorInput]) -> Refusal | None:
    """An int argument that is no dim of a tensor is a value like any other: there are no rows to pad."""
    in_sizes = frozenset().union(*(size.free_symbols for tensor in inputs for size in tensor.size))
    return None if symbols <= in_sizes else Refusal("it is the size of no input's dim")


def _refused_layout(tensor: TensorInput, symbols: frozenset[sympy.Symbol], options: Options) -> Refusal | None:
    """Staging fills padded rows behind the real ones, so a padded size must be a whole multiple of the symbol."""
    in_sizes = frozenset().union(*(size.free_symbols for size in tensor.size))
    if (tensor.symbols - in_sizes) & symbols:
        return Refusal(f"input {tensor.name} has a dynamic stride, not a dynamic size")
    for size, stride in zip(tensor.size, tensor.stride, strict=True):
        if size.free_symbols & symbols and not _is_multiple(size, symbols):
            return Refusal(f"input {tensor.name} has size {size}, no fixed multiple of the dynamic dim")
        if size.free_symbols & symbols and stride == 0 and options.fill == "zero":
            return Refusal(f"input {tensor.name} is expanded along the dynamic dim, so its padded rows can't be zero")
    return None


def _is_multiple(size: sympy.Expr, symbols: frozenset[sympy.Symbol]) -> bool:
    present = size.free_symbols & symbols
    return len(present) == 1 and (size / next(iter(present))).is_Integer
