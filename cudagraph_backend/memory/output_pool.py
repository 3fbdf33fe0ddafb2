"""The output pool: one pooled uint8 tensor per device. Outputs of graphs, and the inputs that they read, lie in it.

A *range* is a place for one output, or for several that share a storage. Ranges may overlap: which of them hold live
outputs is known at every call, and what is written is checked against that. Live ranges never overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakValueDictionary

import torch

from cudagraph_backend.memory.growing import Memory
from cudagraph_backend.memory.live_ranges import LiveRanges
from cudagraph_backend.memory.output_range import Loan, OutputRange, RangeStorage, Step
from cudagraph_backend.memory.spans import Span
from cudagraph_backend.torch_internals import CAN_FORBID_ACCESS, forbid_access, outside_inference_mode

ALIGNMENT = 512  # bytes; what the caching allocator gives, and more than any vectorised load needs


class OutputPool:
    """Hands out ranges of one growing memory: the first bytes that are free, where other ranges may lie too.

    ``live`` tells which of them hold outputs that somebody still uses.
    """

    def __init__(self, memory: Memory):
        self._memory = memory
        self._ranges: WeakValueDictionary[Span, OutputRange] = WeakValueDictionary()
        self._by_storage: WeakValueDictionary[int, OutputRange] = WeakValueDictionary()
        self.live = LiveRanges()

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
        """Return ``nbytes`` bytes as a uint8 tensor with a storage of its own, to write them."""
        with outside_inference_mode():
            return self._memory.bytes_at(offset, nbytes)

    def find_room(self, nbytes: int, taken: Sequence[Span], preferred: Iterable[Span] = ()) -> OutputRange:
        """Find a range of at least ``nbytes`` in which nothing is live or ``taken``: a preferred one, or the first.

        What is taken outside of the pool does not matter. Raises ``torch.OutOfMemoryError`` if the device is full.
        """
        size = _aligned(nbytes)
        busy = sorted([*(span for span in taken if span[0] >= 0), *(r.span for r in self.live.all())])
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
        """Return the range of these bytes, the same one every time."""
        found = self._ranges.get((offset, nbytes))
        if found is None:
            found = self._ranges[offset, nbytes] = OutputRange(offset, nbytes)
        return found

    # ---- which bytes are alive

    def free_spans(self) -> list[Span]:
        """Return all bytes of the pool in which nothing is live."""
        bounds = [0, *(bound for taken in self.live.all() for bound in taken.span), self.nbytes]
        return [(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=True) if a < b]

    # ---- outputs

    def storage_of(self, taken: OutputRange, nbytes: int) -> RangeStorage:
        """Return the storage over the first ``nbytes`` bytes of a range, made once."""
        return taken.storage(nbytes) or self._new_storage(taken, nbytes)

    def _new_storage(self, taken: OutputRange, nbytes: int) -> RangeStorage:
        made = taken.keep(self.bytes(taken.offset, nbytes).untyped_storage())
        self._by_storage[made.cdata] = taken
        return made

    def lend(self, taken: OutputRange, nbytes: int, loan: Loan, step: Step) -> RangeStorage:
        """Hand out the storage over the first ``nbytes`` bytes, for a call's outputs. Nothing there may be live."""
        lent = taken.storage(nbytes) or self._new_storage(taken, nbytes)
        self.live.add(taken)
        taken.lend(lent, loan, step)
        return lent

    def holder(self, storage: torch.UntypedStorage) -> OutputRange | None:
        """Return the range whose live outputs are on this storage."""
        taken = self._by_storage.get(storage._cdata)
        return None if taken is None or self.lent(storage) is None else taken

    def lent(self, storage: torch.UntypedStorage) -> RangeStorage | None:
        """Return what is known of this storage, if live outputs of a range are on it."""
        taken = self._by_storage.get(storage._cdata)
        lent = None if taken is None else taken.lent
        return lent if lent is not None and lent.cdata == storage._cdata and lent.is_in_place() else None

    def invalidate(self, taken: OutputRange) -> None:
        """Let every later access to a live output raise. The range is then free.

        CPU builds of torch can't see all accesses. There tensors that Python knows raise, and the range stays taken.
        """
        assert taken.lent is not None
        if taken.loan is None:
            return
        storage, message = taken.lent.storage, taken.loan.overwritten()
        taken.loan = None
        if CAN_FORBID_ACCESS:
            self._by_storage.pop(taken.forget().cdata, None)
            self.live.remove(taken)
        forbid_access(storage, message)


def _aligned(nbytes: int) -> int:
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
