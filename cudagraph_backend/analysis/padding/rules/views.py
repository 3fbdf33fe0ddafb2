"""Operators that move, split, merge or copy entries without computing on them."""

from __future__ import annotations

from dataclasses import replace

import sympy

from ..call import Call, depends_on_size, rule
from ..lattice import FREE, Fact, Operand, RefusePadding, Results, Rows, common, in_order
from ..symbolic import ROWS, product, row_dim, shape_text, whole


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
    """In memory, rows are blocks of ``n`` chunks of entries; a reshape must keep blocks and chunks whole."""
    operand, shape = call.only("self"), call.result_shape()
    mixes = f"a reshape of {shape_text(operand.shape)} to {shape_text(shape)} mixes the rows"
    after, rows = row_dim(shape), operand.rows
    if rows is FREE or after is None:
        raise RefusePadding(mixes)
    blocks = product((*operand.shape[: rows.dim], rows.count / rows.per))
    chunk = product((rows.per, *operand.shape[rows.dim + 1 :]))
    dim = after[0]
    return Rows(
        dim,
        per=whole(chunk, product(shape[dim + 1 :]), mixes),
        holds=rows.holds,
        blocks=whole(blocks, product(shape[:dim]), mixes),
    )


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
    if operand.rows is FREE:
        return replace(call.keep(Fact.REPLICA), blocks=None)
    return call.keep(Fact.ALL)


@rule("aten::repeat", sizes=("repeats",))
def repeat(call: Call) -> Results:
    """A value free of rows may be repeated once per row; rows may be repeated along other dims."""
    operand, repeats = call.only("self"), call["repeats"]
    if operand.rows is FREE:
        return in_order(call.keep(Fact.REPLICA))
    if depends_on_size(repeats) or repeats[operand.place] != 1:
        raise RefusePadding("repeats the rows")
    return call.keep(Fact.ALL)


@rule("aten::slice.Tensor", sizes=("start", "end"))
def cut(call: Call) -> Results:
    """Of rows: whole blocks, or a fixed number from the front. Of a value free of rows: its first entries as rows."""
    operand = call["self"]
    dim, start, step = operand.dim(call["dim"]), call["start"] or 0, call["step"]
    if operand.rows is FREE:
        return _prefix(call, operand, dim)
    if dim != operand.row_dim:
        return call.keep(Fact.ALL)
    rows, left = operand.rows, row_dim(call.result_shape())
    if left is None and rows.together and _is_count(start) and _is_count(call["end"]):
        return FREE  # the shape is fixed, so the guards say that there are at least ``end`` real entries
    if left is None or step != 1:
        raise RefusePadding("cuts the rows at a place that is not fixed")
    return _blocks(rows, start, left[1])


def _prefix(call: Call, operand: Operand, dim: int) -> Rows:
    if depends_on_size(call["start"]):
        raise RefusePadding("rows start at a place that depends on the padded size")
    if not operand.shape[dim].is_Integer:  # guards on fixed sizes are checked per bucket, others say too little
        raise RefusePadding("takes rows out of another dynamic dim", operand.shape[dim].free_symbols)
    return in_order(call.keep(Fact.NOTHING))


def _blocks(rows: Rows, start: sympy.Expr | int, count: sympy.Expr) -> Rows:
    """Of ``rows``, whole blocks only: those from entry ``start``, with ``count`` entries per row."""
    whole(sympy.sympify(start), rows.per * ROWS, "cuts the rows at a place that is not fixed")
    return replace(rows, blocks=whole(count, rows.per, "cuts the rows at a place that is not fixed"))


def _is_count(number: object) -> bool:
    return isinstance(number, int) and number >= 0


@rule("aten::select.int")
def select(call: Call) -> Results:
    """A fixed row counted from the front is a real row (or an error at the exact size, too)."""
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
    """Parts along another dim have all the rows; along the rows, a part is whole blocks."""
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
    """Joined along another dim, the rows stay aligned; joined end to end, they become blocks."""
    operands: list[Operand] = call["tensors"]
    rows = [operand.rows for operand in operands if operand.rows]
    if len(rows) < len(operands) or len({one.dim for one in rows}) > 1:
        raise RefusePadding("rows along different dims meet")
    new_dim = str(call.node.target).startswith("aten.stack")
    if new_dim or operands[0].dim(call["dim"]) != rows[0].dim:
        return call.keep(Fact.REPLICA | Fact.ZERO)
    if len({one.per for one in rows}) > 1:
        raise RefusePadding("joins rows of different length end to end")
    blocks = sum(one.count for one in rows) / rows[0].per
    return Rows(rows[0].dim, rows[0].per, common(*operands) & ~Fact.OWN_INDEX, blocks)


@rule("aten::flip", "aten::roll", "prims::rev")
def reorder(call: Call) -> Results:
    """Rows may not move to another place."""
    operand, dims = call.operands[0], call["dims"]
    if not dims or operand.row_dim in [operand.dim(dim) for dim in dims]:
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
    if inner and not operand.rows.together:
        raise RefusePadding("rows are at other places when padded")
    return in_order(call.keep(Fact.ZERO)) if inner else call.keep(Fact.ZERO | Fact.REPLICA)


@rule("aten::as_strided")
def as_strided(call: Call) -> Results:
    """Strides say nothing of rows."""
    raise RefusePadding("strides over rows")


@rule("aten::diagonal")
def diagonal(call: Call) -> Results:
    """The diagonal over two other dims."""
    if call["self"].row_dim in _diagonal_dims(call):
        raise RefusePadding("a diagonal over the rows")
    return call.keep(Fact.ALL)


def _diagonal_dims(call: Call) -> tuple[int, int]:
    return call["self"].dim(call["dim1"]), call["self"].dim(call["dim2"])


@rule("aten::diagonal_scatter")
def write_diagonal(call: Call) -> Results:
    """Writes the diagonal over two other dims, which in ``src`` is the last dim."""
    operand, source, dims = call["self"], call["src"], _diagonal_dims(call)
    if operand.rows is FREE or operand.row_dim in dims:
        raise RefusePadding("a diagonal over the rows")
    if source.row_dim != operand.row_dim - sum(dim < operand.row_dim for dim in dims):
        raise RefusePadding("rows along different dims meet")
    return call.keep(Fact.REPLICA | Fact.ZERO)
