"""The proof that padding a dim can't change a real row: walks over the graph, knowing more of padded rows each time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from torch.fx import Graph

from cudagraph_backend.errors import Refusal
from cudagraph_backend.fill import Fill

from .call import Mask
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
        masks: what the graph must be given (``masks.insert``) for the verdict to hold.
        outputs: for each output its rows.
    """

    symbols: frozenset[sympy.Symbol]
    refusal: Refusal | None
    needs_fill: bool
    link: frozenset[sympy.Symbol] = frozenset()
    masks: tuple[Mask, ...] = ()
    outputs: tuple[Axes, ...] = ()


def prove(
    graph: Graph, symbols: frozenset[sympy.Symbol], fill: Fill | Mapping[str, Fill], *, masked: bool = False
) -> Verdict:
    """Try to prove that running ``graph`` with the dim of ``symbols`` padded leaves every real row as it is.

    First with padded rows that hold anything, then with padded rows that hold ``fill`` (the same in all inputs, or by
    the input's name in the graph; in others anything), then, if ``masked``, with masks in the graph where that is not
    enough.
    """
    sizes, filled = Sizes(symbols), _holds(graph, fill)
    attempts: list[tuple[Mapping[str, Fact], list[Mask] | None]] = [({}, None), (filled, None)]
    if masked:
        attempts.append((filled, []))
    for holds, masks in attempts:
        walk = Walk(sizes, holds, masks)
        try:
            outputs = walk.run(graph)
        except RefusePadding as refused:
            refusal, link = walk.blame(refused), frozenset(refused.link) - symbols - {ROWS, HIDDEN}
        else:
            return Verdict(symbols, None, bool(holds), masks=tuple(masks or ()), outputs=outputs)
    return Verdict(symbols, refusal, False, link)


def _holds(graph: Graph, fill: Fill | Mapping[str, Fill]) -> dict[str, Fact]:
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    fills = fill if isinstance(fill, Mapping) else dict.fromkeys(names, fill)
    return {name: _FILLS[fills[name]] for name in names if fills.get(name) in _FILLS}
