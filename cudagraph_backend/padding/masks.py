"""Operators put in front of an operator's argument, so that padded rows hold what its rule needs, and are never picked.

A sum over rows is exact if the padded ones are zero, a maximum if they are minus infinity, a look-up if they are valid
indices. Where nothing shows that they are, the operand is replaced by ``where(row < n, operand, filling)``. Where rows
are picked by number, the numbers are those of real rows: negative ones count from the last real row, and what is
outside stays outside, so that it raises as at the exact size. ``n``, the number of real rows, is an input of the graph.
Inductor fuses this with what makes or reads the operand. At the exact size it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import count
from typing import Any

import sympy
import torch
from torch.fx import Node, Proxy, map_arg

from cudagraph_backend.torch_internals import expr

from .call import Edit, Mask, RowNumbers
from .editor import Editor, value
from .lattice import Filling, Rows, in_order

aten = torch.ops.aten


def insert(editor: Editor, edits: Sequence[Edit]) -> None:
    """Let each edit's user read the edited operand in its role; users of the same edited operand share it."""
    made: dict[Hashable, Proxy] = {}
    for edit in edits:
        operand = _in_role(edit.user, edit.role)
        key = (operand, edit.key)
        if key not in made:
            with editor.before(edit.user):
                make: Callable[..., Proxy] = _masked if isinstance(edit, Mask) else _numbers_of_real_rows
                made[key] = make(editor, Proxy(operand, editor), edit)
        _put_in_role(edit.user, edit.role, made[key].node)


def _masked(editor: Editor, operand: Proxy, mask: Mask) -> Proxy:
    val, rows, filling = value(operand), in_order(mask.rows), mask.filling
    size = expr(val.shape[rows.dim])
    if filling == "last":
        return _last_repeated(editor, operand, rows, size)
    behind = val.ndim - 1 - rows.dim
    key = ("is real", size, rows.per, rows.blocks, rows.extra, behind)
    is_real = editor.once(key, lambda: _is_real(editor, size, rows, behind))
    number = _number(filling, val.dtype)
    other = editor.once(("filling", filling, val.dtype), lambda: editor.constant(number, val.dtype))
    return aten.where.self(is_real, operand, other)


def _numbers_of_real_rows(editor: Editor, index: Proxy, edit: RowNumbers) -> Proxy:
    dtype = value(index).dtype
    size = editor.counted(expr(edit.picked.meta["val"].shape[edit.dim]))
    if edit.wraps:
        index = aten.where.self(aten.lt.Scalar(index, 0), aten.add.Tensor(index, size), index)
    outside = torch.iinfo(dtype).max
    other = editor.once(("filling", outside, dtype), lambda: editor.constant(outside, dtype))
    inside = aten.bitwise_and.Tensor(aten.ge.Scalar(index, 0), aten.lt.Tensor(index, size))
    return aten.where.self(inside, index, other)


def _is_real(editor: Editor, size: sympy.Expr, rows: Rows, behind: int) -> Proxy:
    """Return which entries of a dim of ``size`` are real, with ``behind`` more dims to be broadcast over.

    The dim is built from blocks, rows and the entries of each, so that it can be seen which of these another dim is.
    """
    blocks, count, per = _parts(size, rows)
    row = editor.entries(editor.plain(count))
    is_real = aten.lt.Tensor(row, editor.counted(count))
    if (blocks, per) != (1, 1):
        parts = [editor.plain(part) for part in (blocks, count, per)]
        is_real = aten.reshape.default(aten.expand.default(aten.view.default(is_real, [-1, 1]), parts), [-1])
    return aten.view.default(is_real, [-1] + [1] * behind)


def _last_repeated(editor: Editor, operand: Proxy, rows: Rows, size: sympy.Expr) -> Proxy:
    """Pick the last real row in place of each padded one."""
    blocks, count, per = _parts(size, rows)
    number = editor.once(("last", count), lambda: _own_or_last(editor, count))
    shape = [editor.plain(expr(each)) for each in value(operand).shape]
    before, after = shape[: rows.dim], shape[rows.dim + 1 :]
    parts = [editor.plain(part) for part in (blocks, count, per)]
    apart = operand if (blocks, per) == (1, 1) else aten.reshape.default(operand, [*before, *parts, *after])
    dim = rows.dim if apart is operand else rows.dim + 1
    picked: Proxy = editor(aten.index.Tensor, apart, [*[None] * dim, number])
    return picked if apart is operand else aten.reshape.default(picked, shape)


def _own_or_last(editor: Editor, count: sympy.Expr) -> Proxy:
    """Return each row's own number, and that of the last real one for padded rows."""
    own = editor.entries(editor.plain(count))
    return aten.minimum.default(own, aten.sub.Tensor(editor.counted(count), 1))


def _parts(size: sympy.Expr, rows: Rows) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr]:
    """Return blocks, rows of a block, and entries of a row of a dim; with extra ones each entry is a row."""
    per = rows.per if rows.extra == 0 else sympy.S.One
    return rows.blocks, (size / rows.blocks / per).cancel().expand(), per  # type: ignore[return-value, operator]


def _in_role(user: Node, role: int) -> Node:
    read: list[Node] = []
    map_arg((user.args, user.kwargs), read.append)
    return read[role]


def _put_in_role(user: Node, role: int, operand: Node) -> None:
    roles = count()
    user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda node: operand if next(roles) == role else node)


def _number(filling: Filling, dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return filling in (1, "highest", "greatest")
    if filling not in ("lowest", "highest", "greatest"):
        return filling
    if dtype.is_floating_point:
        return {"lowest": float("-inf"), "highest": float("inf"), "greatest": float("nan")}[filling]  # type: ignore[index]
    limits = torch.iinfo(dtype)
    return limits.min if filling == "lowest" else limits.max
