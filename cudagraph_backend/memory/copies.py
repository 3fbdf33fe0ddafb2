"""Staged copies: a call's arguments get to where a graph reads them, and padded rows are filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from cudagraph_backend.fill import Fill
from cudagraph_backend.memory.spans import Span
from cudagraph_backend.memory.strides import Shape, extent, overlaps_itself, reaching_once

_ALIGNMENT = 16  # bytes; Inductor's kernels rely on it for inputs that were aligned when it compiled


def compact(tensor: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """Return a copy with these strides; an expanded dim (stride 0) stays one."""
    copy = tensor.new_empty_strided(tensor.shape, stride)
    once = tuple(slice(1) if step == 0 else slice(None) for step in stride)  # torch copies to no address twice
    copy[once].copy_(tensor[once])
    return copy


def byte_span(tensor: torch.Tensor) -> Span:
    """Return the addresses of a tensor's first byte and of the one behind its last."""
    start = tensor.data_ptr()
    return start, start + extent(tensor.shape, tensor.stride()) * tensor.element_size()


def is_aligned(address: int) -> bool:
    return address % _ALIGNMENT == 0


@dataclass(frozen=True, slots=True)
class StagedCopy:
    """How one call's argument gets into the buffer that a graph reads, and its padded rows get filled.

    Attributes:
        index: which argument.
        real: view of the buffer that the argument is copied to, shaped as ``source`` makes the argument.
        source: size and stride to view the argument with before copying, so that entries which share an address are
            copied once; ``None``: as it is.
        fills: padded rows, and what they are filled with: entries of the buffer (broadcast) or a number.
        bucket: all rows of the buffer; ``real`` is their beginning.
        row_entries: per dim, how many consecutive entries make a row.
        fill: what padded rows hold.
    """

    index: int
    real: torch.Tensor
    source: Shape | None
    fills: tuple[tuple[torch.Tensor, torch.Tensor | float], ...]
    bucket: torch.Tensor
    row_entries: tuple[int, ...]
    fill: Fill

    def span(self, args: Sequence[torch.Tensor]) -> Span:
        """Return the addresses that the argument reaches."""
        return byte_span(self.argument(args[self.index]))

    def argument(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.source is None else tensor.as_strided(*self.source)


Staging: TypeAlias = "Callable[..., None]"
"""Stages the arguments of a call, ``(args)``; made once for all calls with the same sizes, strides and places.

Graphs of the driver that made it may give it more, as their part in the work.
"""


def prepare(copies: Sequence[StagedCopy], in_place: Sequence[StagedCopy]) -> Staging:
    """Make the staging of a route with operators of torch, which works on any device."""
    return partial(stage, copies, in_place)


def stage(copies: Sequence[StagedCopy], in_place: Sequence[StagedCopy], args: Sequence[torch.Tensor]) -> None:
    """Copy the real rows of arguments to where the graph reads them; fill padded rows, of those ``in_place`` too."""
    if copies:
        torch._foreach_copy_([c.real for c in copies], [c.argument(args[c.index]) for c in copies])
    for copy in (*copies, *in_place):
        for padded, value in copy.fills:
            if isinstance(value, torch.Tensor):
                padded.copy_(value)
            else:
                padded.fill_(value)


def write_back(written: Sequence[StagedCopy], args: Sequence[torch.Tensor]) -> None:
    """Copy the real rows of arguments that the region wrote in place back to the caller's tensors."""
    for copy in written:
        copy.argument(args[copy.index]).copy_(copy.real)


def staged_copy(index: int, buffer: torch.Tensor, real: Shape, row_entries: Sequence[int], fill: Fill) -> StagedCopy:
    """Plan the copy of an argument with size and stride ``real`` into a bucket's ``buffer``.

    Args:
        row_entries: per dim, how many consecutive entries make a row (2 for a dim of size ``2*s``).
        fill: what padded rows hold: the last real row, zeros, or a number.
    """
    size, stride = real
    once = reaching_once(size, stride)
    source = None if once == real else once
    if overlaps_itself(size, stride):
        assert tuple(buffer.shape) == tuple(size), "an input that overlaps itself is never padded"
        flat = buffer.as_strided(*once)
        return StagedCopy(index, flat, source, (), flat, (1,), fill)
    fills = tuple(_fills(buffer, once[0], row_entries, fill))
    return StagedCopy(index, _narrowed(buffer, once[0]), source, fills, buffer, tuple(row_entries), fill)


def _fills(
    buffer: torch.Tensor, once: Sequence[int], row_entries: Sequence[int], fill: Fill
) -> Iterator[tuple[torch.Tensor, torch.Tensor | float]]:
    """Fill dim by dim; a dim that is filled counts as real for the next one. Expanded dims repeat by themselves."""
    done = list(once)
    for dim, length in enumerate(once):
        padded = buffer.size(dim) - length
        if padded == 0 or buffer.stride(dim) == 0:
            continue
        view = _narrowed(buffer, [n if d != dim else buffer.size(dim) for d, n in enumerate(done)])
        rest = view.narrow(dim, length, padded)
        if fill == "replica":
            entries = row_entries[dim]
            last = view.narrow(dim, length - entries, entries).unsqueeze(dim)
            yield rest.unflatten(dim, (padded // entries, entries)), last
        else:
            yield rest, 0.0 if fill == "zero" else fill
        done[dim] = buffer.size(dim)


def _narrowed(tensor: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    for dim, length in enumerate(size):
        tensor = tensor.narrow(dim, 0, length)
    return tensor
