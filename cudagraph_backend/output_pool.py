"""The output pool: one pooled uint8 tensor per device. Outputs of graphs, and the inputs that they read, lie in it.

A *range* is a place for one output, or for several that share a storage. Ranges may overlap: which of them hold live
outputs is known at every call, and what is written is checked against that. Live ranges never overlap.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from sys import getrefcount
from threading import get_ident
from weakref import WeakValueDictionary

import torch

from cudagraph_backend.drivers import Memory
from cudagraph_backend.spans import Span
from cudagraph_backend.torch_internals import (
    CAN_FORBID_ACCESS,
    forbid_access,
    outside_inference_mode,
    same_storage,
    storage_users,
)

ALIGNMENT = 512  # bytes; what the caching allocator gives, and more than any vectorised load needs

Step = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Loan:
    """What a range is handed out for.

    Attributes:
        region: the region's name.
        outputs: (output index, first byte, one past the last byte) per output, relative to the range.
        sources: the source line of each of them, where it is known.
        is_saved: whether autograd may hold them: those of forward and backward regions.
    """

    region: str
    outputs: tuple[tuple[int, int, int], ...]
    sources: tuple[str | None, ...] = ()
    is_saved: bool = False

    def overwritten(self) -> str:
        """The error of an access to such an output after its memory was needed (``on_overwrite="error"``)."""
        names = " and ".join(
            f"output {index}" + (f" (made at {source})" if source else "")
            for (index, _, _), source in zip(self.outputs, self.sources, strict=True)
        )
        return (
            f"{names} of {self.region} is used after a later step has overwritten it. Clone it before the next step "
            "(tensor.clone()), or keep such outputs with options={'on_overwrite': 'preserve'}."
        )


class RangeStorage:
    """A storage over the beginning of a range. Outputs of one size are made on it; it knows whether any is left."""

    __slots__ = ("__weakref__", "_idle_holders", "_idle_users", "_sources", "address", "cdata", "nbytes", "storage")

    def __init__(self, storage: torch.UntypedStorage):
        self.storage = storage
        self.cdata = storage._cdata
        self.address, self.nbytes = storage.data_ptr(), storage.nbytes()
        self._idle_users = self._idle_holders = 0
        self._sources: dict[torch.dtype, torch.Tensor] = {}  # what outputs are made from

    def lend(self) -> None:
        """Nobody else may hold the storage when it is lent: what is counted now is the count of none."""
        self._idle_users, self._idle_holders = storage_users(self.cdata), getrefcount(self.storage)

    def tensor(self, dtype: torch.dtype, size: Sequence[int], stride: Sequence[int], offset: int) -> torch.Tensor:
        """A new tensor on the storage, one of its own (no autograd view); ``offset`` in elements."""
        source = self._sources.get(dtype)
        if source is None:
            source = self._sources[dtype] = self._new_source(dtype)
        return same_storage(source, size, stride, offset)

    def _new_source(self, dtype: torch.dtype) -> torch.Tensor:
        """It is none of those that are counted."""
        users, holders = storage_users(self.cdata), getrefcount(self.storage)
        with outside_inference_mode():
            source = torch.empty(0, dtype=dtype, device=self.storage.device).set_(self.storage)
        self._idle_users += storage_users(self.cdata) - users
        self._idle_holders += getrefcount(self.storage) - holders
        return source

    def is_in_place(self) -> bool:
        """Whether the storage still has the range's memory: ``share_memory_`` gives it another one."""
        return self.storage.data_ptr() == self.address

    def is_in_use(self) -> bool:
        """Whether a tensor, a view or an export, or the storage object itself, is held by somebody else."""
        return storage_users(self.cdata) > self._idle_users or getrefcount(self.storage) > self._idle_holders


class OutputRange:
    """Bytes of the pool that outputs are written to.

    Each size of output has a storage of its own over the range's beginning, made once and lent at every call.
    ``loan``, ``step`` and ``thread`` (the one that called) are those of the output lent last.
    """

    __slots__ = ("__weakref__", "_is_listed", "_lent", "_storages", "loan", "nbytes", "offset", "step", "thread")

    def __init__(self, offset: int, nbytes: int):
        self.offset = offset
        self.nbytes = nbytes
        self.loan: Loan | None = None
        self.step: Step = (0, 0)
        self.thread = 0
        self._storages: dict[int, RangeStorage] = {}
        self._lent: RangeStorage | None = None
        self._is_listed = False  # among those of the pool that may be live

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def is_saved(self) -> bool:
        return self.loan is not None and self.loan.is_saved

    @property
    def span(self) -> Span:
        return self.offset, self.offset + self.nbytes

    def is_live(self) -> bool:
        """Whether an output, a view of one or an export of one still uses the range."""
        return self._lent is not None and self._lent.is_in_use()


_offset = attrgetter("offset")


class OutputPool:
    """Hands out ranges of one growing memory: the first bytes that are free, where other ranges may lie too."""

    def __init__(self, memory: Memory):
        self._memory = memory
        self._ranges: WeakValueDictionary[Span, OutputRange] = WeakValueDictionary()
        self._by_storage: WeakValueDictionary[int, OutputRange] = WeakValueDictionary()
        self._lent: list[OutputRange] = []  # those that may be live, by offset; no two of them overlap

    @property
    def device(self) -> torch.device:
        return self._memory.device

    @property
    def address(self) -> int:
        """Of the first byte; it never changes."""
        return self._memory.address

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, all of them really there."""
        return self._memory.nbytes

    @property
    def tensor(self) -> torch.Tensor:
        """The pooled output tensor: uint8, ``nbytes`` long. Outputs are views of its memory."""
        return self._memory.bytes_at(0, self._memory.nbytes)

    def bytes(self, offset: int, nbytes: int) -> torch.Tensor:
        """``nbytes`` bytes as a uint8 tensor with a storage of its own, to write them."""
        with outside_inference_mode():
            return self._memory.bytes_at(offset, nbytes)

    def find_room(self, nbytes: int, taken: Sequence[Span], preferred: Iterable[Span] = ()) -> OutputRange:
        """A range of at least ``nbytes`` bytes in which nothing is live, or ``taken``: a preferred one, or the first.

        What is taken outside of the pool does not matter. Raises ``torch.OutOfMemoryError`` if the device is full.
        """
        size = _aligned(nbytes)
        busy = sorted([*(span for span in taken if span[0] >= 0), *(r.span for r in self.live_ranges())])
        for first, end in preferred:
            if end - first == size and not any(a < end and first < b for a, b in busy):
                return self._range(first, size)
        offset = 0
        for first, end in busy:
            if first - offset >= size:
                break
            offset = max(offset, _aligned(end))
        self._memory.grow(offset + size)
        return self._range(offset, size)

    def _range(self, offset: int, nbytes: int) -> OutputRange:
        """Ranges are the same where their bytes are."""
        found = self._ranges.get((offset, nbytes))
        if found is None:
            found = self._ranges[offset, nbytes] = OutputRange(offset, nbytes)
        return found

    # ---- which bytes are alive

    def is_free(self, spans: Iterable[Span]) -> bool:
        """Whether nothing in them is live. Dead ranges stay listed: most likely they are lent again at once."""
        lent = self._lent
        for first, end in spans:
            position = bisect_left(lent, end, key=_offset) - 1
            while position >= 0 and lent[position].end > first:
                if lent[position].is_live():
                    return False
                position -= 1
        return True

    def live_in(self, span: Span) -> list[OutputRange]:
        """The ranges with a live output that share a byte with ``span``."""
        live: list[OutputRange] = []
        first, end = span
        position = bisect_left(self._lent, end, key=_offset)
        while position and self._lent[position - 1].end > first:
            position -= 1
            if self._lent[position].is_live():
                live.append(self._lent[position])
            else:
                self._lent.pop(position)._is_listed = False
        return live

    def live_ranges(self) -> list[OutputRange]:
        for taken in list(self._lent):
            if not taken.is_live():
                self._unlist(taken)
        return list(self._lent)

    def free_spans(self) -> list[Span]:
        """All bytes of the pool in which nothing is live."""
        bounds = [0, *(bound for taken in self.live_ranges() for bound in taken.span), self.nbytes]
        return [(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=True) if a < b]

    # ---- outputs

    def storage_of(self, taken: OutputRange, nbytes: int) -> RangeStorage:
        """The storage over the first ``nbytes`` bytes of a range, made once."""
        found = taken._storages.get(nbytes)
        if found is None or not found.is_in_place():
            found = taken._storages[nbytes] = RangeStorage(self.bytes(taken.offset, nbytes).untyped_storage())
            self._by_storage[found.cdata] = taken
        return found

    def lend(self, taken: OutputRange, nbytes: int, loan: Loan, step: Step) -> RangeStorage:
        """The storage over the first ``nbytes`` bytes, for a call's outputs. Nothing there may be live."""
        lent = self.storage_of(taken, nbytes)
        if not taken._is_listed:
            self._list(taken)
        taken._lent, taken.loan, taken.step, taken.thread = lent, loan, step, get_ident()
        lent.lend()
        return lent

    def _list(self, taken: OutputRange) -> None:
        """In place of those that it overlaps, which are dead."""
        lent = self._lent
        first = position = bisect_left(lent, taken.offset, key=_offset)
        if first and lent[first - 1].end > taken.offset:
            first -= 1
        while position < len(lent) and lent[position].offset < taken.end:
            position += 1
        for other in lent[first:position]:
            assert not other.is_live()
            other._is_listed = False
        lent[first:position] = [taken]
        taken._is_listed = True

    def _unlist(self, taken: OutputRange) -> None:
        self._lent.remove(taken)
        taken._is_listed = False

    def holder(self, storage: torch.UntypedStorage) -> OutputRange | None:
        """The range whose live outputs are on this storage."""
        taken = self._by_storage.get(storage._cdata)
        return None if taken is None or self.lent(storage) is None else taken

    def lent(self, storage: torch.UntypedStorage) -> RangeStorage | None:
        """What is known of this storage, if live outputs of a range are on it."""
        taken = self._by_storage.get(storage._cdata)
        lent = None if taken is None else taken._lent
        return lent if lent is not None and lent.cdata == storage._cdata and lent.is_in_place() else None

    def invalidate(self, taken: OutputRange) -> None:
        """Let every later access to a live output raise. The range is then free.

        CPU builds of torch can't see all accesses. There tensors that Python knows raise, and the range stays taken.
        """
        assert taken._lent is not None
        if taken.loan is None:
            return
        storage, message = taken._lent.storage, taken.loan.overwritten()
        taken.loan = None
        if CAN_FORBID_ACCESS:
            self._forget(taken)
        forbid_access(storage, message)

    def _forget(self, taken: OutputRange) -> None:
        """Take a live output for dead."""
        assert taken._lent is not None
        taken._storages.pop(taken._lent.nbytes, None)
        self._by_storage.pop(taken._lent.cdata, None)
        taken._lent = None
        self._unlist(taken)


def _aligned(nbytes: int) -> int:
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
