"""Writes to where a mask says: a choice between what is there and what is written, entry by entry."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Proxy

from cudagraph_backend.torch_internals import expr

from ..editor import value
from ..lattice import RefusePadding
from ..symbolic import product
from .form import form
from .site import Site

aten = torch.ops.aten


@form("aten::index_put")
def put(site: Site) -> Proxy:
    """Choose the written value where the mask is true; it is the same for all entries that the mask covers."""
    x, values = site["self"], site["values"]
    given = [(dim, mask) for dim, mask in enumerate(site["indices"]) if mask is not None]
    if len(given) != 1 or value(given[0][1]).dtype != torch.bool or site["accumulate"]:
        raise RefusePadding("writes by number, or adds")
    ((first, mask),) = given
    covered = value(mask).ndim
    behind = value(x).ndim - first - covered
    sizes = [site.size(mask, dim) for dim in range(covered)]
    if sizes != [site.size(x, first + dim) for dim in range(covered)]:  # a choice would guard that they are
        raise RefusePadding("nothing shows that the mask is as large as what it covers")
    shape: list[Any] = [site.editor.plain(site.size(values, dim)) for dim in range(value(values).ndim)]
    if len(shape) > behind:
        place = len(shape) - behind - 1  # where the mask's dims are one, of as many entries as are chosen
        if shape[place] != 1:
            raise RefusePadding("writes another value for each entry that the mask chooses")
        values = aten.reshape.default(values, [*shape[:place], *[1] * covered, *shape[place + 1 :]])
    chosen = aten.reshape.default(mask, [*map(site.editor.plain, sizes), *[1] * behind])
    made: Proxy = aten.where.self(chosen, values, x)
    return made


@form("aten::masked_scatter")
def fill_in_order(site: Site) -> Proxy:
    """Look up, for each entry that the mask chooses, the source's entry of its number among these."""
    editor = site.editor
    shape = [editor.plain(expr(size)) for size in site.val.shape]
    x = aten.expand.default(site["self"], shape)
    many = product(site.size(site["source"], dim) for dim in range(value(site["source"]).ndim))
    if not sympy.sympify(many).is_positive:
        raise RefusePadding("there may be nothing to look up")
    is_chosen = aten.reshape.default(aten.expand.default(site["mask"], shape), [-1])
    own = aten.sub.Tensor(aten.cumsum.default(is_chosen, 0), 1)
    number = aten.where.self(is_chosen, own, editor.constant(0, torch.int64))
    found = aten.index.Tensor(aten.reshape.default(site["source"], [-1]), [number])
    made: Proxy = aten.where.self(aten.reshape.default(is_chosen, shape), aten.reshape.default(found, shape), x)
    return made
