"""The output pool: one pooled uint8 tensor per device, in which every output of every bucket of every region lives."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cudagraph_backend.drivers import Memory
from cudagraph_backend.torch_internals import CAN_MOVE_STORAGE, outside_inference_mode, storage_users, swap_memory

ALIGNMENT = 512  # bytes; what the caching allocator gives, and more than any vectorised load needs


@dataclass(frozen=True, slots=True)
class Loan:
    """What a range was last handed out for."""

    region: str
    outputs: tuple[tuple[int, int, int], ...]
    """(output index, first byte, one past the last byte) per output, relative to the range."""
    step: tuple[int, int]


class RangeStorage:
    """A storage over the beginning of a range. Outputs of one size are made on it; it knows whether any is left."""

    __slots__ = ("_idle_holders", "_idle_users", "storage")

    def __init__(self, storage: torch.UntypedStorage):
        self.storage = storage
        self._idle_users = self._idle_holders = 0

    def lend(self) -> torch.UntypedStorage:
        """Nobody else may hold the storage when it is lent: what is counted now is the count of none."""
        self._idle_users = storage_users(self.storage._cdata)
        self._idle_holders = self._holders()
        return self.storage

    def is_in_use(self) -> bool:
        """Whether a tensor, a view or an export, or the storage object itself, is held by somebody else."""
        return storage_users(self.storage._cdata) > self._idle_users or self._holders() > self._idle_holders

    def _holders(self) -> int:
        return sys.getrefcount(self.storage)


class OutputRange:
    """A byte range of the pool, given to one output of a region, or to several that share a storage.

    Each size of output has a storage of its own over the range's beginning, made once and lent at every call.
    """

    __slots__ = ("_lent", "_memory", "_storages", "loan", "nbytes", "offset")

    def __init__(self, memory: Memory, offset: int, nbytes: int):
        self._memory = memory
        self._storages: dict[int, RangeStorage] = {}
        self._lent: RangeStorage | None = None
        self.offset = offset
        self.nbytes = nbytes
        self.loan: Loan | None = None

    def lend(self, nbytes: int, loan: Loan) -> torch.UntypedStorage:
        """A storage over the first ``nbytes`` bytes, for a call's outputs. The range must be free."""
        lent = self._storages.get(nbytes)
        if lent is None:
            lent = self._storages[nbytes] = RangeStorage(self.bytes(nbytes).untyped_storage())
        self._lent, self.loan = lent, loan
        return lent.lend()

    def bytes(self, nbytes: int) -> torch.Tensor:
        """The first ``nbytes`` bytes as a uint8 tensor, to write them."""
        with outside_inference_mode():
            return self._memory.bytes_at(self.offset, nbytes)

    def is_live(self) -> bool:
        """Whether an output, a view of one or an export of one still uses the range."""
        return self._lent is not None and self._lent.is_in_use()

    def is_lent_to(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is (a view of) the live output on the range."""
        return self._lent is not None and tensor.untyped_storage()._cdata == self._lent.storage._cdata

    def move_out(self) -> None:
        """Give the live output memory of its own, with its bytes; all tensors on it follow. The range is then free.

        Memory exported through DLPack or NumPy does not follow: it stays on the range.
        """
        assert self._lent is not None
        output = self._lent.storage
        with outside_inference_mode():
            moved = output.clone()
        swap_memory(output, moved)
        self._storages[moved.nbytes()] = RangeStorage(moved)
        self._lent = self.loan = None


class OutputPool:
    """Hands out ranges of one growing memory, first fit. A range that is freed while live is reused when it is dead."""

    def __init__(self, memory: Memory):
        self._memory = memory
        self._ranges: list[OutputRange] = []  # by offset
        self._retired: list[OutputRange] = []
        self.moved_out = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, all of them really there."""
        return self._memory.nbytes

    @property
    def tensor(self) -> torch.Tensor:
        """The pooled output tensor: uint8, ``nbytes`` long. Outputs are views of its memory."""
        return self._memory.bytes_at(0, self._memory.nbytes)

    def allocate(self, nbytes: int) -> OutputRange:
        """A range of at least ``nbytes`` bytes. Raises ``torch.OutOfMemoryError`` if the device is full."""
        self._drop_dead()
        size = _aligned(nbytes)
        offset = 0
        for taken in self._ranges:
            if taken.offset - offset >= size:
                break
            offset = taken.offset + taken.nbytes
        self._memory.grow(offset + size)
        new = OutputRange(self._memory, offset, size)
        self._ranges.append(new)
        self._ranges.sort(key=lambda r: r.offset)
        return new

    def extend(self, taken: OutputRange, nbytes: int) -> bool:
        """Make a range longer where it stands, if nothing follows too closely."""
        self._drop_dead()
        size = _aligned(nbytes)
        position = self._ranges.index(taken)
        if position + 1 < len(self._ranges) and self._ranges[position + 1].offset < taken.offset + size:
            return False
        self._memory.grow(taken.offset + size)
        taken.nbytes = size
        return True

    def free(self, ranges: Sequence[OutputRange]) -> None:
        """May be called at any time, from a finaliser too."""
        self._retired.extend(ranges)

    def dead_ranges(self) -> list[OutputRange]:
        return [r for r in self._ranges if not r.is_live()]

    def move_all_out(self) -> None:
        """Give every live output memory of its own, where this torch can, so that the pool's memory can go."""
        for taken in self._ranges if can_move_out() else ():
            if taken.is_live():
                taken.move_out()

    def find(self, address: int) -> OutputRange | None:
        """The range that holds an address."""
        start = self._memory.address
        return next((r for r in self._ranges if r.offset <= address - start < r.offset + r.nbytes), None)

    def _drop_dead(self) -> None:
        retired, self._retired = self._retired, []
        live = [r for r in retired if r.is_live()]
        self._retired.extend(live)
        if len(live) < len(retired):
            self._ranges = [r for r in self._ranges if r not in retired or r in live]


def can_move_out() -> bool:
    """Whether this torch can move a live output (2.12 and later)."""
    return CAN_MOVE_STORAGE


def _aligned(nbytes: int) -> int:
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
