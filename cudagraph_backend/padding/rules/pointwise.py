"""Operators that compute each entry from the entries at the same place; every operator tagged so comes here."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..call import Call, is_exact, leaves, rule
from ..lattice import FREE, Fact, Operand, RefusePadding, Results, meet

#: Zero in every tensor gives zero, if the other numbers are finite.
_ZERO_FROM_ZEROS = """
    aten.abs aten.asin aten.asinh aten.atan aten.atanh aten.ceil aten.clone aten.copy aten.erf aten.expm1
    aten.floor aten.gelu aten.gelu_backward aten.log1p aten.maximum aten.minimum aten.mul.Scalar aten.mul.Tensor
    aten.neg aten.positive aten.relu aten.round aten.sgn aten.sigmoid_backward aten.sign aten.silu
    aten.silu_backward aten.sin aten.sinh aten.sqrt aten.square aten.tan aten.tanh aten.tanh_backward
    aten.threshold_backward aten.trunc aten._to_copy prims.convert_element_type
"""
#: The same with a tensor on either side (not ``x + 1``).
_ZERO_FROM_TWO_ZEROS = ("aten.add.Tensor", "aten.sub.Tensor")
#: These leave a row's own number as it is.
_COPIES = ("aten.clone", "aten.copy", "aten._to_copy", "prims.convert_element_type")
_NEUTRAL: Mapping[str, int] = {"aten.add.Tensor": 0, "aten.sub.Tensor": 0, "aten.mul.Tensor": 1}
#: With integers, a zero divisor and the most negative dividend are traps, not infinities.
_DIVISIONS = ("aten.div.", "aten.floor_divide", "aten.fmod.", "aten.remainder.", "prims.div.")


@rule(
    "aten::_conj",
    "aten::_neg_view",
    "aten::_prelu_kernel",
    "aten::_to_copy",
    "aten::complex",
    "aten::copy",
    "aten::floor_divide",
    "aten::lift_fresh_copy",
    "aten::masked_fill.Scalar",
    "aten::masked_fill.Tensor",
    "aten::polar",
    "aten::where.Scalar",
    "aten::where.ScalarOther",
    "aten::where.ScalarSelf",
    "aten::where.self",
    "prims::device_put",
    "prims::div",
)
def pointwise(call: Call) -> Results:
    """Computes row by row, if all rows meet at the same dim."""
    meet(*call.operands)
    _check_division(call)
    if isinstance(call.node.meta["val"], (tuple, list)):  # frexp
        return call.each(Fact.REPLICA)
    return call.keep(Fact.REPLICA | _special_facts(call))


@rule("aten::equal")
def equal(call: Call) -> Results:
    """Refuses what torch tags as pointwise, but compares whole tensors."""
    raise RefusePadding("compares padded rows")


def _check_division(call: Call) -> None:
    if not str(call.node.target).startswith(_DIVISIONS) or not is_exact(call.node.meta["val"].dtype):
        return
    dividend, divisor = call["self"], call["other"]
    if isinstance(divisor, int) and divisor > 0:
        return
    operands = [operand for operand in (dividend, divisor) if isinstance(operand, Operand)]
    if all(operand.holds(Fact.REPLICA) for operand in operands):
        return
    for operand in call.aligned(operands):  # 1 / 1, or 1 / n for a real divisor
        call.fill(operand, 1, "divides integers by what padded rows hold")


def _special_facts(call: Call) -> Fact:
    name, operands, facts = str(call.node.target).removesuffix(".default"), call.operands, Fact.NOTHING
    numbers = [leaf for leaf in leaves(call.arguments) if isinstance(leaf, (int, float))]
    zero_from_zeros = name in _ZERO_FROM_ZEROS.split() or (name in _ZERO_FROM_TWO_ZEROS and len(operands) == 2)
    if zero_from_zeros and all(map(math.isfinite, numbers)) and all(o.rows is not FREE for o in operands):
        facts |= Fact.ZERO
    is_neutral = name in _COPIES or (name in _NEUTRAL and call["other"] == _NEUTRAL[name])
    if is_neutral and len(operands) == 1 and call.node.meta["val"].dtype in (torch.int32, torch.int64):
        facts |= Fact.OWN_INDEX
    return facts
