"""Rows that move to other places: each place picks its row by number."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Proxy

from cudagraph_backend.torch_internals import expr

from .. import alignment
from ..editor import Editor, convert, value
from ..lattice import RefusePadding
from .form import form
from .site import Site

aten = torch.ops.aten


@form("aten::select.int")
def select(site: Site) -> Proxy:
    """Pick one row, counted from either end."""
    x, dim = site["self"], site.dims(site["self"], site["dim"])[0]
    row = site.editor.counted(site.number("index"))
    return aten.squeeze.dim(_picked(x, dim, aten.view.default(row, [1])), dim)


@form("aten::slice.Tensor")
def cut(site: Site) -> Proxy:
    """Pick rows by number, from a place that is counted."""
    x, dim, step = site["self"], site.dims(site["self"], site["dim"])[0], site["step"]
    length = site.editor.plain(expr(site.val.shape[dim]))
    start = site.editor.counted(_start(site, site.size(x, dim)))
    numbers = aten.mul.Tensor(site.editor.entries(length), step)
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
    """Put one operand behind the other."""
    tensors = [tensor for tensor in site["tensors"] if [*map(expr, value(tensor).shape)] != [0]]  # as torch joins them
    if not tensors:
        raise RefusePadding("joins nothing")
    dim = site.dims(tensors[0], site["dim"])[0]
    size, start = expr(site.val.shape[dim]), sympy.S.Zero
    result: Any = site.editor.constant(False, torch.bool)
    for tensor in tensors:
        result = _put(site.editor, convert(tensor, site.val.dtype), dim, start, size, convert(result, site.val.dtype))
        start += site.size(tensor, dim)
    return result  # type: ignore[no-any-return]


@form("aten::constant_pad_nd")
def pad(site: Site) -> Proxy:
    """Put a tensor behind so many of the given number, dim by dim, and that number behind it."""
    result, editor, pads = site["self"], site.editor, site["pad"]
    if all(user.target is aten.slice.Tensor and alignment.as_before(user) for user in site.node.users):
        raise RefusePadding("is cut back to what it was")  # which the walk sees to
    number = editor.constant(site["value"], site.val.dtype)
    for dim, ends in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        dim, (front, behind) = value(result).ndim - 1 - dim, ends
        if not (isinstance(front, int) and isinstance(behind, int) and front >= 0 and behind >= 0):
            raise RefusePadding("cuts, or pads by a number that changes")
        if (front, behind) != (0, 0):
            size = site.size(result, dim) + front + behind
            result = _put(editor, result, dim, sympy.Integer(front), size, number)
    return result


@form("aten::slice_scatter")
def write_slice(site: Site) -> Proxy:
    """Put a tensor in place of as many entries of another one."""
    x, source = site["self"], site["src"]
    dim, step = site.dims(x, site["dim"])[0], site["step"]
    if step != 1:
        raise RefusePadding("writes to every so many of the rows")
    size = site.size(x, dim)
    return _put(site.editor, source, dim, _start(site, size), size, x)


@form("aten::repeat_interleave.Tensor")
def numbers_repeated(site: Site) -> Proxy:
    """Tell of each place which number it repeats: the first one whose end lies behind the place."""
    counts, editor = site["repeats"], site.editor
    ends = aten.cumsum.default(counts, 0)
    behind = aten.add.Tensor(editor.entries(editor.plain(expr(site.val.shape[0]))), 1)
    return convert(aten.searchsorted.Tensor(ends, behind), site.val.dtype)


def _put(editor: Editor, tensor: Proxy, dim: int, start: sympy.Expr, size: sympy.Expr, around: Proxy) -> Proxy:
    """Return a tensor with a dim of ``size``, in which ``tensor`` is from entry ``start`` on, ``around`` elsewhere."""
    if expr(value(tensor).shape[dim]) == 0:  # there is nothing to pick from
        shape = [*map(expr, value(tensor).shape)]
        shape[dim] = size
        whole: Proxy = aten.clone.default(aten.expand.default(around, [*map(editor.plain, shape)]))
        return whole
    place = editor.entries(editor.plain(size))
    own = aten.sub.Tensor(place, editor.counted(start))
    end = editor.counted(expr(value(tensor).shape[dim]))
    is_own = aten.bitwise_and.Tensor(aten.ge.Scalar(own, 0), aten.lt.Tensor(own, end))
    here = _picked(tensor, dim, aten.where.self(is_own, own, aten.mul.Tensor(place, 0)))
    behind = [-1, *[1] * (value(tensor).ndim - 1 - dim)]
    made: Proxy = aten.where.self(aten.view.default(is_own, behind), here, around)
    return made


def _picked(x: Proxy, dim: int, numbers: Proxy) -> Proxy:
    made: Proxy = aten.index.Tensor(x, [*[None] * dim, numbers])
    return made


def _start(site: Site, size: sympy.Expr) -> sympy.Expr:
    """Return where a slice begins that was traced: a number from the front, or a negative one from the end."""
    first = sympy.S.Zero if site["start"] is None else site.number("start")
    return size + first if first.is_negative else first
