"""What calls got of padding: rows by dim, and calls that took another combination of capture sizes than their own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class Served:
    """How many calls of certain sizes were answered in a certain bucket; ``calls`` is all that a call counts here.

    ``rows`` has the real and the padded rows of one such call, by padded dim. ``takes_existing``: the bucket is not the
    sizes' own, but one that existed.
    """

    rows: Mapping[str, tuple[int, int]]
    takes_existing: bool
    calls: int = 0


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that ran: ``real`` ones, ``padded`` ones, and the latter in percent of both."""

    real: int
    padded: int
    padded_percent: float

    @classmethod
    def of(cls, real: int, padded: int) -> Rows:
        return cls(real, padded, 100 * padded / (real + padded) if padded else 0.0)


@dataclass(frozen=True, slots=True)
class Padding:
    """What padding cost a region, over all calls that were answered from a graph, or from the run before its capture.

    Attributes:
        region: its name, as in ``explain()``.
        calls: how many of them there were.
        dims: rows of each padded dim, by its name.
        product: the rows of all padded dims multiplied, call by call, as the work of many operators is.
        calls_in_existing: calls that were answered in a combination of capture sizes that existed, not in their own.
        existing_percent: the bound for that: by how many percent inputs there may have more bytes than in the call's
            own combination. ``None`` where calls always get their own.
    """

    region: str
    calls: int
    dims: dict[str, Rows]
    product: Rows
    calls_in_existing: int
    existing_percent: float | None


def padding_of(region: str, served: Collection[Served], allowance: float | None) -> Padding:
    """Sum up what calls of a region were served; ``allowance`` is the bound as a share."""
    real: Counter[str] = Counter()
    padded: Counter[str] = Counter()
    product_real = product_run = 0
    for one in served:
        for dim, (rows, more) in one.rows.items():
            real[dim] += rows * one.calls
            padded[dim] += more * one.calls
        product_real += one.calls * math.prod(rows for rows, _ in one.rows.values())
        product_run += one.calls * math.prod(rows + more for rows, more in one.rows.values())
    return Padding(
        region,
        calls=sum(one.calls for one in served),
        dims={dim: Rows.of(real[dim], padded[dim]) for dim in real},
        product=Rows.of(product_real, product_run - product_real),
        calls_in_existing=sum(one.calls for one in served if one.takes_existing),
        existing_percent=None if allowance is None else 100 * allowance,
    )
