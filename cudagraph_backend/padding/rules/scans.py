"""Scans: each entry depends on the entries before it, and padding comes after."""

from __future__ import annotations

from typing import Any

from ..call import Call, rule
from ..lattice import Fact, RefusePadding, Results, in_order


@rule("aten::cumsum", "aten::cumprod", "aten::logcumsumexp")
def scan(call: Call) -> Results:
    """Along the rows, only earlier rows matter; what the padded rows then hold is lost track of."""
    return _ordered(call, call.keep(_facts(call)))


@rule("aten::cummax", "aten::cummin")
def scan_with_places(call: Call) -> Results:
    """As :func:`scan`, with the place of each extreme."""
    return tuple(_ordered(call, result) for result in call.each(_facts(call)))


def _along_rows(call: Call) -> bool:
    operand = call.only("self")
    return operand.dim(call["dim"]) == operand.row_dim


def _facts(call: Call) -> Fact:
    if not _along_rows(call):
        return Fact.REPLICA
    if not call["self"].rows.together:
        raise RefusePadding("padded rows come before real rows in a scan")
    return Fact.NOTHING


def _ordered(call: Call, result: Any) -> Any:
    return in_order(result) if _along_rows(call) else result
