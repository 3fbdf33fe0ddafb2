"""Matrix products, by the letters of their dims."""

from __future__ import annotations

from ..call import Call, one_line, rule
from ..lattice import FREE, Fact, Operand, RefusePadding, Results, Rows

_LETTERS = {
    "aten::_int_mm": ("self mk", "mat2 kn", "mn"),
    "aten::addbmm": ("batch1 bmk", "batch2 bkn", "mn"),
    "aten::addmm": ("mat1 mk", "mat2 kn", "mn"),
    "aten::addmv": ("mat mk", "vec k", "m"),
    "aten::baddbmm": ("batch1 bmk", "batch2 bkn", "bmn"),
    "aten::bmm": ("self bmk", "mat2 bkn", "bmn"),
    "aten::dot": ("self k", "tensor k", ""),
    "aten::mm": ("self mk", "mat2 kn", "mn"),
    "aten::mv": ("self mk", "vec k", "m"),
    "aten::vdot": ("self k", "other k", ""),
}
_ADDED = "self"


def _letter(call: Call, name: str, operand: Operand, rows: Rows) -> str:
    *factors, result = _LETTERS[call.operator]
    letters = dict(map(str.split, factors)).get(name)
    return letters[rows.dim] if letters else result[rows.dim - len(operand.shape)]


@rule("aten::_int_mm", "aten::bmm", "aten::dot", "aten::mm", "aten::mv", "aten::vdot", line=_letter)
def product(call: Call) -> Results:
    """Allows rows along a dim that stays, or zeros on both sides of a dim that is summed over."""
    return _contract(call, FREE)


@rule("aten::addbmm", "aten::addmm", "aten::addmv", "aten::baddbmm", line=_letter)
def product_and_sum(call: Call) -> Results:
    """Adds a :func:`product` to a tensor whose rows, if it has any, must be the product's."""
    added: Operand = call[_ADDED]
    result = _contract(call, added)
    if result is FREE and added.rows is not FREE:
        raise RefusePadding("a product free of rows is added to rows")
    return result


def _contract(call: Call, added: Operand | None) -> Results:
    *factors, result = _LETTERS[call.operator]
    operands = {letters: call[name] for name, letters in map(str.split, factors)}
    found = {letters[operand.rows.dim] for letters, operand in operands.items() if operand.rows}
    if added is not None and added.place is not None:
        found.add(result[added.place])
    if len(found) != 1 or any((found & set(letters)) and not operand.rows for letters, operand in operands.items()):
        raise RefusePadding("rows along different dims meet")
    (letter,) = found
    summed = [operand for operand in operands.values() if operand.rows]
    if letter in result:
        if added is not None:
            added.check_place(result.index(letter) - len(result))
        return call.keep(Fact.REPLICA, dim=result.index(letter))
    for operand in call.aligned(summed):  # all, as zero times infinity is not zero
        if not operand.holds(Fact.ZERO):
            call.fill(operand, 0, "sums products over the padded rows")
    return FREE


@rule("aten::_grouped_mm", "transformers::grouped_mm_fallback", line=one_line)
def grouped_product(call: Call) -> Results:
    """Multiplies each group of rows with a matrix of its own, or sums over each group; ``offs`` says where groups end.

    Rows behind the last group are in none.
    """
    left, right, ends = [*call.arguments.values()][:3]
    _groups_stay(ends, left, right)
    if call["bias"] is not None:
        raise RefusePadding("the groups depend on the padded rows")
    if left.row_dim == 0 and len(left.shape) == 2 and len(right.shape) == 3 and right.rows is FREE:
        return call.keep(Fact.NOTHING, left)
    if left.row_dim != 1 or right.row_dim != 0 or len(left.shape) != 2 or len(right.shape) != 2:
        raise RefusePadding("rows along different dims meet")
    for operand in call.aligned([left, right]):
        call.fill(operand, 0, "sums products over the padded rows")
    return FREE


@rule("transformers::grouped_mm_fallback_backward", line=one_line)
def grouped_product_backward(call: Call) -> Results:
    """Multiplies each group's gradients with the group's matrix, and sums their products with the group's rows."""
    rows, grad = call.only("input", "grad_output"), call["grad_output"]
    _groups_stay(call["offs"], rows, grad)
    if rows.row_dim != 0 or grad.row_dim != 0:
        raise RefusePadding("rows along different dims meet")
    for operand in call.aligned([rows, grad]):
        call.fill(operand, 0, "sums products over the padded rows")
    return (call.each(Fact.NOTHING)[0], FREE)


def _groups_stay(ends: Operand | None, *operands: Operand) -> None:
    """Refuses groups of other rows than at the exact size: their ends are numbers of rows."""
    if ends is None or ends.rows is not FREE or not all(operand.together for operand in operands):
        raise RefusePadding("the groups depend on the padded rows")
