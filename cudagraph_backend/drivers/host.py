"""The host driver: no graphs, but the same fixed addresses, staging and outputs, on the CPU.

It makes everything above the driver testable without a GPU. ``replay`` runs the compiled region on the addresses it
was captured with.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cudagraph_backend.memory.copies import StagedCopy, Staging, prepare

_RESERVED = 1 << 36  # 64 GiB of addresses; a page takes memory when it is first written
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on; the value is Linux's


class HostMemory:
    """An anonymous map of addresses, used from its beginning."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._map = _reserve(_RESERVED)
        self.address = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        self.nbytes = 0

    def grow(self, nbytes: int) -> None:
        if nbytes > len(self._map):
            raise torch.OutOfMemoryError(f"the output pool needs {nbytes} bytes; {len(self._map)} are reserved")
        self.nbytes = max(self.nbytes, nbytes)

    def bytes_at(self, offset: int, nbytes: int) -> torch.Tensor:
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=offset)


def _reserve(nbytes: int) -> mmap.mmap:
    """Map ``nbytes`` of anonymous memory, or less where the system limits addresses (``ulimit -v``, overcommit)."""
    try:
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except OSError:
        if nbytes <= 1 << 26:
            raise
        return _reserve(nbytes // 2)


@dataclass(frozen=True, slots=True)
class HostGraph:
    run: Callable[[], None]
    executable_nbytes: int = 0

    def replay(self, staging: Staging, args: Sequence[Any]) -> None:
        staging(args)
        self.run()


class HostDriver:
    poison = False

    def __init__(self, device: torch.device):
        self.device = device

    def new_memory(self) -> HostMemory:
        return HostMemory()

    def allocate(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.empty_strided(size, stride, dtype=dtype, device="cpu")
        if self.poison:
            torch.empty(0, dtype=torch.uint8, device="cpu").set_(buffer.untyped_storage()).fill_(0xFF)
        return buffer

    def capture(
        self, run: Callable[[], None], *, draws: bool, stages: bool, generators: Sequence[torch.Generator] = ()
    ) -> HostGraph:
        return HostGraph(run)

    def seconds(self, run: Callable[[], object]) -> None:
        """Return ``None``, without a run: graphs on the host are there for tests, and no faster than plain calls."""

    def prepare_staging(self, copies: Sequence[StagedCopy], in_place: Sequence[StagedCopy]) -> Staging:
        return prepare(copies, in_place)

    def join(self) -> None:
        """Do nothing: there are no streams."""

    def is_capturing(self) -> bool:
        return False

    def scratch_nbytes(self) -> int:
        return 0
