"""Operators that reduce dims, or that normalise over a dim."""

from __future__ import annotations

from ..call import Call, rule
from ..lattice import FREE, Fact, RefusePadding, Results

#: What the padded rows must hold so that reducing over them gives what the real rows alone give.
_EXACT_OVER_ROWS = {
    "aten::all": Fact.REPLICA,
    "aten::amax": Fact.REPLICA,
    "aten::amin": Fact.REPLICA,
    "aten::any": Fact.REPLICA | Fact.ZERO,
    "aten::max": Fact.REPLICA,
    "aten::min": Fact.REPLICA,
    "aten::sum": Fact.ZERO,
}
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
    """Over other dims each row is reduced for itself; over the rows only what the padded rows can't change."""
    operand, name = call.only("self"), call.operator
    if not over_rows(call):
        return call.keep(Fact.REPLICA | (Fact.ZERO if name in _ZERO_FROM_ZEROS else Fact.NOTHING))
    if not operand.holds(_EXACT_OVER_ROWS.get(name, Fact.NOTHING)):
        raise RefusePadding("reduces over the padded rows")
    return FREE


@rule(
    "aten::aminmax",
    "aten::kthvalue",
    "aten::max.dim",
    "aten::median.dim",
    "aten::min.dim",
    "aten::mode",
    "aten::nanmedian.dim",
    "aten::sort",
    "aten::sort.stable",
    "aten::std_mean.correction",
    "aten::topk",
    "aten::var_mean.correction",
    "prims::prepare_softmax_online",
)
def reduce_to_several(call: Call) -> Results:
    """Several results per row, over other dims only."""
    if over_rows(call):
        raise RefusePadding("reduces or sorts over the padded rows")
    return call.each(Fact.REPLICA)


@rule(
    "aten::_log_softmax",
    "aten::_log_softmax_backward_data",
    "aten::_safe_softmax",
    "aten::_softmax",
    "aten::_softmax_backward_data",
)
def softmax(call: Call) -> Results:
    """Normalises each row for itself over another dim."""
    operand = call.operands[0]
    if any(other.row_dim != operand.row_dim for other in call.operands):
        raise RefusePadding("rows along different dims meet")
    if operand.dim(call["dim"]) == operand.row_dim:
        raise RefusePadding("normalises over the padded rows")
    return call.keep(Fact.REPLICA)


@rule("aten::glu")
def halves(call: Call) -> Results:
    """One half of another dim gates the other."""
    if over_rows(call):
        raise RefusePadding("gates rows with other rows")
    return call.keep(Fact.REPLICA | Fact.ZERO)


def over_rows(call: Call) -> bool:
    """Whether the reduced dims, all of them if none is named, include the row dim."""
    operand, dims = call.operands[0], call["dim"]
    if dims is None or dims == []:
        return True
    return operand.row_dim in [operand.dim(dim) for dim in ([dims] if isinstance(dims, int) else dims)]
