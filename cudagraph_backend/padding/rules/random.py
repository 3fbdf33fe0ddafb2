"""Random numbers: which ones a row gets depends on the entries before it."""

from __future__ import annotations

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
