"""Operators that move, split, merge or copy entries without computing on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy

from ..call import Call, depends_on_size, one_line, rule
from ..lattice import FREE, Fact, Operand, RefusePadding, Results, Rows, common, in_blocks, in_order
from ..symbolic import ROWS, RowDim, product, shape_text, whole


@rule(
    "aten::alias",
    "aten::clone",
    "aten::contiguous",
    "aten::detach",
    "aten::squeeze",
    "aten::squeeze.dim",
    "aten::squeeze.dims",
    "aten::unsqueeze",
    "aten::view_as_complex",
    "aten::view_as_real",
    "prims::inductor_force_stride_order",
)
def same_entries(call: Call) -> Results:
    """Keeps each row's entries; the row dim may get another number."""
    return call.keep(Fact.ALL)


@rule("aten::permute", "aten::t", "aten::transpose.int")
def permute(call: Call) -> Results:
    """Changes the order of dims."""
    operand = call.only("self")
    assert operand.row_dim is not None
    order = list(range(len(operand.shape)))
    if call.operator == "aten::permute":
        order = [operand.dim(dim) for dim in call["dims"]]
    elif len(order) > 1:
        first, second = (0, 1) if call.operator == "aten::t" else (operand.dim(call["dim0"]), operand.dim(call["dim1"]))
        order[first], order[second] = order[second], order[first]
    return call.keep(Fact.ALL, dim=order.index(operand.row_dim))


@rule("aten::view", "aten::reshape", "aten::_unsafe_view", sizes=("size", "shape"))
def reshape(call: Call) -> Results:
    """Reshapes rows, which in memory are blocks of ``n`` chunks of entries; blocks and chunks must stay whole."""
    operand, shape, after = call.only("self"), call.result_shape(), call.result_dim()
    try:
        return _reshaped(operand, shape, after)
    except RefusePadding:
        text = f"a reshape of {shape_text(operand.shape)} to {shape_text(shape)} mixes the rows"
        raise RefusePadding(text) from None


def _reshaped(operand: Operand, shape: Sequence[sympy.Expr], after: RowDim | None) -> Rows:
    rows, mixes = operand.rows, "mixes the rows"
    if rows is FREE or after is None:
        raise RefusePadding(mixes)
    dim, before = after.dim, product(operand.shape[: rows.dim])
    if rows.blocks is None:  # any division will do: the one that the result's dims have
        blocks = product(shape[:dim]) / before
        rows = in_blocks(rows, blocks) if blocks.is_integer else in_order(rows)
    within, within_after = product(operand.shape[rows.dim + 1 :]), product(shape[dim + 1 :])
    assert rows.blocks is not None
    return Rows(
        dim,
        per=whole(product((rows.per, within)), within_after, mixes),
        holds=rows.holds,
        blocks=whole(product((before, rows.blocks)), product(shape[:dim]), mixes),
        extra=whole(product((rows.extra, within)), within_after, mixes),
    )


@rule("aten::view.dtype")
def bitcast(call: Call) -> Results:
    """Changes the last dim by reading other bytes per entry; it must not be the row dim."""
    operand = call.only("self")
    if operand.row_dim == len(operand.shape) - 1:
        raise RefusePadding("the entries of the row dim are read as another dtype")
    return call.keep(Fact.ZERO | Fact.REPLICA)


@rule("aten::expand", sizes=("size",))
def expand(call: Call) -> Results:
    """Expands other dims, or a value free of rows to rows that are all the same."""
    operand = call.only("self")
    if operand.rows is FREE:
        return replace(call.keep(Fact.REPLICA), blocks=None)
    return call.keep(Fact.ALL, dim=operand.rows.dim + len(call.node.meta["val"].shape) - len(operand.shape))


@rule("aten::repeat", sizes=("repeats",))
def repeat(call: Call) -> Results:
    """Repeats a value free of rows once per row, or rows along other dims."""
    operand, repeats = call.only("self"), call["repeats"]
    if operand.rows is FREE:
        return in_order(call.keep(Fact.REPLICA))
    if depends_on_size(repeats) or repeats[operand.place] != 1:
        raise RefusePadding("repeats the rows")
    return call.keep(Fact.ALL)


@rule("aten::slice.Tensor", sizes=("start", "end"))
def cut(call: Call) -> Results:
    """Cuts rows into whole blocks, or at a fixed place; of a value free of rows, takes the first entries as rows."""
    operand = call["self"]
    dim, start, step = operand.dim(call["dim"]), call["start"] or 0, call["step"]
    if operand.rows is FREE:
        return _prefix(call, operand, dim)
    if dim != operand.row_dim:
        return call.keep(Fact.ALL, dim=operand.row_dim)
    rows, left = operand.rows, call.result_dim()
    if left is None and rows.together and _is_count(start) and _is_count(call["end"]):
        return FREE  # the shape is fixed, so the guards say that there are at least ``end`` real entries
    if left is None or step != 1:
        raise RefusePadding("cuts the rows at a place that is not fixed")
    if rows.together and _is_count(start) and (start != 0 or left.more != 0 or rows.extra != 0):
        return Rows(rows.dim, left.count, extra=left.more)  # what is left at the exact size comes from real rows
    if rows.extra != 0:
        raise RefusePadding("cuts the rows at a place that is not fixed")
    return _blocks(rows, start, left.count)


def _prefix(call: Call, operand: Operand, dim: int) -> Rows:
    if depends_on_size(call["start"]):
        raise RefusePadding("rows start at a place that depends on the padded size")
    if not operand.shape[dim].is_Integer:  # guards on fixed sizes are checked per bucket, others say too little
        raise RefusePadding("takes rows out of another dynamic dim", operand.shape[dim].free_symbols)
    return in_order(call.keep(Fact.NOTHING))


def _blocks(rows: Rows, start: sympy.Expr | int, count: sympy.Expr) -> Rows:
    """Takes whole blocks of ``rows`` only: those from entry ``start``, with ``count`` entries per row."""
    whole(sympy.sympify(start), rows.per * ROWS, "cuts the rows at a place that is not fixed")
    return replace(rows, blocks=whole(count, rows.per, "cuts the rows at a place that is not fixed"))


def _is_count(number: object) -> bool:
    return isinstance(number, int) and number >= 0


@rule("aten::select.int")
def select(call: Call) -> Results:
    """Selects a fixed row counted from the front, which is a real row (or an error at the exact size, too)."""
    operand = call["self"]
    if operand.dim(call["dim"]) != operand.row_dim:
        return call.keep(Fact.ALL)
    if operand.rows.together and _is_count(call["index"]):
        return FREE
    raise RefusePadding("selects a row counted from the padded end")


@rule(
    "aten::split.Tensor",
    "aten::split_with_sizes",
    "aten::unbind.int",
    "aten::unsafe_split.Tensor",
    "aten::unsafe_split_with_sizes",
    sizes=("split_size", "split_sizes"),
)
def split(call: Call) -> Results:
    """Splits another dim into parts that have all the rows, or the rows into parts of whole blocks."""
    operand = call["self"]
    if operand.dim(call["dim"]) != operand.row_dim:
        return call.each(Fact.ALL)
    parts, start = [], sympy.S.Zero
    for val in call.node.meta["val"]:
        size = call.sizes.shape(val)[operand.row_dim]
        parts.append(_blocks(operand.rows, start, whole(size, ROWS, "splits the rows at a fixed place")))
        start += size
    return tuple(parts)


@rule("aten::cat", "aten::stack")
def cat(call: Call) -> Results:
    """Joins operands along another dim, where the rows stay aligned, or end to end, where they become blocks."""
    operands: list[Operand] = call["tensors"]
    rows = [operand.rows for operand in operands if operand.rows]
    if len({one.dim for one in rows}) > 1:
        raise RefusePadding("rows along different dims meet")
    along_rows = call.operator == "aten::cat" and operands[0].dim(call["dim"]) == rows[0].dim
    if along_rows and len(rows) == 1 and operands[-1].rows and rows[0].together:
        return replace(call.keep(Fact.NOTHING), per=rows[0].count, blocks=sympy.S.One)  # behind what is free of rows
    if len(rows) < len(operands):
        raise RefusePadding("rows along different dims meet")
    if not along_rows:
        return call.keep(Fact.REPLICA | Fact.ZERO)
    if len({one.per for one in rows}) > 1 or any(one.extra != 0 for one in rows):
        raise RefusePadding("joins rows of different length end to end")
    blocks = sum(one.count for one in rows) / rows[0].per
    return Rows(rows[0].dim, rows[0].per, common(*operands) & ~Fact.OWN_INDEX, blocks)


@rule("aten::flip", "aten::roll", "prims::rev")
def reorder(call: Call) -> Results:
    """Reorders entries along other dims: rows may not move to another place."""
    operand, dims = call.operands[0], call["dims"]
    if not dims or operand.row_dim in [operand.dim(dim) for dim in dims]:
        raise RefusePadding("moves the rows to other places")
    return call.keep(Fact.ALL)


@rule("aten::unfold")
def unfold(call: Call) -> Results:
    """Takes windows along another dim, or of rows one by one: the real ones of these end at the last real row."""
    operand = call["self"]
    if operand.dim(call["dimension"]) != operand.row_dim:
        return call.keep(Fact.ALL, dim=operand.row_dim)
    if call["step"] != 1 or not operand.rows.together:
        raise RefusePadding("windows over the rows")
    return in_order(call.keep(Fact.NOTHING, dim=operand.row_dim))


@rule("aten::constant_pad_nd", sizes=("pad",))
def pad(call: Call) -> Results:
    """Pads other dims, or the rows in front; ``pad`` holds two numbers per dim, last dim first."""
    operand, pads = call["self"], call["pad"]
    if depends_on_size(pads):
        return RefusePadding("pads behind the rows")
    place = 2 * (len(operand.shape) - 1 - operand.row_dim)
    before, behind = pads[place : place + 2] or (0, 0)
    if (before, behind) == (0, 0):
        return call.keep(Fact.REPLICA | (Fact.ZERO if call["value"] == 0 else Fact.NOTHING))
    if not (isinstance(behind, int) and behind <= 0) or not operand.rows.together:
        return RefusePadding("pads behind the rows")
    return in_order(call.keep(Fact.NOTHING))


@rule("aten::tril", "aten::triu")
def triangle(call: Call) -> Results:
    """Keeps or zeroes each entry by its own place."""
    operand = call["self"]
    inner = operand.row_dim >= len(operand.shape) - 2
    if inner and not operand.rows.together:
        raise RefusePadding("rows are at other places when padded")
    return in_order(call.keep(Fact.ZERO)) if inner else call.keep(Fact.ZERO | Fact.REPLICA)


@rule("aten::as_strided", sizes=("size", "stride"))
def as_strided(call: Call) -> Results:
    """Reshapes, if all entries in memory are read in order; otherwise strides say nothing of rows."""
    operand = call.only("self")
    val = call.node.args[0].meta["val"]  # type: ignore[union-attr]
    strides = [call.sizes.expr(stride) for stride in val.stride()]
    dense = is_dense(operand.shape, strides) and is_dense(call["size"], call["stride"])
    if call["storage_offset"] is not None or not dense or product(operand.shape) != product(call["size"]):
        raise RefusePadding("strides over rows")
    return reshape(call)


def is_dense(shape: Sequence[Any], strides: Sequence[Any]) -> bool:
    """Returns whether the entries lie in memory one after the other, the last dim's next to each other."""
    expected = sympy.S.One
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and sympy.expand(stride - expected) != 0:
            return False
        expected = sympy.expand(expected * size)
    return True


@rule("aten::diagonal")
def diagonal(call: Call) -> Results:
    """Takes the diagonal over two other dims."""
    if call["self"].row_dim in _diagonal_dims(call):
        raise RefusePadding("a diagonal over the rows")
    return call.keep(Fact.ALL)


def _diagonal_dims(call: Call) -> tuple[int, int]:
    return call["self"].dim(call["dim1"]), call["self"].dim(call["dim2"])


@rule("aten::diagonal_scatter", line=one_line)
def write_diagonal(call: Call) -> Results:
    """Writes the diagonal over two other dims, which in ``src`` is the last dim."""
    operand, source, dims = call["self"], call["src"], _diagonal_dims(call)
    if operand.rows is FREE or operand.row_dim in dims:
        raise RefusePadding("a diagonal over the rows")
    if source.row_dim != operand.row_dim - sum(dim < operand.row_dim for dim in dims):
        raise RefusePadding("rows along different dims meet")
    return call.keep(Fact.REPLICA | Fact.ZERO)
