"""Allocations: results are written straight into the output pool, as its memory is handed out for the region's buffers.

Inductor's generated code allocates a buffer for whatever it computes. Which of them end up as outputs is seen in the
run before capture; in the capture, those are the outputs' ranges. What the code doesn't allocate itself (a view of an
input, a result of an operator that allocates) is copied to its range, in the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch

from cudagraph_backend.memory.strides import extent
from cudagraph_backend.torch_internals import Compiled, with_allocator

Allocate = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]


class Allocations:
    """Stands in for the allocator of one region's generated code; buffers are numbered within a run."""

    def __init__(self, allocate: Allocate):
        self._allocate = allocate
        self._memory: Mapping[int, torch.UntypedStorage] = {}
        self._numbers: dict[int, int] = {}
        self._next = 0

    def bound_to(self, compiled: Compiled, device_type: str) -> Compiled:
        """Return the region with this allocator; as it is, if it is not generated Python code."""
        return with_allocator(compiled, device_type, self) or compiled

    def __call__(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        number, self._next = self._next, self._next + 1
        storage = self._memory.get(number)
        if storage is None or extent(size, stride) * dtype.itemsize > storage.nbytes():
            buffer = self._allocate(size, stride, dtype)
        else:
            buffer = torch.empty(0, dtype=dtype, device=storage.device).set_(storage, 0, size, stride)
        self._numbers[buffer.untyped_storage()._cdata] = number  # the last buffer with this storage is the one alive
        return buffer

    @contextlib.contextmanager
    def run(self, memory: Mapping[int, torch.UntypedStorage]) -> Iterator[None]:
        """Give buffers with these numbers this memory for one run of the region, in the ``with`` block."""
        self._memory, self._numbers, self._next = memory, {}, 0
        try:
            yield
        finally:
            self._memory = {}

    def number_of(self, result: torch.Tensor) -> int | None:
        """Return the number of the buffer that a result of the last run is (a view of); ``None`` if it isn't one."""
        return self._numbers.get(result.untyped_storage()._cdata)
