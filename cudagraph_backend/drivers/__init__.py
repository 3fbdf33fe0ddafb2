"""Drivers: how a graph is captured and replayed on a device. Everything above this protocol is the same code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from cudagraph_backend.memory.copies import StagedCopy, Staging
from cudagraph_backend.memory.growing import Memory


class Graph(Protocol):
    """A captured graph."""

    @property
    def executable_nbytes(self) -> int:
        """Device memory that its executable took when it was made, outside of all allocators, as far as it is seen."""

    def replay(self, staging: Staging, args: Sequence[Any]) -> None:
        """Stage a call's arguments, as the driver's ``prepare_staging`` made it, and run on the current stream."""


class Driver(Protocol):
    """Captures and replays graphs on one device."""

    device: torch.device
    poison: bool
    """Overwrite whatever must not be read (scratch, padded rows, dead outputs) with NaN. For tests."""

    def new_memory(self) -> Memory: ...

    def allocate(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return memory for a buffer of a region that is run or captured."""

    def capture(
        self, run: Callable[[], None], *, draws: bool, stages: bool, generators: Sequence[torch.Generator] = ()
    ) -> Graph:
        """Capture ``run`` without running it. It was run before, as what is lazy can't begin in a capture (autotuning).

        It may draw random numbers if it ``draws``, from the device's default generator and from ``generators``: each
        replay draws new ones. There are inputs to copy or to fill if it ``stages``.
        Raises ``CaptureError``, leaving nothing behind, if it can't be.
        """

    def seconds(self, run: Callable[[], object]) -> float | None:
        """Return the seconds that a run takes on the device; ``None``, without a run, where they would tell nothing."""

    def prepare_staging(self, copies: Sequence[StagedCopy], in_place: Sequence[StagedCopy]) -> Staging:
        """Make what stages the arguments of calls that take one route, whether or not a call ever takes it."""

    def join(self) -> None:
        """Let the current stream wait for all that called, or that used what they got: calls share memory."""

    def is_capturing(self) -> bool:
        """Return whether the current stream is already being captured, by somebody else."""

    def scratch_nbytes(self) -> int:
        """Return the bytes held by the memory pool, which all captures share."""
