"""Operators that move, split, merge or copy entries without computing on them."""

from __future__ import annotations

import sympy

from ..call import Call, depends_on_size, rule
from ..lattice import FREE, Fact, Operand, RefusePadding, Results, Rows
from ..symbolic import product, row_dim, shape_text


@rule(
    "aten::alias",
    "aten::clone",
    "aten::contiguous",
    "aten::detach",
    "aten::permute",
    "aten::squeeze",
    "aten::squeeze.dim",
    "aten::squeeze.dims",
    "aten::t",
    "aten::transpose.int",
    "aten::unsqueeze",
    "aten::view_as_complex",
    "aten::view_as_real",
    "prims::inductor_force_stride_order",
)
def same_entries(call: Call) -> Results:
    """The row dim may get another number; each row keeps its entries."""
    return call.keep(Fact.ALL)


@rule("aten::view", "aten::reshape", "aten::_unsafe_view", sizes=("size", "shape"))
def reshape(call: Call) -> Results:
    """Rows stay whole if the contiguous chunk of entries that makes up a row has the same length before and after."""
    operand, shape = call.only("self"), call.result_shape()
    after = row_dim(shape)
    if operand.rows is FREE or after is None or _chunk(operand.shape) != _chunk(shape):
        raise RefusePadding(f"a reshape of {shape_text(operand.shape)} to {shape_text(shape)} mixes the rows")
    return call.keep(Fact.ALL)


def _chunk(shape: tuple[sympy.Expr, ...]) -> sympy.Expr | None:
    found = row_dim(shape)
    return found and product((found[1], *shape[found[0] + 1 :]))


@rule("aten::view.dtype")
def bitcast(call: Call) -> Results:
    """Other bytes per entry change the last dim, which must not be the row dim."""
    operand = call.only("self")
    if operand.row_dim == len(operand.shape) - 1:
        raise RefusePadding("the entries of the row dim are read as another dtype")
    return call.keep(Fact.ZERO | Fact.REPLICA)


@rule("aten::expand", sizes=("size",))
def expand(call: Call) -> Results:
    """Rows made by expanding a value free of rows are all the same."""
    operand = call.only("self")
    return call.keep(Fact.REPLICA if operand.rows is FREE else Fact.ALL)


@rule("aten::repeat", sizes=("repeats",))
def repeat(call: Call) -> Results:
    """A value free of rows may be repeated once per row; rows may be repeated along other dims."""
    operand, repeats = call.only("self"), call["repeats"]
    if operand.rows is FREE:
        return call.keep(Fact.REPLICA)
    if depends_on_size(repeats) or repeats[operand.rows.dim - len(operand.shape)] != 1:
        raise RefusePadding("repeats the rows")
    return call.keep(Fact.ALL)


@rule("aten::slice.Tensor", sizes=("end",))
def cut(call: Call) -> Results:
    """Of rows: all of them, or a fixed number from the front. Of a value free of rows: its first entries as rows."""
    operand = call["self"]
    dim, start, end, step = operand.dim(call["dim"]), call["start"] or 0, call["end"], call["step"]
    if operand.rows is FREE:
        return _prefix(call, operand, dim)
    if dim != operand.row_dim:
        if depends_on_size(end):
            raise RefusePadding("the padded size reaches values through argument 'end'")
        return call.keep(Fact.ALL)
    if (start, step) == (0, 1) and call.result_shape() == operand.shape:
        return call.keep(Fact.ALL)
    if not row_dim(call.result_shape()) and _is_count(start) and _is_count(end):
        return FREE  # the shape is fixed, so the guards say that there are at least ``end`` real entries
    raise RefusePadding("cuts the rows at a place that is not fixed")


def _prefix(call: Call, operand: Operand, dim: int) -> Rows:
    if not operand.shape[dim].is_Integer:  # guards on fixed sizes are checked per bucket, others say too little
        raise RefusePadding("takes rows out of another dynamic dim", operand.shape[dim].free_symbols)
    return call.keep(Fact.NOTHING)


def _is_count(number: object) -> bool:
    return isinstance(number, int) and number >= 0


@rule("aten::select.int")
def select(call: Call) -> Results:
    """A fixed row counted from the front is a real row (or an error at the exact size, too)."""
    operand = call["self"]
    if operand.dim(call["dim"]) != operand.row_dim:
        return call.keep(Fact.ALL)
    if _is_count(call["index"]):
        return FREE
    raise RefusePadding("selects a row counted from the padded end")


@rule(
    "aten::split.Tensor",
    "aten::split_with_sizes",
    "aten::unbind.int",
    "aten::unsafe_split.Tensor",
    "aten::unsafe_split_with_sizes",
)
def split(call: Call) -> Results:
    """Parts along another dim have all the rows."""
    operand = call["self"]
    if operand.dim(call["dim"]) == operand.row_dim:
        raise RefusePadding("splits the rows")
    return call.each(Fact.ALL)


@rule("aten::cat", "aten::stack")
def cat(call: Call) -> Results:
    """Joined along another dim, the rows stay aligned."""
    operands: list[Operand] = call["tensors"]
    places = {operand.rows and (operand.rows.dim, operand.rows.per) for operand in operands}
    new_dim = str(call.node.target).startswith("aten.stack")
    along = call["dim"] % (len(operands[0].shape) + new_dim)
    if len(places) != 1 or (along == operands[0].row_dim and not new_dim):
        raise RefusePadding("joins rows end to end")
    return call.keep(Fact.REPLICA | Fact.ZERO)


@rule("aten::flip", "aten::roll")
def reorder(call: Call) -> Results:
    """Rows may not move to another place."""
    operand, dims = call["self"], call["dims"]
    if not dims or operand.row_dim in map(operand.dim, dims):
        raise RefusePadding("moves the rows to other places")
    return call.keep(Fact.ALL)


@rule("aten::unfold")
def unfold(call: Call) -> Results:
    """Windows along another dim."""
    operand = call["self"]
    if operand.dim(call["dimension"]) == operand.row_dim:
        raise RefusePadding("windows over the rows")
    return call.keep(Fact.ALL)


@rule("aten::constant_pad_nd")
def pad(call: Call) -> Results:
    """Pads other dims; ``pad`` holds two numbers per dim, last dim first."""
    operand, pads = call["self"], call["pad"]
    before = 2 * (len(operand.shape) - 1 - operand.row_dim)
    if any(pads[before : before + 2]):
        raise RefusePadding("pads the rows")
    return call.keep(Fact.REPLICA | (Fact.ZERO if call["value"] == 0 else Fact.NOTHING))


@rule("aten::tril", "aten::triu")
def triangle(call: Call) -> Results:
    """Each entry is kept or zeroed by its own place."""
    operand = call["self"]
    inner = operand.row_dim >= len(operand.shape) - 2
    return call.keep(Fact.ZERO if inner else Fact.ZERO | Fact.REPLICA)


@rule("aten::as_strided")
def as_strided(call: Call) -> Results:
    """Strides say nothing of rows."""
    raise RefusePadding("strides over rows")
