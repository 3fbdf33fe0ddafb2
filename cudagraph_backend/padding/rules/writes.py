"""Writes in place: only whole inputs are written, at the end of a region."""

from __future__ import annotations

from dataclasses import replace

from ..call import Call, rule
from ..lattice import FREE, Fact, RefusePadding, Results, meet


@rule("aten::copy_")
def write(call: Call) -> Results:
    """Writes rows into rows; padded rows are not written back to the caller's tensor."""
    target, source = call["self"], call["src"]
    if target.rows is FREE and source.rows is not FREE:
        raise RefusePadding("padded rows would be written into an input free of rows")
    meet(target, source)
    if source.rows is not FREE and not source.rows.together:
        raise RefusePadding("rows from other places are written into an input's rows")
    return replace(target.rows, holds=Fact.NOTHING)
