"""Capture sizes: which sizes of a dynamic dim get a graph, and which graph serves a size. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

_LARGEST_BOUND_TO_PROVIDE_FOR = 8192

CaptureSizes = tuple[int, ...] | Literal["auto"]


def next_auto_size(n: int, dims: int = 1) -> int:
    """Return the smallest automatic capture size that is at least ``n``, of one of so many dims that change.

    1, 2, 4, 8, then by 8 up to 256, by 16 up to 512, by 32 up to 1024, …: sixteen sizes per doubling past 128, so that
    less than 1/16 of such a bucket is padding. (vLLM and SGLang step alike, up to a last size.) Sizes of several dims
    multiply to combinations, so there are eight per doubling for each of two, and four for each of more.
    """
    if n <= 8:
        return 1 << max(n - 1, 0).bit_length()
    step = 1 << max(3, (n - 1).bit_length() - 6 + min(dims, 3))
    return -(-n // step) * step


def candidates(n: int, capture_sizes: CaptureSizes, upper: int | None, dims: int = 1) -> Iterator[int]:
    """Return the capture sizes that could serve ``n``, smallest first.

    Args:
        n: the real size.
        capture_sizes: the user's sizes, or ``"auto"``.
        upper: the dim's upper bound, if it has one.
        dims: how many dims are padded.
    """
    if capture_sizes != "auto":
        yield from (_bounded(size, upper) for size in capture_sizes if size >= n)
        return
    size = next_auto_size(n, dims)
    # Guards may exclude a size (n % 8 != 0, n <= 20): a few larger ones are tried, not an endless list of them.
    for _ in range(4):
        if upper is not None and size >= upper:
            yield upper
            return
        yield size
        size = next_auto_size(size + 1, dims)


def choose(
    n: int, capture_sizes: CaptureSizes, upper: int | None, admits: Callable[[int], bool], dims: int = 1
) -> int | None:
    """Return the bucket of ``n``: the smallest capture size that holds it and that the region's guards admit.

    Returns ``n`` itself where no such size is admitted, and ``None`` above the largest of the user's sizes.
    """
    for size in candidates(n, capture_sizes, upper, dims):
        if admits(size):
            return size
    return n if capture_sizes == "auto" or n <= max(capture_sizes) else None


def all_sizes(capture_sizes: CaptureSizes, lower: int, upper: int | None) -> tuple[int, ...]:
    """Return every capture size that may serve ``lower`` to ``upper``, ascending. ``"auto"`` needs the latter."""
    if capture_sizes != "auto":
        return tuple(sorted({_bounded(size, upper) for size in capture_sizes if size >= lower}))
    assert upper is not None
    sizes, n = [], lower
    while n <= upper:
        sizes.append(_bounded(next_auto_size(n), upper))
        n = sizes[-1] + 1
    return tuple(sizes)


def largest(capture_sizes: CaptureSizes, upper: int | None, bucket: int) -> int:
    """Return the size to provide memory for when ``bucket`` is captured: the largest there will be, as far as known.

    Without a bound this is the next power of two, so that memory is moved only a few times while sizes grow. A very
    large bound is no promise of the user's but a limit of some operator (65,535 blocks in a CUDA grid).
    """
    if capture_sizes != "auto":
        return max(bucket, _bounded(max(capture_sizes), upper))
    if upper is not None and upper <= _LARGEST_BOUND_TO_PROVIDE_FOR:
        return max(bucket, upper)
    return 1 << (bucket - 1).bit_length()


def _bounded(size: int, upper: int | None) -> int:
    return size if upper is None else min(size, upper)
