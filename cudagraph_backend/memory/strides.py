"""Arithmetic of sizes and strides (both in elements): what memory a tensor reaches, and how often."""

from __future__ import annotations

from collections.abc import Sequence

Shape = tuple[tuple[int, ...], tuple[int, ...]]
"""Size and stride of a tensor."""


def extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """Count the elements from the first address that a tensor reaches to one past the last."""
    if 0 in size:
        return 0
    return 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))


def overlaps_itself(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Return whether two indices may reach one address, other than by a stride of 0."""
    reach = 0
    for length, step in sorted(zip(size, stride, strict=True), key=lambda pair: pair[1]):
        if length <= 1 or step == 0:
            continue
        if step <= reach:
            return True
        reach += (length - 1) * step
    return False


def same_places(size: Sequence[int], stride: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether entries of a tensor of ``size`` lie at the same places with either stride."""
    return 0 in size or all(n == 1 or a == b for n, a, b in zip(size, stride, other, strict=True))


def reaching_once(size: Sequence[int], stride: Sequence[int]) -> Shape:
    """Return a shape that reaches the same addresses, each once (or a gap between them), so it can be copied to."""
    if overlaps_itself(size, stride):
        return (extent(size, stride),), (1,)
    return tuple(min(length, 1) if step == 0 else length for length, step in zip(size, stride, strict=True)), tuple(
        stride
    )
