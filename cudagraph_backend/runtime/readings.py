"""Readings: how a graph reads its inputs, and where a call's arguments were found before.

An argument that is an output of ours, or a large one of a fixed size (a cache), is read where it lies, if it can be.
Any other one is copied to free bytes of the output pool, which are free again after the replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias
from weakref import ref

import torch

from cudagraph_backend.fill import Fill
from cudagraph_backend.memory.copies import StagedCopy, compact, is_aligned, staged_copy
from cudagraph_backend.memory.output_pool import OutputPool
from cudagraph_backend.memory.output_range import OutputRange, RangeStorage
from cudagraph_backend.memory.strides import Shape, extent, overlaps_itself, same_places
from cudagraph_backend.region import TensorInput, Values, evaluate_all
from cudagraph_backend.torch_internals import borrowed_memory, outside_inference_mode

_CACHE_NBYTES = 1 << 16


def shape_at(tensor: TensorInput, values: Values) -> Shape:
    return evaluate_all(tensor.size, values), evaluate_all(tensor.stride, values)


@dataclass(frozen=True)
class Reading:
    """How graphs of one bucket read a staged input at one combination of real sizes.

    Attributes:
        index: which argument.
        real: size and stride of its real rows.
        shape: size and stride at the bucket.
        row_entries: per dim, how many consecutive entries make a row (2 for a dim of size ``2*s``).
        fill: what padded rows hold: the last real row, zeros, or a number.
        provided: bytes that the largest bucket will need, as far as known.
        is_fixed: whether its size is the same in all calls, as that of a cache.
        is_saved: whether a forward may have saved it, and its rows may have the strides of a bucket.
    """

    index: int
    dtype: torch.dtype
    real: Shape
    shape: Shape
    row_entries: tuple[int, ...]
    fill: Fill
    provided: int = 0
    is_fixed: bool = False
    is_saved: bool = False

    @cached_property
    def nbytes(self) -> int:
        """Bytes that all rows reach."""
        return extent(*self.shape) * self.dtype.itemsize

    @cached_property
    def is_padded(self) -> bool:
        return self.real[0] != self.shape[0]

    @cached_property
    def may_stay(self) -> bool:
        """Whether it can be read where an argument with its strides lies, and padded rows are behind all real ones."""
        size, stride = self.real
        return self._stays(stride) and self._is_padded_behind(extent(size, stride))

    def _stays(self, stride: Sequence[int]) -> bool:
        """Return whether real rows with these strides are where they are at the bucket."""
        size = self.real[0]
        apart = 0 not in size and 0 not in stride and not overlaps_itself(size, stride)
        return apart and same_places(size, stride, self.shape[1])

    def _is_padded_behind(self, end: int) -> bool:
        """Return whether padded rows begin at ``end``, where real ones end, or later."""
        return all(step * n >= end for n, m, step in zip(self.real[0], *self.shape, strict=True) if m > n)

    @cached_property
    def is_cache(self) -> bool:
        """Whether it is so large, and of a fixed size, that its address is worth a graph, wherever that is."""
        return self.is_fixed and self.may_stay and self.nbytes >= _CACHE_NBYTES

    def found_in(self, pool: OutputPool, tensor: torch.Tensor) -> OutputRange | None:
        """Return the range of the pool where the argument can be read as it lies; ``None`` if it must be copied.

        Padded rows will be overwritten there, so nothing real may be among them: behind ``y[:k]`` it is, and between
        the rows of ``y[:, k:]``. Of what callers don't get there are no parts.
        """
        stride = tensor.stride() if self.is_saved else self.real[1]
        if not self._stays(stride):
            return None
        storage = tensor.untyped_storage()
        taken = pool.holder(storage)
        if taken is None or not is_aligned(tensor.data_ptr()):
            return None
        if not self.is_padded:
            return taken
        first, end = tensor.data_ptr() - pool.address, extent(self.real[0], stride)
        is_last = first + end * self.dtype.itemsize == taken.offset + storage.nbytes()
        may_write = is_last and (self._is_padded_behind(end) or taken.is_hidden)
        return taken if may_write and first + self.nbytes <= taken.end else None

    def is_as_compiled(self, tensor: torch.Tensor) -> bool:
        """Return whether an argument has the strides that the region was compiled for."""
        return not self.is_saved or same_places(self.real[0], tensor.stride(), self.real[1])

    def buffer(self, pool: OutputPool, offset: int) -> torch.Tensor:
        """Return what the graph reads if the input is at this offset from the pool's first byte, inside it or not."""
        if offset >= 0 and offset + self.nbytes <= pool.nbytes:
            storage = pool.bytes(offset, self.nbytes).untyped_storage()
        else:
            storage = borrowed_memory(pool.address + offset, self.nbytes, pool.device)
        with outside_inference_mode():
            return torch.empty(0, dtype=self.dtype, device=storage.device).set_(storage, 0, *self.shape)

    def copy_to(self, buffer: torch.Tensor) -> StagedCopy:
        return staged_copy(self.index, buffer, self.real, self.row_entries, self.fill)


def compact_saved(readings: Sequence[Reading], args: list[Any]) -> None:
    """Let saved arguments have the strides that the region was compiled for."""
    for reading in readings:
        if not reading.is_as_compiled(args[reading.index]):
            args[reading.index] = compact(args[reading.index], reading.real[1])


Where: TypeAlias = "tuple[int | None, ...]"
"""Per staged input, where a call's argument is read: the offset from the pool's first byte, also of what lies outside;
``None``: the argument is copied."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """Where the arguments of a call were found, and what tells that those of another one are found there, too.

    Attributes:
        inside: index, address and storage of each argument in the pool, and of caches elsewhere (no storage).
        outside: the indices of the others, which are copied from wherever outside of the pool they are.
        strides: of arguments that may have others at another call, by index.
        strided: those that can't be copied as they lie: the index of each, and the strides that it must have.
    """

    where: Where
    inside: tuple[tuple[int, int, ref[RangeStorage] | None], ...]
    outside: tuple[int, ...]
    strides: tuple[tuple[int, tuple[int, ...]], ...] = ()
    strided: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def holds(self, pool: OutputPool, args: Sequence[torch.Tensor]) -> bool:
        for index, address, storage in self.inside:
            tensor = args[index]
            if tensor.data_ptr() != address:
                return False
            if storage is not None:
                known = storage()  # gone: another storage may look like it
                if known is None or tensor.untyped_storage()._cdata != known.cdata:
                    return False
        for index, stride in self.strides:
            if args[index].stride() != stride:
                return False
        start, end = pool.address, pool.address + pool.nbytes
        for index in self.outside:  # noqa: SIM110 (a generator takes longer)
            if start <= args[index].data_ptr() < end:
                return False
        return True
