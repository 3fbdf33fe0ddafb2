"""Rows that move to other places: each place picks its row by number."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node, Proxy

from cudagraph_backend.torch_internals import expr

from ..editor import Editor, convert, value
from ..lattice import RefusePadding
from .form import form
from .site import Site

aten = torch.ops.aten


@form("aten::select.int")
def select(site: Site) -> Proxy:
    """Pick one row, counted from either end."""
    x, dim = site["self"], site.dims(site["self"], site["dim"])[0]
    row = _number(site.editor, site["index"])
    return aten.squeeze.dim(_picked(x, dim, aten.view.default(row, [1])), dim)


@form("aten::slice.Tensor")
def cut(site: Site) -> Proxy:
    """Pick a fixed number of rows counted from the end."""
    x, dim, step = site["self"], site.dims(site["self"], site["dim"])[0], site["step"]
    length = expr(site.val.shape[dim])
    if not length.is_Integer or not isinstance(step, int):
        raise RefusePadding("cuts a number of rows that changes")
    start = site.editor.counted(_start(site["start"], site.size(x, dim)))
    numbers = aten.mul.Tensor(site.editor.entries(int(length)), step)
    return _picked(x, dim, aten.add.Tensor(numbers, start))


@form("prims::rev")
def reverse(site: Site) -> Proxy:
    """Pick rows in reverse."""
    result, editor = site["a"], site.editor
    if not site["dims"]:
        raise RefusePadding("reverses nothing")
    for dim in site.dims(result, site["dims"]):
        size = site.size(result, dim)
        last = aten.sub.Tensor(editor.counted(size), 1)
        result = _picked(result, dim, aten.sub.Tensor(last, editor.entries(editor.plain(size))))
    return result


@form("aten::cat")
def cat(site: Site) -> Proxy:
    """Pick each entry from the operand in which it is, by the numbers of real entries."""
    tensors, editor = list(site["tensors"]), site.editor
    tensors = [tensor for tensor in tensors if [*map(expr, value(tensor).shape)] != [0]]  # as torch joins them
    dim = site.dims(tensors[0], site["dim"])[0]
    place = editor.entries(editor.plain(expr(site.val.shape[dim])))
    behind = [-1, *[1] * (site.val.ndim - 1 - dim)]
    starts, start = [], sympy.S.Zero
    for tensor in tensors:
        starts.append(start)
        start += site.size(tensor, dim)
    result, first = None, aten.mul.Tensor(place, 0)
    for tensor, start in reversed(list(zip(tensors, starts, strict=True))):
        own = aten.sub.Tensor(place, editor.counted(start))
        end = editor.counted(start + site.size(tensor, dim))
        is_own = aten.bitwise_and.Tensor(aten.ge.Scalar(own, 0), aten.lt.Tensor(place, end))
        here = _picked(tensor, dim, aten.where.self(is_own, own, first))
        here = convert(here, site.val.dtype)
        result = here if result is None else aten.where.self(aten.view.default(is_own, behind), here, result)
    if result is None:
        raise RefusePadding("joins nothing")
    return result


@form("aten::constant_pad_nd")
def pad(site: Site) -> Proxy:
    """Pick each entry from behind what is put in front, and the given number where none is left."""
    result, editor, pads = site["self"], site.editor, site["pad"]
    if all(_shape(user) == _shape(result.node) for user in site.node.users):
        raise RefusePadding("is cut back to what it was")  # as CUDA's attention aligns masks: the walk sees to it
    number = editor.constant(site["value"], site.val.dtype)
    for dim, ends in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        dim, (front, behind) = value(result).ndim - 1 - dim, ends
        if not (isinstance(front, int) and isinstance(behind, int) and front >= 0 and behind >= 0):
            raise RefusePadding("cuts, or pads by a number that changes")
        if (front, behind) == (0, 0):
            continue
        place = editor.entries(editor.plain(site.size(result, dim) + front + behind))
        own = aten.sub.Tensor(place, front)
        is_own = aten.bitwise_and.Tensor(
            aten.ge.Scalar(own, 0), aten.lt.Tensor(own, editor.counted(site.size(result, dim)))
        )
        here = _picked(result, dim, aten.where.self(is_own, own, aten.mul.Tensor(place, 0)))
        shape = [-1, *[1] * (value(result).ndim - 1 - dim)]
        result = aten.where.self(aten.view.default(is_own, shape), here, number)
    return result


def _shape(node: Node) -> list[sympy.Expr]:
    traced = node.meta.get("val")
    return [*map(expr, traced.shape)] if isinstance(traced, torch.Tensor) else []


def _picked(x: Proxy, dim: int, numbers: Proxy) -> Proxy:
    made: Proxy = aten.index.Tensor(x, [*[None] * dim, numbers])
    return made


def _number(editor: Editor, number: Any) -> Proxy:
    return editor.counted(expr(value(number)) if isinstance(number, Proxy) else sympy.Integer(number))


def _start(start: Any, size: sympy.Expr) -> sympy.Expr:
    """Return where a slice begins that was traced: a number from the front, or a negative one from the end."""
    first = sympy.S.Zero if start is None else expr(value(start)) if isinstance(start, Proxy) else sympy.Integer(start)
    return size + first if first.is_negative else first
