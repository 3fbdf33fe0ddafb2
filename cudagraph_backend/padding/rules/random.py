"""Random numbers: which ones a row gets depends on the entries before it."""

from __future__ import annotations

from cudagraph_backend.torch_internals import draws_as_eager

from ..call import Call, rule
from ..lattice import Fact, RefusePadding, Results, in_order
from ..symbolic import product


@rule("prims::inductor_random", "prims::inductor_randint", sizes=("size",))
def draw(call: Call) -> Results:
    """Allows rows that are outermost: Inductor draws each entry by its number in memory, which padding leaves as it is.

    (``torch/_inductor/lowering.py``: the offset of a counter-based generator is the entry's place in a contiguous
    tensor.) Other operators that draw are known by their tag, and refused.
    """
    if call["align_dtype"] is not None:  # eager's generators, which divide entries among threads by their number
        raise RefusePadding("draws random numbers for the rows")
    found = call.result_dim()
    if found is None or product(call.result_shape()[: found.dim]) != 1:
        raise RefusePadding("draws random numbers for the rows")
    return in_order(call.keep(Fact.NOTHING))


@rule("aten::multinomial")
def choose(call: Call) -> Results:
    """Chooses for each row by the row's own weights, which padded rows must have, too.

    In a bucket a row gets other numbers than at its exact size, of the same distribution, unless eager's are asked for.
    """
    weights = call.only("self")
    if draws_as_eager() or weights.row_dim != 0 or len(weights.shape) != 2:
        raise RefusePadding("draws random numbers for the rows")
    if not weights.holds(Fact.REPLICA):
        call.fill(weights, "last", "draws random numbers for the rows")
    return in_order(call.keep(Fact.NOTHING))
