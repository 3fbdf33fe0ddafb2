"""Compiles functions with this backend and holds their calls to eager; tells how a region was divided into parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

import cudagraph_backend as sg
from cudagraph_backend import sharedgraph

SIZES = (5, 7, 30, 3, 17, 7, 2, 30)
BUCKETS = [8, 32]


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="sharedgraph", options=options)


def assert_as_eager(
    ours: Callable[..., Any],
    function: Callable[..., Any],
    make: Callable[[int], Sequence[torch.Tensor]],
    sizes: Iterable[int],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> None:
    """Calls ``ours`` with what is made for each size: every call equals eager, and so do its arguments afterwards."""
    with torch.no_grad():
        for n in sizes:
            args = make(n)
            eager = [a.clone() for a in args]
            torch.testing.assert_close(ours(*args), function(*eager), rtol=rtol, atol=atol)
            torch.testing.assert_close([*args], eager, rtol=rtol, atol=atol)


def check(
    function: Callable[..., Any],
    make: Callable[[int], Sequence[torch.Tensor]],
    sizes: Iterable[int] = SIZES,
    **options: Any,
) -> sg.Stats:
    """Compiles for a few buckets, with every dim that is as long as the batch dynamic."""

    def marked(n: int) -> Sequence[torch.Tensor]:
        args = make(n)
        for argument in args:
            if argument.ndim and argument.shape[0] == n:
                torch._dynamo.mark_dynamic(argument, 0)
        return args

    assert_as_eager(compiled(function, capture_sizes=BUCKETS, **options), function, marked, sizes)
    return sg.stats()


class Kept:
    """Results that are compared some steps after they were made: those of few steps, which every release lets live."""

    def __init__(self) -> None:
        self._kept: list[tuple[Any, Any]] = []

    def keep(self, got: Any, expected: Any) -> None:
        self._kept.append((got, expected))
        if len(self._kept) > 2:
            torch.testing.assert_close(*self._kept.pop(0), rtol=1e-4, atol=1e-4)


def kinds() -> str:
    """The parts in order: ``c`` for a captured one, ``.`` for one that is not; in brackets, for each region."""
    text = ""
    for region in (replayer.region for replayer in sharedgraph.regions()):
        assert region.part is not None
        text += ("[" if region.part[0] == 1 else "") + (".c"[region.refusal is None])
        text += "]" if region.part[0] == region.part[1] else ""
    return text


def two(x: torch.Tensor) -> torch.Tensor:
    """More operators: a part of one is not worth a graph."""
    return x * 2 + 1
