"""Output ranges: bytes of the pool that outputs are written to, what they are lent for, and who still holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from sys import getrefcount
from threading import get_ident

import torch

from cudagraph_backend.memory.spans import Span
from cudagraph_backend.torch_internals import outside_inference_mode, same_storage, storage_users

Step = tuple[int, int]
"""One iteration as PyTorch counts it (``torch_internals.current_step``)."""


@dataclass(frozen=True, slots=True)
class Loan:
    """What a range is handed out for.

    Attributes:
        region: the region's name.
        outputs: (output index, first byte, one past the last byte) per output, relative to the range.
        sources: the source line of each of them, where it is known.
        is_saved: whether autograd may hold them: those of forward and backward regions.
        is_hidden: whether it is one output only, which a backward gets and no caller does: nobody has a part of it.
    """

    region: str
    outputs: tuple[tuple[int, int, int], ...]
    sources: tuple[str | None, ...] = ()
    is_saved: bool = False
    is_hidden: bool = False

    def overwritten(self) -> str:
        """Return the error of an access to such an output after its memory was needed (``on_overwrite="error"``)."""
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
        """Take the holders counted now for those of an idle storage: nobody else may hold it when it is lent."""
        self._idle_users, self._idle_holders = storage_users(self.cdata), getrefcount(self.storage)

    def tensor(self, dtype: torch.dtype, size: Sequence[int], stride: Sequence[int], offset: int) -> torch.Tensor:
        """Return a new tensor on the storage, one of its own (no autograd view); ``offset`` in elements."""
        source = self._sources.get(dtype)
        if source is None:
            source = self._sources[dtype] = self._new_source(dtype)
        return same_storage(source, size, stride, offset)

    def _new_source(self, dtype: torch.dtype) -> torch.Tensor:
        """Make the tensor that outputs are made from; it does not count as a holder of the storage."""
        users, holders = storage_users(self.cdata), getrefcount(self.storage)
        with outside_inference_mode():
            source = torch.empty(0, dtype=dtype, device=self.storage.device).set_(self.storage)
        self._idle_users += storage_users(self.cdata) - users
        self._idle_holders += getrefcount(self.storage) - holders
        return source

    def is_in_place(self) -> bool:
        """Return whether the storage still has the range's memory: ``share_memory_`` gives it another one."""
        return self.storage.data_ptr() == self.address

    def is_in_use(self) -> bool:
        """Return whether a tensor, a view or an export, or the storage object itself, is held by somebody else."""
        return storage_users(self.cdata) > self._idle_users or getrefcount(self.storage) > self._idle_holders


class OutputRange:
    """Bytes of the pool that outputs are written to.

    Each size of output has a storage of its own over the range's beginning, made once and lent at every call. ``lent``
    is the storage lent last; ``loan``, ``step`` and ``thread`` (the one that called) are those of that output.
    """

    __slots__ = ("__weakref__", "_storages", "lent", "loan", "nbytes", "offset", "step", "thread")

    def __init__(self, offset: int, nbytes: int):
        self.offset = offset
        self.nbytes = nbytes
        self.loan: Loan | None = None
        self.step: Step = (0, 0)
        self.thread = 0
        self.lent: RangeStorage | None = None
        self._storages: dict[int, RangeStorage] = {}

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def is_saved(self) -> bool:
        return self.loan is not None and self.loan.is_saved

    @property
    def is_hidden(self) -> bool:
        return self.loan is not None and self.loan.is_hidden

    @property
    def span(self) -> Span:
        return self.offset, self.offset + self.nbytes

    def is_live(self) -> bool:
        """Return whether an output, a view of one or an export of one still uses the range."""
        return self.lent is not None and self.lent.is_in_use()

    def storage(self, nbytes: int) -> RangeStorage | None:
        """Return the storage over the first ``nbytes`` bytes; ``None`` if it was not made yet, or taken away."""
        found = self._storages.get(nbytes)
        return found if found is not None and found.is_in_place() else None

    def keep(self, storage: torch.UntypedStorage) -> RangeStorage:
        """Keep a storage over the first of its bytes, to be lent at every call that needs as many."""
        kept = self._storages[storage.nbytes()] = RangeStorage(storage)
        return kept

    def lend(self, storage: RangeStorage, loan: Loan, step: Step) -> None:
        """Hand out a storage for an output of this thread; nobody else may hold it."""
        self.lent, self.loan, self.step, self.thread = storage, loan, step, get_ident()
        storage.lend()

    def forget(self) -> RangeStorage:
        """Take a live output for dead; returns its storage, which is not lent again."""
        assert self.lent is not None
        forgotten, self.lent = self.lent, None
        self._storages.pop(forgotten.nbytes, None)
        return forgotten
