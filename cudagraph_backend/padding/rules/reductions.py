"""Operators that reduce dims, or that normalise over a dim."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..call import Call, is_exact, rule
from ..lattice import FREE, Fact, Filling, Operand, RefusePadding, Results
from ..symbolic import product

#: What the padded rows must hold so that reducing over them gives what the real rows alone give.
_EXACT_OVER_ROWS = {
    "aten::all": Fact.REPLICA,
    "aten::amax": Fact.REPLICA,
    "aten::amin": Fact.REPLICA,
    "aten::any": Fact.REPLICA | Fact.ZERO,
    "aten::count_nonzero": Fact.ZERO,
    "aten::max": Fact.REPLICA,
    "aten::min": Fact.REPLICA,
    "aten::nansum": Fact.ZERO,
    "aten::sum": Fact.ZERO,
}
#: What a mask puts there to the same end.
_NEUTRAL: Mapping[str, Filling] = {
    "aten::all": 1,
    "aten::amax": "lowest",
    "aten::amin": "highest",
    "aten::any": 0,
    "aten::argmax": "lowest",
    "aten::argmin": "highest",
    "aten::count_nonzero": 0,
    "aten::logsumexp": "lowest",
    "aten::max": "lowest",
    "aten::min": "highest",
    "aten::nansum": 0,
    "aten::prod": 1,
    "aten::sum": 0,
}
_PLACES = ("aten::argmax", "aten::argmin")
_ZERO_FROM_ZEROS = ("aten::amax", "aten::amin", "aten::any", "aten::sum")


@rule(
    "aten::all",
    "aten::all.dim",
    "aten::all.dims",
    "aten::amax",
    "aten::amin",
    "aten::any",
    "aten::any.dim",
    "aten::any.dims",
    "aten::argmax",
    "aten::argmin",
    "aten::count_nonzero",
    "aten::count_nonzero.dim_IntList",
    "aten::linalg_vector_norm",
    "aten::logsumexp",
    "aten::max",
    "aten::mean",
    "aten::mean.dim",
    "aten::min",
    "aten::nansum",
    "aten::norm.Scalar",
    "aten::norm.ScalarOpt_dim",
    "aten::norm.ScalarOpt_dim_dtype",
    "aten::prod",
    "aten::prod.dim_int",
    "aten::std.correction",
    "aten::sum",
    "aten::sum.dim_IntList",
    "aten::var.correction",
)
def reduce(call: Call) -> Results:
    """Reduces each row for itself over other dims; over the rows, only what the padded rows can't change."""
    operand, name = call.only("self"), call.operator
    if not over_rows(call):
        return call.keep(Fact.REPLICA | (Fact.ZERO if name in _ZERO_FROM_ZEROS else Fact.NOTHING))
    if not operand.holds(_EXACT_OVER_ROWS.get(name, Fact.NOTHING)):
        is_norm = name == "aten::linalg_vector_norm" and _adds_magnitudes(call["ord"])
        neutral = 0 if is_norm else _NEUTRAL.get(name)
        if neutral is None or (name in _PLACES and not _places_stay(call, operand)):
            raise RefusePadding("reduces over the padded rows")
        call.fill(operand, neutral, "reduces over the padded rows")
    return FREE


@rule("aten::histc")
def histogram(call: Call) -> Results:
    """Counts entries in fixed bins: padded ones are in none."""
    operand = call.only("self")
    if call["min"] == call["max"]:
        raise RefusePadding("takes its bins from the padded rows")
    if is_exact(operand.dtype) and (operand.dtype == torch.bool or call["max"] >= torch.iinfo(operand.dtype).max):
        raise RefusePadding("counts the padded rows")
    call.fill(operand, "highest", "counts the padded rows")
    return FREE


@rule("aten::max.dim", "aten::min.dim")
def extreme(call: Call) -> Results:
    """Finds the extreme and its place: over the rows, if a mask keeps both among the real ones."""
    operand = call.only("self")
    if not over_rows(call):
        return call.each(Fact.REPLICA)
    if not operand.together:
        raise RefusePadding("reduces over the padded rows")
    call.fill(operand, _NEUTRAL[call.operator], "reduces over the padded rows")
    return FREE


@rule(
    "aten::aminmax",
    "aten::kthvalue",
    "aten::median.dim",
    "aten::mode",
    "aten::nanmedian.dim",
    "aten::sort",
    "aten::std_mean.correction",
    "aten::topk",
    "aten::var_mean.correction",
    "prims::prepare_softmax_online",
)
def reduce_to_several(call: Call) -> Results:
    """Computes several results per row, over other dims only."""
    if over_rows(call):
        raise RefusePadding("reduces or sorts over the padded rows")
    return call.each(Fact.REPLICA)


@rule("aten::sort.stable")
def sort(call: Call) -> Results:
    """Sorts each row for itself over another dim, or the rows, if a mask keeps the padded ones behind."""
    operand = call.only("self")
    if not over_rows(call):
        return call.each(Fact.REPLICA)
    if not operand.together or call["stable"] is not True:  # a real row that equals a padded one must stay before it
        raise RefusePadding("reduces or sorts over the padded rows")
    call.fill(operand, "lowest" if call["descending"] else "greatest", "reduces or sorts over the padded rows")
    return call.each(Fact.NOTHING)


@rule(
    "aten::_log_softmax",
    "aten::_log_softmax_backward_data",
    "aten::_safe_softmax",
    "aten::_softmax",
    "aten::_softmax_backward_data",
)
def softmax(call: Call) -> Results:
    """Normalises each row for itself over another dim, or over rows of which the padded ones weigh nothing."""
    operand = call.operands[0]
    if any(other.row_dim != operand.row_dim for other in call.operands):
        raise RefusePadding("rows along different dims meet")
    if operand.dim(call["dim"]) != operand.row_dim:
        return call.keep(Fact.REPLICA)
    is_backward = call.operator.endswith("_backward_data")
    for one in call.aligned(call.operands):
        call.fill(one, 0 if is_backward else "lowest", "normalises over the padded rows")
    return call.keep(Fact.NOTHING)


@rule("aten::glu")
def halves(call: Call) -> Results:
    """Gates one half of another dim by the other half."""
    if over_rows(call):
        raise RefusePadding("gates rows with other rows")
    return call.keep(Fact.REPLICA | Fact.ZERO)


def _adds_magnitudes(order: object) -> bool:
    """Returns whether a norm of this order is as it is without what is zero."""
    return isinstance(order, (int, float)) and order >= 0


def _places_stay(call: Call, operand: Operand) -> bool:
    """Returns whether real entries have the same number among all that are reduced, padded or not."""
    assert operand.rows is not FREE
    return operand.rows.together and (call["dim"] is not None or product(operand.shape[: operand.rows.dim]) == 1)


def over_rows(call: Call) -> bool:
    """Returns whether the reduced dims, all of them if none is named, include the row dim."""
    operand, dims = call.operands[0], call["dim"]
    if dims is None or dims == []:
        return True
    return operand.row_dim in [operand.dim(dim) for dim in ([dims] if isinstance(dims, int) else dims)]
