"""The proof that padding a dim can't change a real row: walks over the graph, knowing more of padded rows each time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from torch.fx import Graph, GraphModule

from cudagraph_backend.errors import Refusal
from cudagraph_backend.fill import Fill
from cudagraph_backend.torch_internals import dispatch_to_proxies

from .editor import Editor, copied
from .edits import Edits
from .lattice import Axes, Fact, RefusePadding
from .symbolic import HIDDEN, ROWS, Sizes
from .walk import Walk

_FILLS: Mapping[Fill, Fact] = {"replica": Fact.REPLICA, "zero": Fact.ZERO, 0: Fact.ZERO}  # other numbers say nothing


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a region may run at a bucket with padded rows after the real ones.

    Attributes:
        symbols: the shape symbols padded together.
        refusal: None if no real row of an output or mutated input can change; otherwise why that is not proven.
        needs_fill: the padded rows of the inputs must hold the fill; otherwise they may hold anything.
        link: with a refusal, symbols that may belong to the same dim: padded together with them, and with equal sizes
            in the call, the region may be proven.
        edited: the graph for which the verdict holds, if that is not the one that was judged: a copy.
        counts: the symbols of which the edited graph's last inputs tell how many rows are real.
        masks: how many operands are masked there.
        forms: operators that were written in another form there, by name.
        outputs: for each output its rows.
    """

    symbols: frozenset[sympy.Symbol]
    refusal: Refusal | None
    needs_fill: bool
    link: frozenset[sympy.Symbol] = frozenset()
    edited: GraphModule | None = None
    counts: tuple[sympy.Symbol, ...] = ()
    masks: int = 0
    forms: tuple[str, ...] = ()
    outputs: tuple[Axes, ...] = ()


def prove(
    graph: Graph, symbols: frozenset[sympy.Symbol], fill: Fill | Mapping[str, Fill], *, masked: bool = False
) -> Verdict:
    """Try to prove that running ``graph`` with the dim of ``symbols`` padded leaves every real row as it is.

    First with padded rows that hold anything, then with padded rows that hold ``fill`` (the same in all inputs, or by
    the input's name in the graph; in others anything), then, if ``masked``, in a copy of the graph with masks, and with
    other forms of operators, where that is not enough. At last, rows that are joined end to end are put in order.
    """
    sizes, filled = Sizes(symbols), _holds(graph, fill)
    for holds in ({}, filled):
        walk = Walk(sizes, holds)
        try:
            return Verdict(symbols, None, bool(holds), outputs=walk.run(graph))
        except RefusePadding as refused:
            verdict = _refused(symbols, walk, refused)
    return _prove_edited(graph, symbols, sizes, filled) if masked else verdict


def _prove_edited(
    graph: Graph,
    symbols: frozenset[sympy.Symbol],
    sizes: Sizes,
    filled: Mapping[str, Fact],
    *,
    joins_in_order: bool = False,
) -> Verdict:
    module = copied(graph)
    edits = Edits(Editor(module.graph, symbols), joins_in_order=joins_in_order)
    walk = Walk(sizes, filled, edits)
    try:
        with dispatch_to_proxies():
            outputs = walk.run(module.graph)
            edits.finish()
    except RefusePadding as refused:
        verdict = _refused(symbols, walk, refused)
        if joins_in_order or not edits.found_joined:
            return verdict
        in_order = _prove_edited(graph, symbols, sizes, filled, joins_in_order=True)
        return in_order if in_order.refusal is None else verdict
    module.recompile()
    counts, masks, forms = tuple(edits.editor.counts), len(edits.operands), tuple(edits.forms)
    return Verdict(symbols, None, True, frozenset(), module, counts, masks, forms, outputs)


def _refused(symbols: frozenset[sympy.Symbol], walk: Walk, refused: RefusePadding) -> Verdict:
    """Return the verdict without the exception, whose frames hold the tensors of the call that compiles."""
    return Verdict(symbols, walk.blame(refused), False, frozenset(refused.link) - symbols - {ROWS, HIDDEN})


def _holds(graph: Graph, fill: Fill | Mapping[str, Fill]) -> dict[str, Fact]:
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    fills = fill if isinstance(fill, Mapping) else dict.fromkeys(names, fill)
    return {name: _FILLS[fills[name]] for name in names if fills.get(name) in _FILLS}
