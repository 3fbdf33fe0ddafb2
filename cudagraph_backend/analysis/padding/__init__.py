"""Whether padding a dynamic dim can change a real row: proven by one walk over a region's ATen graph.

``lattice`` says what is known of a value, ``rules`` how each operator changes that, ``prove`` walks the graph. The
invariant is that real rows never depend on padded rows; depending on earlier rows is fine, as padding is at the end.
"""

from . import masks
from .call import Call, rule
from .lattice import FREE, Fact, Operand, RefusePadding, Rows
from .prove import Verdict, prove

__all__ = ["FREE", "Call", "Fact", "Operand", "RefusePadding", "Rows", "Verdict", "masks", "prove", "rule"]
