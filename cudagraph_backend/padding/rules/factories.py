"""Tensors made from sizes."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..call import Call, rule
from ..lattice import Fact, RefusePadding, Results, Rows, in_order

_CONSTANTS = {"aten::zeros": 0, "aten::zeros_like": 0, "aten::new_zeros": 0}


@rule(
    "aten::full",
    "aten::full_like",
    "aten::new_full",
    "aten::new_ones",
    "aten::new_zeros",
    "aten::ones",
    "aten::ones_like",
    "aten::zeros",
    "aten::zeros_like",
    sizes=("size",),
)
def constant(call: Call) -> Results:
    """Fills all rows with one number, whatever the operands hold."""
    value = _CONSTANTS.get(call.operator, call["fill_value"])
    return _made(call, Fact.REPLICA | (Fact.ZERO if _is_zero(value) else Fact.NOTHING))


@rule(
    "aten::empty.memory_format",
    "aten::empty_like",
    "aten::empty_permuted",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "prims::empty_permuted",
    sizes=("size", "stride", "shape"),
)
def garbage(call: Call) -> Results:
    """Makes rows of which nothing is known; nothing may depend on them."""
    return _made(call, Fact.NOTHING)


@rule("prims::iota", sizes=("length",))
def iota(call: Call) -> Results:
    """Counts the rows: a row's own number if it counts by one from zero."""
    return _counted(call)


@rule("aten::arange", "aten::arange.start", "aten::arange.start_step", sizes=("end",))
def arange(call: Call) -> Results:
    """Counts the rows, as :func:`iota`."""
    return _counted(call)


@rule("aten::eye", "aten::eye.m", "aten::linspace", "aten::logspace", "aten::scalar_tensor")
def from_sizes(call: Call) -> Results:
    """Refuses the padded size in every argument, as the values of the result come from these."""
    raise RefusePadding("the padded size reaches values")


def _counted(call: Call) -> Results:
    made = _made(call, Fact.NOTHING)
    start, step = call["start"] or 0, 1 if call["step"] is None else call["step"]
    counts = (start, step, made.per) == (0, 1, 1) and call.node.meta["val"].dtype in (torch.int32, torch.int64)
    return in_order(replace(made, holds=Fact.OWN_INDEX if counts else Fact.NOTHING))


def _made(call: Call, facts: Fact) -> Rows:
    rows = call.keep(Fact.NOTHING)
    return Rows(rows.dim, rows.count, facts, blocks=None, extra=rows.more)


def _is_zero(value: object) -> bool:
    return isinstance(value, (bool, int, float)) and value == 0
