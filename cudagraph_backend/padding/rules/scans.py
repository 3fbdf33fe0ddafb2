"""Scans: each entry depends on the entries before it, and padding comes after."""

from __future__ import annotations

from typing import Any

from ..call import Call, rule
from ..lattice import Fact, RefusePadding, Results, in_order


@rule("aten::cumsum", "aten::cumprod", "aten::logcumsumexp")
def scan(call: Call) -> Results:
    """Scans along the rows, where only earlier rows matter, or along another dim.

    What the padded rows hold after a scan along the rows is lost track of.
    """
    return _ordered(call, call.keep(_facts(call)))


@rule("aten::cummax", "aten::cummin")
def scan_with_places(call: Call) -> Results:
    """Scans as :func:`scan`, and gives the place of each extreme."""
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
