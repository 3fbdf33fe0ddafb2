"""Staging by the kernel: all inputs of a call at once, as the first node of the graph or in a launch of its own.

Everything that calls of one route have in common lies on the device in a table. What differs are the arguments'
addresses, which are arguments of the kernel. Not all staging fits: arguments on other devices, sixteen-byte numbers,
more than five dims. That is done input by input, as on any other device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch

from cudagraph_backend.drivers.staging_kernel.jobs import FEW_DIMS, MAX_SOURCES, Job, Launch, jobs, table
from cudagraph_backend.memory.copies import StagedCopy, Staging, prepare, stage
from cudagraph_backend.torch_internals import current_device_index, raw_stream

log = logging.getLogger("cudagraph_backend")

Key: TypeAlias = "tuple[int, ...]"

_ALIGNMENT = 16
_TABLES = 8  # of one route: arguments cut out of others may have any alignment, and each combination a table
_LAZY = {torch.float16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128}
"""What the real or imaginary part of a complex tensor can be, so that its memory may hold the negative of its value."""


@dataclass(frozen=True, slots=True)
class DeviceTable:
    """A table on the device. ``streams`` are those (raw) which the allocator knows that it is read on."""

    words: torch.Tensor
    address: int
    programs: int
    dims: int
    streams: set[int] = field(default_factory=set)


class Node(Protocol):
    """The staging kernel as part of a graph that is launched next; ``dims``: what its tables must have."""

    dims: int

    def stage(self, table: DeviceTable, sources: Sequence[int]) -> None: ...

    def skip(self) -> None: ...


class Launches:
    """Launches of the staging kernel on one device; the host's part of a launch is what staging mostly costs.

    ``launcher`` makes the function that launches the kernel of so many dims; default: ``stage.cached_launch``.
    """

    def __init__(self, device: torch.device, launcher: Callable[[int], Launch] | None = None):
        self._device = device
        self._launcher = launcher
        self._by_dims: dict[int, Launch] = {}
        self._idle: DeviceTable | None = None
        self.works = True

    def table(self, listed: Sequence[Job]) -> DeviceTable:
        """Put jobs on the device. Raises whatever goes wrong when the kernel is compiled, or memory is short."""
        made = table(listed)
        if made.dims not in self._by_dims:
            from cudagraph_backend.drivers.staging_kernel.kernel import (
                cached_launch,  # here, as a machine may lack Triton
            )

            with torch.cuda.device(self._device):
                self._by_dims[made.dims] = (self._launcher or cached_launch)(made.dims)
        words = torch.tensor(made.words, dtype=torch.int64, device="cpu").to(self._device)
        return DeviceTable(words, words.data_ptr(), made.programs, made.dims, {raw_stream(self._device.index)})

    def launch(self, table: DeviceTable, sources: Sequence[int]) -> None:
        """Launch on the device's current stream. ``sources`` are ``MAX_SOURCES`` at most."""
        stream = self.keep(table)
        sources = [*sources, *[0] * (MAX_SOURCES - len(sources))]
        launch = self._by_dims[table.dims]
        if current_device_index() == self._device.index:
            launch(table.programs, stream, table.address, sources)
        else:
            with torch.cuda.device(self._device):
                launch(table.programs, stream, table.address, sources)

    def keep(self, table: DeviceTable) -> int:
        """Let the allocator know that the table is read on the device's current stream, which is returned (raw)."""
        stream = raw_stream(self._device.index)
        if stream not in table.streams:
            table.words.record_stream(torch.cuda.current_stream(self._device))
            table.streams.add(stream)
        return stream

    def idle(self) -> DeviceTable | None:
        """Return a table with one program that does nothing, to capture the kernel with; ``None`` without a kernel."""
        if self._idle is None and _or_none(self, []) is not None:
            words = torch.zeros(8, dtype=torch.int64, device=self._device)  # its share is from 0 to 0
            self._idle = DeviceTable(words, words.data_ptr(), 1, FEW_DIMS)
        return self._idle


class StagingLaunch:
    """What one launch stages: any number of inputs, up to ``MAX_SOURCES`` of them copied.

    There is work in each of them, so that no table is empty. ``strides`` are those of the copied arguments, which are
    guarded: all calls of a route have the same.
    """

    def __init__(
        self,
        launches: Launches,
        copies: Sequence[StagedCopy],
        in_place: Sequence[StagedCopy],
        strides: Sequence[Sequence[int]],
    ):
        self._launches = launches
        self._copies, self._in_place, self._strides = copies, in_place, strides
        self._indices = [copy.index for copy in copies]
        self._lazy = [copy.index for copy in copies if copy.bucket.dtype in _LAZY]
        self._aligned: DeviceTable | None = None
        self._tables: dict[Key, DeviceTable | None] = {}

    def __call__(self, args: Sequence[torch.Tensor], node: Node | None = None) -> None:
        """Stage at the next launch of the ``node``'s graph, or now."""
        sources = [args[index].data_ptr() for index in self._indices]
        bits = 0
        for address in sources:
            bits |= address
        found = self._aligned if not bits % _ALIGNMENT else self._tables.get(_alignments(sources))
        if found is None:
            found = self._new_table(sources)
        for index in self._lazy:
            if args[index].is_neg() or args[index].is_conj():
                found = None
        if node is not None and found is not None and found.dims == node.dims:
            self._launches.keep(found)
            node.stage(found, sources)
            return
        if node is not None:
            node.skip()
        if found is None:
            stage(self._copies, self._in_place, args)
        else:
            self._launches.launch(found, sources)

    def _new_table(self, sources: Sequence[int]) -> DeviceTable | None:
        """Make a table for arguments at addresses of such alignment, if there are not many tables yet."""
        key = _alignments(sources)
        is_aligned = all(alignment == _ALIGNMENT for alignment in key)
        if key in self._tables or (len(self._tables) >= _TABLES and not is_aligned):
            return None
        listed: list[Job] = []
        for number, copy in enumerate(self._copies):
            listed += jobs(copy, self._strides[number], number, key[number]) or ()
        for copy in self._in_place:
            listed += jobs(copy, None) or ()
        found = _or_none(self._launches, listed)
        if is_aligned:
            self._aligned = found
        self._tables[key] = found
        return found


class KernelStaging:
    """The staging of one route; all is made ready at its first call, which shows where arguments are."""

    def __init__(self, launches: Launches, copies: Sequence[StagedCopy], in_place: Sequence[StagedCopy]):
        self._launches = launches
        self._copies, self._in_place = copies, in_place
        self._parts: list[StagingLaunch] | None = None
        self._others: list[Staging] = []  # by operators

    def __call__(self, args: Sequence[Any], node: Node | None = None) -> None:
        """Let ``node``, of the graph that is launched next, do what one launch can; what it can't is done now."""
        if self._parts is None:
            self._parts = self._made(args)
        for part in self._parts:
            part(args, node)
            node = None
        for operators in self._others:
            operators(args)
        if node is not None:
            node.skip()

    def _made(self, args: Sequence[Any]) -> list[StagingLaunch]:
        strides = {copy.index: copy.argument(args[copy.index]).stride() for copy in self._copies}
        work = {copy.index: _jobs(copy, args[copy.index], strides[copy.index]) for copy in self._copies}
        work |= {copy.index: jobs(copy, None) for copy in self._in_place}
        copies, in_place = [c for c in self._copies if work[c.index]], [c for c in self._in_place if work[c.index]]
        parts: list[StagingLaunch] = []
        for first in range(0, max(len(copies), bool(in_place)), MAX_SOURCES):
            some = copies[first : first + MAX_SOURCES]
            parts.append(
                StagingLaunch(self._launches, some, () if first else in_place, [strides[c.index] for c in some])
            )
        others = [[c for c in listed if work[c.index] is None] for listed in (self._copies, self._in_place)]
        self._others = [prepare(*others)] if any(others) else []
        return parts


def _jobs(copy: StagedCopy, argument: torch.Tensor, stride: Sequence[int]) -> Sequence[Job] | None:
    """Return the jobs of a copy, or ``None`` if the kernel can't make it, whatever the argument's alignment.

    Jobs of single bytes tell: they have most dims and units.
    """
    is_alike = argument.device == copy.bucket.device and argument.dtype == copy.bucket.dtype
    return jobs(copy, stride, alignment=1) if is_alike else None


def _alignments(addresses: Sequence[int]) -> Key:
    return tuple([address & -address & (_ALIGNMENT - 1) or _ALIGNMENT for address in addresses])


def _or_none(launches: Launches, listed: Sequence[Job]) -> DeviceTable | None:
    """Return a table of jobs; ``None`` if memory is short, or if the kernel does not work here, which is told once."""
    if not launches.works:
        return None
    try:
        return launches.table(listed)
    except torch.OutOfMemoryError:
        return None
    except Exception as error:
        launches.works = False
        log.warning("inputs are copied one by one, as the staging kernel fails: %s: %s", type(error).__name__, error)
        return None
