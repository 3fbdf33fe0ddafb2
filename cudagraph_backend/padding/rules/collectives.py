"""Collectives: what comes from other processes is padded as here, as all choose the same bucket for the same size.

That is the runtime's part: regions that communicate take no other bucket, whatever was met before (``Planner``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..call import Call, rule
from ..lattice import FREE, Fact, Operand, RefusePadding, Results, Rows, in_order
from ..symbolic import whole

_OWN, _AUTOGRAD = "_c10d_functional::", "_c10d_functional_autograd::"


@rule(f"{_OWN}wait_tensor", f"{_OWN}broadcast", f"{_OWN}_wrap_tensor_autograd")
def same_entries(call: Call) -> Results:
    """Gives each row as it is here, or in one process."""
    return call.keep(Fact.ALL)


@rule(f"{_OWN}all_reduce", f"{_OWN}all_reduce_coalesced")
def reduce(call: Call) -> Results:
    """Reduces entries at the same place in all processes: sums, means, extremes and products of zeros are zero."""
    return _each(call, lambda rows: replace(rows, holds=rows.holds & (Fact.REPLICA | Fact.ZERO)))


@rule(
    f"{_OWN}all_gather_into_tensor",
    f"{_OWN}all_gather_into_tensor_coalesced",
    f"{_AUTOGRAD}all_gather_into_tensor",
)
def gather(call: Call) -> Results:
    """Joins what all processes have along dim 0: rows there become a block for each, with padded rows between."""

    def gathered(rows: Rows) -> Rows:
        rows = replace(rows, holds=rows.holds & (Fact.REPLICA | Fact.ZERO))
        if rows.dim != 0:
            return rows
        rows = in_order(rows)  # entries that are equal here need not be equal to another process's
        assert rows.blocks is not None
        return replace(rows, blocks=rows.blocks * call["group_size"])

    return _each(call, gathered)


@rule(
    f"{_OWN}reduce_scatter_tensor",
    f"{_OWN}reduce_scatter_tensor_coalesced",
    f"{_AUTOGRAD}reduce_scatter_tensor",
)
def scatter(call: Call) -> Results:
    """Reduces, and leaves each process its part of dim 0: of rows there it must be whole blocks."""

    def scattered(rows: Rows) -> Rows:
        rows = replace(rows, holds=rows.holds & (Fact.REPLICA | Fact.ZERO))
        if rows.dim != 0:
            return rows
        rows = in_order(rows)
        assert rows.blocks is not None
        reason = "gives processes other rows than at the exact size, padded ones to the last"
        return replace(rows, blocks=whole(rows.blocks, call["group_size"], reason))

    return _each(call, scattered)


@rule(f"{_OWN}all_to_all_single", f"{_AUTOGRAD}all_to_all_single")
def exchange(call: Call) -> Results:
    """Exchanges parts of dim 0, of fixed sizes: rows must be along another dim."""
    if call.only("input").row_dim == 0:
        raise RefusePadding("exchanges rows with other processes, padded ones for real ones")
    return call.keep(Fact.REPLICA | Fact.ZERO)


def _each(call: Call, result: Callable[[Rows], Rows]) -> Results:
    """Return the rows of the one result, or of the result for each of several inputs."""
    given: Any = call["input"] if call["inputs"] is None else call["inputs"]
    if isinstance(given, Operand):
        return FREE if given.rows is FREE else result(given.rows)
    return tuple(FREE if one.rows is FREE else result(one.rows) for one in given)
