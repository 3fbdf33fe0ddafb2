"""Arithmetic of spans of bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TypeAlias

Span: TypeAlias = "tuple[int, int]"
"""The first byte, and one past the last."""


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the same bytes as ascending spans that don't touch; empty ones are left out."""
    result: list[Span] = []
    for first, end in sorted(span for span in spans if span[0] < span[1]):
        if result and first <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((first, end))
    return result


def meets(span: Span, others: Sequence[Span]) -> bool:
    """Return whether a span shares a byte with one of ``others``, which are as ``merged`` makes them."""
    position = bisect_left(others, span[1], key=lambda other: other[0])
    return span[0] < span[1] and position > 0 and others[position - 1][1] > span[0]
