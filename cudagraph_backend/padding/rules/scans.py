"""Scans: each entry depends on the entries before it, and padding comes after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..call import Call, rule
from ..lattice import Fact, Filling, RefusePadding, Results, in_order

#: What changes nothing in entries that come later.
_NEUTRAL: Mapping[str, Filling] = {"aten::cumsum": 0, "aten::cumprod": 1, "aten::logcumsumexp": "lowest"}
_REFUSED = "padded rows come before real rows in a scan"


@rule("aten::cumsum", "aten::cumprod", "aten::logcumsumexp")
def scan(call: Call) -> Results:
    """Scans along the rows, where only earlier rows matter, or along another dim.

    Padded rows that come before real ones must change nothing. What the padded rows hold after a scan along the rows
    is lost track of.
    """
    operand = call.only("self")
    if _along_rows(call) and not operand.together:
        call.fill(operand, _NEUTRAL[call.operator], _REFUSED)
    return _ordered(call, call.keep(_facts(call)))


@rule("aten::cummax", "aten::cummin")
def scan_with_places(call: Call) -> Results:
    """Scans as :func:`scan`, and gives the place of each extreme."""
    if _along_rows(call) and not call["self"].together:
        raise RefusePadding(_REFUSED)
    return tuple(_ordered(call, result) for result in call.each(_facts(call)))


def _along_rows(call: Call) -> bool:
    operand = call.only("self")
    return operand.dim(call["dim"]) == operand.row_dim


def _facts(call: Call) -> Fact:
    return Fact.NOTHING if _along_rows(call) else Fact.REPLICA


def _ordered(call: Call, result: Any) -> Any:
    return in_order(result) if _along_rows(call) else result
