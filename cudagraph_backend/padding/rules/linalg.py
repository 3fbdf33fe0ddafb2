"""Linear algebra on batches of matrices: rows along the batch, or along the columns of a right-hand side.

Left out on purpose: factors that are unique up to a sign or a phase only (eigenvectors, singular vectors, Q and R).
Which of them a library returns may depend on how many matrices it gets.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from ..call import Call, one_line, rule
from ..lattice import FREE, Fact, Operand, RefusePadding, Results, Rows

#: How many last dims of each tensor belong to one matrix, vector or list of pivots.
_INNER: Mapping[str, Mapping[str, int]] = {
    "aten::_cholesky_solve_helper": {"self": 2, "A": 2},
    "aten::_linalg_det": {"A": 2},
    "aten::_linalg_eigh": {"A": 2},
    "aten::_linalg_eigvals": {"self": 2},
    "aten::_linalg_slogdet": {"A": 2},
    "aten::_linalg_solve_ex": {"A": 2, "B": 2},
    "aten::_linalg_svd": {"A": 2},
    "aten::cholesky": {"self": 2},
    "aten::cholesky_inverse": {"self": 2},
    "aten::cholesky_solve": {"self": 2, "input2": 2},
    "aten::linalg_cholesky_ex": {"self": 2},
    "aten::linalg_eigvals": {"self": 2},
    "aten::linalg_householder_product": {"input": 2, "tau": 1},
    "aten::linalg_inv_ex": {"A": 2},
    "aten::linalg_ldl_factor_ex": {"self": 2},
    "aten::linalg_ldl_solve": {"LD": 2, "pivots": 1, "B": 2},
    "aten::linalg_lu": {"A": 2},
    "aten::linalg_lu_factor_ex": {"A": 2},
    "aten::linalg_lu_solve": {"LU": 2, "pivots": 1, "B": 2},
    "aten::linalg_matrix_exp": {"self": 2},
    "aten::linalg_solve_triangular": {"self": 2, "B": 2},
    "aten::lu_unpack": {"LU_data": 2, "LU_pivots": 1},
    "aten::ormqr": {"self": 2, "input2": 1, "input3": 2},
    "aten::triangular_solve": {"self": 2, "A": 2},
}


@rule(
    "aten::_linalg_det",
    "aten::_linalg_slogdet",
    "aten::linalg_cholesky_ex",
    "aten::linalg_householder_product",
    "aten::linalg_inv_ex",
    "aten::linalg_ldl_factor_ex",
    "aten::linalg_lu",
    "aten::linalg_lu_factor_ex",
    line=one_line,
)
def each_matrix(call: Call) -> Results:
    """Allows rows along the batch. A matrix of anything does no harm, unless errors are to be raised."""
    if call["check_errors"]:
        return each_proper_matrix(call)
    return _batched(call)


@rule(
    "aten::_linalg_eigvals",
    "aten::cholesky",
    "aten::cholesky_inverse",
    "aten::linalg_eigvals",
    "aten::linalg_ldl_solve",
    "aten::linalg_matrix_exp",
    "aten::lu_unpack",
    "aten::ormqr",
    line=one_line,
)
def each_proper_matrix(call: Call) -> Results:
    """Allows replicas along the batch: what is no number, no valid pivot or has no inverse raises an error or worse."""
    if not all(operand.holds(Fact.REPLICA) for operand in call.operands):
        raise RefusePadding("what padded rows hold may be no proper matrix")
    return _batched(call)


@rule("aten::_linalg_eigh", "aten::_linalg_svd", line=one_line)
def each_spectrum(call: Call) -> Results:
    """Computes eigenvalues or singular values, but no vectors, for rows along the batch."""
    if call["compute_v"] or call["compute_uv"]:
        raise RefusePadding("eigenvectors and singular vectors are unique up to a sign only")
    return each_proper_matrix(call)


@rule(
    "aten::_cholesky_solve_helper",
    "aten::_linalg_solve_ex",
    "aten::cholesky_solve",
    "aten::linalg_lu_solve",
    "aten::linalg_solve_triangular",
    "aten::triangular_solve",
    line=one_line,
)
def solve(call: Call) -> Results:
    """Solves systems with rows along the batch; or one system for each column of the right-hand side."""
    side = _right_hand_side(call)
    others = [operand for operand in call.operands if operand is not side]
    is_picky = call["check_errors"] or call["pivots"] is not None
    if is_picky and not all(operand.holds(Fact.REPLICA) for operand in others):
        raise RefusePadding("what padded rows hold may be no proper matrix")
    vectors = call.operator == "aten::_linalg_solve_ex" and len(side.shape) < len(call["A"].shape)
    by_column = side.place == -1 and call["left"] is not False and not vectors
    if by_column and all(operand.rows is None for operand in others):
        return _results(call)
    return _batched(call, {"B": 1} if vectors else {})


def _right_hand_side(call: Call) -> Operand:
    side: Operand = call["self"] if call["B"] is None else call["B"]
    return side


def _batched(call: Call, instead: Mapping[str, int] | None = None) -> Results:
    inner = {**_INNER[call.operator], **(instead or {})}
    call.only(*inner)
    batch = {call[name].place + count for name, count in inner.items() if call[name].place is not None}
    if len(batch) != 1 or max(batch) >= 0:
        raise RefusePadding("works over the padded rows")
    (place,) = batch
    for name, count in inner.items():
        call[name].check_place(place - count)
    return _results(call)


def _results(call: Call) -> Results:
    several = isinstance(call.node.meta["val"], (list, tuple))
    return call.each(Fact.REPLICA) if several else call.keep(Fact.REPLICA)


@rule("aten::linalg_cross")
def cross(call: Call) -> Results:
    """Computes the three entries along ``dim`` together."""
    operand, other = call["self"], call["other"]
    for each in (operand, other):
        each.check_place(_place(operand, other))
    if _place(operand, other) == operand.dim(call["dim"]) - len(operand.shape):
        raise RefusePadding("works over the padded rows")
    return call.keep(Fact.REPLICA | Fact.ZERO)


def _place(*operands: Operand) -> int:
    return next(operand.place for operand in operands if operand.place is not None)


def _of_distance(call: Call, name: str, operand: Operand, rows: Rows) -> Hashable:
    """Names a row dim: the points of either set, which in distances are the last two dims, or one of the batch."""
    place = rows.dim - len(operand.shape)
    if name == "x2" and place == -2:
        return -1
    return "coordinates" if name in ("x1", "x2") and place == -1 else place


@rule("aten::_cdist_forward", line=_of_distance)
def distances(call: Call) -> Results:
    """Measures the distance of each point of one set from each of the other."""
    first, second = call["x1"], call["x2"]
    by_point = -2 in (first.place, second.place)
    if by_point and call["p"] == 2 and call["compute_mode"] in (None, 0):
        raise RefusePadding("from 25 rows on, distances are computed in another, less exact way")
    if second.place == -2 and first.rows is FREE:
        return call.keep(Fact.REPLICA, second, dim=len(call.result_shape()) - 1)
    if first.place == -2 and second.rows is FREE:
        return call.keep(Fact.REPLICA, first, dim=len(call.result_shape()) - 2)
    for each in (first, second):
        each.check_place(_place(first, second))
    if _place(first, second) >= -2:
        raise RefusePadding("works over the padded rows")
    return call.keep(Fact.REPLICA)


@rule("aten::_cdist_backward", line=_of_distance)
def gradients_of_distances(call: Call) -> Results:
    """Sums for each point of the first set what its distances from the second one's points give."""
    grad, first, second, distance = (call[name] for name in ("grad", "x1", "x2", "cdist"))
    if first.place == grad.place == distance.place and second.rows is FREE and first.place is not None:
        return call.keep(Fact.NOTHING, first)
    if first.place is None and second.place == -2 and grad.place == distance.place == -1:
        grad, second, distance = call.aligned([grad, second, distance])
        call.fill(grad, 0, "sums over the padded rows")
        for operand in (second, distance):  # finite, and as far apart as a real point
            if not operand.holds(Fact.REPLICA):
                call.fill(operand, "last", "sums over the padded rows")
        return FREE
    if first.place is None or len({first.place, second.place, grad.place, distance.place}) > 1:
        raise RefusePadding("works over the padded rows")
    return call.keep(Fact.NOTHING)
