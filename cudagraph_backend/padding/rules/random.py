"""Random numbers: which ones a row gets depends on how many rows there are."""

from __future__ import annotations

from ..call import Call, rule
from ..lattice import RefusePadding, Results


@rule("prims::inductor_random", "prims::inductor_randint", sizes=("size",))
def draw(call: Call) -> Results:
    """Refuses random numbers; other operators that draw are known by their tag."""
    raise RefusePadding("draws random numbers for the rows")
