"""Operators that compute each entry from the entries at the same place; every operator tagged so comes here."""

from __future__ import annotations

import torch

from ..call import Call, rule
from ..lattice import FREE, Fact, Operand, RefusePadding, Results, Rows

#: Zero in every tensor operand gives zero, whatever finite the other arguments are.
_ZERO_FROM_ZEROS = frozenset(
    """aten.abs aten.add.Tensor aten.asin aten.asinh aten.atan aten.atanh aten.ceil aten.clone aten.copy aten.erf
    aten.expm1 aten.floor aten.gelu aten.gelu_backward aten.leaky_relu aten.log1p aten.maximum aten.minimum
    aten.mul.Tensor aten.neg aten.positive aten.relu aten.round aten.sgn aten.sigmoid_backward aten.sign aten.silu
    aten.silu_backward aten.sin aten.sinh aten.sqrt aten.square aten.sub.Tensor aten.tan aten.tanh aten.tanh_backward
    aten.threshold_backward aten.trunc aten._to_copy prims.convert_element_type""".split()
)
#: These hold a row's own number still if nothing is added to it.
_NEUTRAL = {"aten.add.Tensor": 0, "aten.sub.Tensor": 0, "aten.mul.Tensor": 1}
_COPIES = frozenset(("aten.clone", "aten.copy", "aten._to_copy", "prims.convert_element_type"))
_EXACT_INDEX = (torch.int32, torch.int64)
#: With integers a zero divisor is an error or a trap, not an infinity.
_DIVISIONS = ("aten.div.", "aten.remainder.", "aten.fmod.", "aten.floor_divide", "prims.div", "prims.remainder")


@rule(
    "aten::_conj",
    "aten::_neg_view",
    "aten::_prelu_kernel",
    "aten::_to_copy",
    "aten::copy",
    "aten::floor_divide",
    "aten::lift_fresh_copy",
    "aten::masked_fill.Scalar",
    "aten::masked_fill.Tensor",
    "aten::where.Scalar",
    "aten::where.ScalarOther",
    "aten::where.ScalarSelf",
    "aten::where.self",
    "prims::device_put",
)
def pointwise(call: Call) -> Results:
    """Row by row, if all rows meet at the same dim."""
    _rows_meet(call)
    _no_zero_divisor(call)
    name = _name(call)
    facts = Fact.REPLICA
    if _keeps_zero(call, name):
        facts |= Fact.ZERO
    if _keeps_index(call, name):
        facts |= Fact.OWN_INDEX
    if isinstance(call.node.meta["val"], (tuple, list)):  # frexp
        return call.each(Fact.REPLICA)
    if _rounds_to_integer(call):
        facts &= ~Fact.REPLICA
    return call.keep(facts)


@rule("aten::equal")
def equal(call: Call) -> Results:
    """Tagged pointwise by torch, but compares whole tensors."""
    raise RefusePadding("compares padded rows")


def _name(call: Call) -> str:
    return str(call.node.target).removesuffix(".default")


def _rows_meet(call: Call) -> None:
    places = {(operand.row_dim - len(operand.shape), operand.rows.per) for operand in call.operands if operand.rows}
    if len(places) > 1:
        raise RefusePadding("rows along different dims meet")


def _no_zero_divisor(call: Call) -> None:
    divisor = call["other"]
    if not str(call.node.target).startswith(_DIVISIONS) or not isinstance(divisor, Operand):
        return
    if not call.node.meta["val"].dtype.is_floating_point and not divisor.holds(Fact.REPLICA):
        raise RefusePadding("an integer division by what padded rows hold")


def _keeps_zero(call: Call, name: str) -> bool:
    has_rows = all(operand.rows is not FREE for operand in call.operands)
    if name in ("aten.mul.Tensor", "aten.mul.Scalar"):  # by a finite number
        return has_rows and abs(_number(call["other"], 1)) < float("inf")
    if name in ("aten.add.Tensor", "aten.sub.Tensor"):
        return has_rows and isinstance(call["other"], Operand) and abs(_number(call["alpha"], 1)) < float("inf")
    return has_rows and name in _ZERO_FROM_ZEROS


def _keeps_index(call: Call, name: str) -> bool:
    copied = name in _COPIES or (name in _NEUTRAL and call["other"] == _NEUTRAL[name])
    return copied and len(call.operands) == 1 and call.node.meta["val"].dtype in _EXACT_INDEX


def _rounds_to_integer(call: Call) -> bool:
    """A replica equal up to rounding may round to another integer, which is then no replica."""
    to_integer = not call.node.meta["val"].dtype.is_floating_point and call.node.meta["val"].dtype != torch.bool
    return to_integer and any(o.rows and o.dtype.is_floating_point for o in call.operands) and not _is_constant(call)


def _is_constant(call: Call) -> bool:
    return all(isinstance(o.rows, Rows) and o.rows.holds & Fact.ZERO for o in call.operands)


def _number(argument: object, otherwise: float) -> float:
    return argument if isinstance(argument, (int, float)) else otherwise
