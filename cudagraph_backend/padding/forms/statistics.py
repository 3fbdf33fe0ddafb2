"""Means and variances over rows: sums, divided by the number of real entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Proxy

from ..editor import convert, value
from ..lattice import RefusePadding
from ..symbolic import product
from .form import form
from .site import Site

aten = torch.ops.aten


@form("aten::mean", "aten::mean.dim")
def mean(site: Site) -> Proxy:
    """Sum at the precision that torch sums at, and divide."""
    x = _precise(site["self"] if site["dtype"] is None else convert(site["self"], site["dtype"]))
    return convert(_mean(site, x, site.dims(x, site["dim"]), bool(site["keepdim"])), site.val.dtype)


@form("aten::var.correction", "aten::std.correction")
def deviation(site: Site) -> Proxy:
    """Average squared distances from the mean."""
    return convert(_moments(site, is_root=site.target is aten.std.correction)[0], site.val.dtype)


@form("aten::var_mean.correction", "aten::std_mean.correction")
def deviation_and_mean(site: Site) -> tuple[Proxy, Proxy]:
    """Average squared distances from the mean; and return the mean as well."""
    spread, average = _moments(site, is_root=site.target is aten.std_mean.correction)
    return convert(spread, site.val[0].dtype), convert(average, site.val[1].dtype)


@form("aten::scatter_reduce.two")
def scattered_mean(site: Site) -> Proxy:
    """Add what is written to each place, and divide by how much that was."""
    x, index, source = site["self"], site["index"], site["src"]
    if site["reduce"] != "mean" or not value(x).is_floating_point():
        raise RefusePadding("no mean of fractions")
    dim, kept = site["dim"], site["include_self"]

    def filled(number: float, like: Proxy) -> Proxy:
        shape = [site.size(like, dim) for dim in range(value(like).ndim)]
        return site.editor.constant(number, value(_precise(like)).dtype, shape)

    total = aten.scatter_add.default(_precise(x) if kept else filled(0.0, x), dim, index, _precise(source))
    count = aten.scatter_add.default(filled(float(kept), x), dim, index, filled(1.0, source))
    average = convert(aten.div.Tensor(total, count), value(x).dtype)
    result: Proxy = average if kept else aten.where.self(aten.gt.Scalar(count, 0), average, x)
    return result


def _moments(site: Site, is_root: bool) -> tuple[Proxy, Proxy]:
    if value(site["self"]).is_complex():
        raise RefusePadding("the variance of complex numbers")
    x = _precise(site["self"])
    dims, keepdim = site.dims(x, site["dim"]), bool(site["keepdim"])
    average = _mean(site, x, dims, keepdim=True)
    distance = aten.sub.Tensor(x, average)
    squares = aten.sum.dim_IntList(aten.mul.Tensor(distance, distance), dims, keepdim)
    correction = 1 if site["correction"] is None else site["correction"]
    degrees = aten.sub.Tensor(_count(site, x, dims), correction)
    spread = aten.div.Tensor(squares, aten.maximum.default(degrees, site.editor.constant(0.0, value(x).dtype)))
    if not keepdim:
        average = aten.squeeze.dims(average, dims)
    return (aten.sqrt.default(spread) if is_root else spread), average


def _mean(site: Site, x: Proxy, dims: Sequence[int], keepdim: bool) -> Proxy:
    result: Proxy = aten.div.Tensor(aten.sum.dim_IntList(x, dims, keepdim), _count(site, x, dims))
    return result


def _count(site: Site, x: Proxy, dims: Sequence[int]) -> Proxy:
    dtype = value(x).dtype
    return site.editor.counted(product(site.size(x, dim) for dim in dims), dtype.to_real())


def _precise(x: Proxy) -> Proxy:
    dtype = value(x).dtype
    return convert(x, torch.float32) if dtype.itemsize < 4 else x
