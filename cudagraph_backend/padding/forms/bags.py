"""Embeddings summed by bag: looked up one by one, and added to the bag that each is in."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Proxy

from cudagraph_backend.torch_internals import expr

from ..editor import convert, value
from ..lattice import RefusePadding
from .form import form
from .site import Site

aten = torch.ops.aten

_SUM, _MEAN = 0, 1


@form("aten::_embedding_bag", "aten::_embedding_bag_forward_only")
def embedding_bag(site: Site) -> tuple[Proxy | None, ...]:
    """Add up each bag's embeddings; and tell each index's bag and each bag's size, as the operator does."""
    bags = _Bags(site)
    rows = _precise(aten.embedding.default(site["weight"], site["indices"]))
    output = convert(bags.averaged(bags.added(bags.weighted(rows))), site.val[0].dtype)
    sizes = convert(bags.sizes(), site.val[2].dtype)
    found = [convert(bags.of_index, site.val[1].dtype), sizes, sizes]
    return (output, *(_like(site, one, traced) for one, traced in zip(found, site.val[1:], strict=True)))


def _like(site: Site, found: Proxy, traced: torch.Tensor) -> Proxy | None:
    """Return what a device tells of its bags: some tell nothing; ``None`` where it is not known."""
    if traced.numel() == 0:
        return site.editor.constant(0, traced.dtype, [*map(expr, traced.shape)])
    return found if [*map(expr, value(found).shape)] == [*map(expr, traced.shape)] else None


@form("aten::_embedding_bag_backward")
def embedding_bag_backward(site: Site) -> Proxy:
    """Add each bag's gradient to the embeddings that are in it."""
    if site["sparse"]:
        raise RefusePadding("makes a sparse gradient")
    bags, editor = _Bags(site), site.editor
    grad = bags.averaged(_precise(site["grad"]))
    rows = bags.weighted(aten.index.Tensor(grad, [bags.of_index]))
    shape = [site.number("num_weights"), site.size(grad, 1)]
    total = editor.constant(0.0, value(grad).dtype, shape)
    return convert(aten.index_add.default(total, 0, site["indices"], rows), site.val.dtype)


class _Bags:
    """Which bag each index is in: the last one that begins at or before it."""

    def __init__(self, site: Site) -> None:
        if site["mode"] not in (_SUM, _MEAN) or site["scale_grad_by_freq"]:
            raise RefusePadding("bags of another kind than sums and means")
        self.site, self.editor = site, site.editor
        self.many = site.size(site["offsets"], 0)
        if site["include_last_offset"] or (site["grad"] is not None and site.size(site["grad"], 0) != self.many):
            raise RefusePadding("indices behind the last offset are in no bag")
        place = self.editor.entries(self.editor.plain(site.size(site["indices"], 0)))
        begun = aten.searchsorted.Tensor(site["offsets"], aten.add.Tensor(place, 1))
        self.of_index: Proxy = aten.sub.Tensor(begun, 1)

    def added(self, rows: Proxy) -> Proxy:
        """Return the sums of each bag's rows."""
        shape = [self.many, *(self.site.size(rows, dim) for dim in range(1, value(rows).ndim))]
        total = self.editor.constant(0.0, value(rows).dtype, shape)
        made: Proxy = aten.index_add.default(total, 0, self.of_index, rows)
        return made

    def weighted(self, rows: Proxy) -> Proxy:
        """Return the indices' rows as they count: with their weights, and none for the index that is padding."""
        if self.site["per_sample_weights"] is not None:
            rows = aten.mul.Tensor(
                rows, convert(aten.unsqueeze.default(self.site["per_sample_weights"], 1), value(rows).dtype)
            )
        counts = self._counts()
        if counts is None:
            return rows
        nothing = self.editor.constant(0.0, value(rows).dtype)
        made: Proxy = aten.where.self(aten.unsqueeze.default(counts, 1), rows, nothing)  # whatever the row holds
        return made

    def sizes(self) -> Proxy:
        """Return how many indices count in each bag."""
        counts = self._counts()
        if counts is None:
            return self.added(self.editor.constant(1.0, torch.float32, [self.site.size(self.site["indices"], 0)]))
        return self.added(convert(counts, torch.float32))

    def averaged(self, rows: Proxy) -> Proxy:
        """Return one row per bag, divided by the bag's size where bags are means."""
        if self.site["mode"] == _SUM:
            return rows
        sizes = aten.clamp_min.default(self.sizes(), 1)
        made: Proxy = aten.div.Tensor(rows, aten.unsqueeze.default(sizes, 1))
        return made

    def _counts(self) -> Any:
        padding = self.site["padding_idx"]
        if padding is None or padding < 0:
            return None
        return aten.ne.Scalar(self.site["indices"], padding)


def _precise(x: Proxy) -> Proxy:
    return convert(x, torch.float32) if value(x).dtype.itemsize < 4 else x
