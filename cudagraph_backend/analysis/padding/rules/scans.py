"""Scans: each entry depends on the entries before it, and padding comes after."""

from __future__ import annotations

from ..call import Call, rule
from ..lattice import Fact, Results


@rule("aten::cumsum", "aten::cumprod", "aten::logcumsumexp")
def scan(call: Call) -> Results:
    """Along the rows, only earlier rows matter; what the padded rows then hold is lost track of."""
    return call.keep(_facts(call))


@rule("aten::cummax", "aten::cummin")
def scan_with_places(call: Call) -> Results:
    """As :func:`scan`, with the place of each extreme."""
    return call.each(_facts(call))


def _facts(call: Call) -> Fact:
    operand = call.only("self")
    return Fact.NOTHING if operand.dim(call["dim"]) == operand.row_dim else Fact.REPLICA
