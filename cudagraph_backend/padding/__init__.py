"""Padding: the proof that a dim may be padded, and rules for custom operators.

``lattice`` says what is known of a value, ``rules`` how each operator changes that, ``prove`` walks the graph. The
invariant is that real rows never depend on padded rows; depending on earlier rows is fine, as padding is at the end.

This is what an author of a custom operator needs.

A rule says, for one call of an operator: if the real rows of the operands are right, are those of the result? It sees
the call as a :class:`Call` and answers with ``call.keep(...)``, with ``UNCHANGED``, or by raising
:class:`RefusePadding`. ::

    from cudagraph_backend.padding import UNCHANGED, Call, Fact, RefusePadding, meet, padding_rule

    @padding_rule("mylib::rotate", "mylib::gate")    # each entry from the entries at its place, as x + y is
    def row_by_row(call: Call):
        meet(*call.operands)                         # refuses, unless the rows of all operands meet at one dim
        return call.keep(Fact.REPLICA)               # equal rows give equal rows: copies of the last row stay copies

    @padding_rule("mylib::group_norm")               # reduces every dim but the first
    def within_rows(call: Call):
        x = call.only("x")                           # refuses rows in any other argument, such as the weight
        if x.row_dim != 0:
            raise RefusePadding("normalises over the padded rows")
        return call.keep(Fact.REPLICA)

    @padding_rule("mylib::total")                    # the sum of all entries
    def total(call: Call):
        if not call.only("x").holds(Fact.ZERO):      # as with options={"fill": "zero"}; else a mask makes them zero
            call.fill(call["x"], 0, otherwise="sums the padded rows")
        return UNCHANGED

    @padding_rule("mylib::write_cache", writes=True) # changes its argument "cache", and returns nothing
    def write_cache(call: Call):
        if call["cache"].rows or not (call["rows"].holds(Fact.REPLICA) and call["slots"].holds(Fact.REPLICA)):
            raise RefusePadding("padded rows would be written somewhere else")
        return UNCHANGED                             # the last real row is written again, to its own slot
"""

from cudagraph_backend.errors import PaddingRuleError

from .call import Call
from .lattice import Fact, Operand, RefusePadding, meet
from .user_rules import UNCHANGED, padding_rule

__all__ = ["UNCHANGED", "Call", "Fact", "Operand", "PaddingRuleError", "RefusePadding", "meet", "padding_rule"]
