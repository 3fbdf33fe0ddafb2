"""Dynamic dims of a region: which symbols there are, which are padded together, and the padding verdict of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import sympy
import torch
from torch.fx import Graph, GraphModule

from cudagraph_backend.compile.probing import probe_refusal
from cudagraph_backend.errors import Refusal
from cudagraph_backend.graph.source import first_use
from cudagraph_backend.options import Options
from cudagraph_backend.padding.prove import Verdict, prove
from cudagraph_backend.region import CountInput, DynamicDim, SizeInput, TensorInput
from cudagraph_backend.torch_internals import SYMBOLIC, Shapes, expr, is_backed, symbols_of

Symbols: TypeAlias = "frozenset[sympy.Symbol]"


def dynamic_dims(
    module: GraphModule,
    sizes: Sequence[SizeInput],
    inputs: Sequence[TensorInput],
    shapes: Shapes,
    options: Options,
    agreed: Symbols | None = None,
) -> tuple[tuple[DynamicDim, ...], tuple[CountInput, ...]]:
    """Return one record per dim that varies independently, in the order in which its first symbol is read.

    First without touching the graph; dims refused that way are tried again with masks. The masks of one dim are in the
    graph when the next dim is judged, so that the proofs hold one after the other. A dim with masks gives the graph one
    more input per symbol, the number of its real rows. ``agreed`` are the only symbols that may be padded, as all
    processes that the region communicates with pad them; ``None`` if it communicates with none.
    """
    if options.pad == "assume":
        agreed = None
    symbols = [frozenset([s.size]) for s in sizes if isinstance(s.size, sympy.Symbol)]
    verdicts: list[Verdict] = []
    for dim in symbols:
        verdicts = _with(verdicts, dim, lambda dim: _verdict(module.graph, dim, inputs, options, masked=False))
    refused = [v.symbols for v in verdicts if v.refusal is not None]
    counts: list[CountInput] = []
    for dim in refused if options.pad in ("prove", "probe") else ():
        if (_refused_apart(dim, agreed) or _refused_layouts(module.graph, dim, inputs, shapes)) is None:
            verdicts = _with(verdicts, dim, lambda dim: _masked(module, dim, inputs, options, counts))
    dims = (_dim(module.graph, verdict, inputs, shapes, options, agreed) for verdict in verdicts)
    return tuple(dims), tuple(counts)


def _with(verdicts: list[Verdict], symbols: Symbols, judge: Callable[[Symbols], Verdict]) -> list[Verdict]:
    """Return ``verdicts`` with one on ``symbols``, which on a linked dim takes the place of those on its parts."""
    if any(symbols < verdict.symbols for verdict in verdicts):
        return verdicts
    verdict = judge(symbols)
    first = next((i for i, other in enumerate(verdicts) if other.symbols & verdict.symbols), len(verdicts))
    others = [other for other in verdicts[first:] if not other.symbols & verdict.symbols]
    return [*verdicts[:first], verdict, *others]


def _dim(
    graph: Graph,
    verdict: Verdict,
    inputs: Sequence[TensorInput],
    shapes: Shapes,
    options: Options,
    agreed: Symbols | None,
) -> DynamicDim:
    to_probe, unproven = None, verdict.refusal
    if options.pad == "probe" and unproven is not None:
        to_probe, unproven = unproven, probe_refusal(graph, unproven)
    apart = _refused_apart(verdict.symbols, agreed)
    refusal = unproven or apart or _refused_layouts(graph, verdict.symbols, inputs, shapes)
    upper = [bound for symbol in verdict.symbols if (bound := shapes.upper_bound(symbol)) is not None]
    return DynamicDim(
        symbols=verdict.symbols,
        upper=min(upper) if upper else None,
        refusal=refusal,
        needs_fill=verdict.needs_fill,
        masks=verdict.masks,
        forms=verdict.forms,
        to_probe=to_probe if refusal is None else None,
    )


def _verdict(
    graph: Graph, symbols: Symbols, inputs: Sequence[TensorInput], options: Options, *, masked: bool
) -> Verdict:
    """Judge ``symbols`` alone, or, where only that is provable, together with the dims that they index by row."""
    if options.pad == "off":
        return Verdict(symbols, Refusal("padding is off (option pad='off')"), False)
    if options.pad == "assume":
        return Verdict(symbols, None, True)
    fill = {tensor.name: tensor.fill for tensor in inputs}
    alone = verdict = prove(graph, symbols, fill, masked=masked)
    while verdict.refusal is not None and verdict.link - verdict.symbols:
        verdict = prove(graph, verdict.symbols | verdict.link, fill, masked=masked)
    # A refusal that linking does not cure is the deeper one, and the same for all the dims that would be linked.
    return verdict if verdict.refusal is None else replace(alone, refusal=verdict.refusal)


def _masked(
    module: GraphModule, symbols: Symbols, inputs: Sequence[TensorInput], options: Options, counts: list[CountInput]
) -> Verdict:
    """Return the verdict on ``symbols`` with masks; if it is safe the module gets the graph that has them."""
    verdict = _verdict(module.graph, symbols, inputs, options, masked=True)
    if verdict.edited is not None:
        module.graph = verdict.edited.graph  # which compiles the module anew
        placeholders = module.graph.find_nodes(op="placeholder")
        first = len(placeholders) - len(verdict.counts)
        for index, symbol in enumerate(verdict.counts, start=first):
            counts.append(CountInput(index, str(placeholders[index].target), symbol))
    return verdict


def _refused_apart(symbols: Symbols, agreed: Symbols | None) -> Refusal | None:
    """Refuse a dim that is dynamic because sizes differed here: another process may have a fixed size and no bucket."""
    if agreed is None or all(symbol in agreed or not is_backed(symbol) for symbol in symbols):
        return None
    return Refusal(
        "the region communicates, and other processes may have compiled it for a fixed size: "
        "mark the dim with torch._dynamo.mark_dynamic in all of them"
    )


def _refused_layouts(graph: Graph, symbols: Symbols, inputs: Sequence[TensorInput], shapes: Shapes) -> Refusal | None:
    layouts = (_located(graph, i, refusal) for i in inputs if (refusal := _refused_layout(i, symbols, shapes)))
    return (
        _refused_number(graph, symbols, inputs, shapes)
        or _refused_unstaged(graph, symbols, inputs)
        or next(layouts, None)
    )


def _refused_unstaged(graph: Graph, symbols: Symbols, inputs: Sequence[TensorInput]) -> Refusal | None:
    """Refuse the size of a tensor that no operator reads: it is not padded, and generated code may check or read it."""
    staged = {tensor.name for tensor in inputs}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and str(node.target) not in staged and symbols_of(value) & symbols:
            return Refusal(f"argument {node.target} has the same size, and is only handed back or asked for it")
    return None


def _refused_number(graph: Graph, symbols: Symbols, inputs: Sequence[TensorInput], shapes: Shapes) -> Refusal | None:
    """Refuse an int argument that is neither a dim of a tensor nor known to be a size: it is a value like any other.

    One that is linked to a dim has that dim's rows; one that no guard lets be negative is a size of what is made.
    """
    in_sizes = frozenset().union(*(size.free_symbols for tensor in inputs for size in tensor.size))
    if symbols & in_sizes:
        return None
    if all(shapes.is_at_least(0, symbol) for symbol in symbols):
        return None
    return Refusal("it is the size of no input's dim", source=_read_at(graph, symbols))


def _read_at(graph: Graph, symbols: Symbols) -> str | None:
    numbers = (n for n in graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), SYMBOLIC))
    return next((first_use(number) for number in numbers if expr(number.meta["val"]) in symbols), None)


def _refused_layout(tensor: TensorInput, symbols: Symbols, shapes: Shapes) -> Refusal | None:
    """Return why staging can't put padded rows behind the real ones, as when a size is no multiple of the symbol."""
    if tensor.role == "static" and tensor.symbols & symbols:
        return Refusal(f"input {tensor.name} is on the device meta, and has no rows to add to")
    for size, stride in zip(tensor.size, tensor.stride, strict=True):
        if size.free_symbols & symbols and not _has_rows(size, symbols, shapes):
            return Refusal(f"input {tensor.name} has size {size}, and not so many entries per row of the dynamic dim")
        if size.free_symbols & symbols and stride == 0 and tensor.fill != "replica":
            reason = f"is expanded along the dynamic dim, so its padded rows can't be {tensor.fill}"
            return Refusal(f"input {tensor.name} {reason}")
    return None


def _located(graph: Graph, tensor: TensorInput, refusal: Refusal) -> Refusal:
    """Return an input's ``refusal`` with the source line that reads it, as the user knows no names in the graph."""
    placeholder = next(node for node in graph.find_nodes(op="placeholder") if str(node.target) == tensor.name)
    return replace(refusal, source=first_use(placeholder))


def _has_rows(size: sympy.Expr, symbols: Symbols, shapes: Shapes) -> bool:
    """Return whether a dim has so many entries per row, or one, and then a few more or less but never none."""
    present = size.free_symbols & symbols
    if len(present) != 1 or size.free_symbols != present:
        return False
    (rows,) = present
    more = sympy.expand(size - rows)
    return (size / rows).is_Integer or (more.is_Integer and shapes.is_at_least(1 - int(more), rows))
