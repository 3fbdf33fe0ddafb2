"""Sorting along rows: padded rows last."""

from __future__ import annotations

import torch
from torch.fx import Proxy

from ..lattice import RefusePadding
from .form import form
from .site import Site

aten = torch.ops.aten


@form("aten::sort", "aten::sort.stable")
def sort(site: Site) -> tuple[Proxy, Proxy]:
    """Sort so that equal entries stay in order, which any sort may do."""
    if site["stable"]:
        raise RefusePadding("does so already")
    result = aten.sort.stable(site["self"], stable=True, dim=site["dim"], descending=bool(site["descending"]))
    return result[0], result[1]


@form("aten::topk")
def topk(site: Site) -> tuple[Proxy, Proxy]:
    """Sort, and take the first ``k``."""
    if not isinstance(site["k"], int):
        raise RefusePadding("takes a number of entries that changes")
    dim = site["dim"]
    result = aten.sort.stable(site["self"], stable=True, dim=dim, descending=site["largest"])
    return tuple(aten.slice.Tensor(one, dim, 0, site["k"]) for one in (result[0], result[1]))  # type: ignore[return-value]
