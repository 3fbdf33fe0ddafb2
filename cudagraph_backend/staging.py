"""Staging: backend-owned input buffers that graphs read, filled with a call's real rows and padded rows.

All buckets of a region share one buffer per staged input; a bucket is a view of its beginning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from cudagraph_backend.fill import Fill
from cudagraph_backend.region import TensorInput, Values, evaluate_all
from cudagraph_backend.strides import Shape, extent, overlaps_itself, reaching_once
from cudagraph_backend.torch_internals import outside_inference_mode

_PROVIDED_AT_ONCE = 1 << 28  # bytes of one buffer; beyond 256 MiB a bound is no reason to take memory in advance


def shape_at(tensor: TensorInput, values: Values) -> Shape:
    return evaluate_all(tensor.size, values), evaluate_all(tensor.stride, values)


@dataclass(frozen=True, slots=True)
class StagedCopy:
    """How one call's argument gets into its buffer, and its padded rows get filled.

    Attributes:
        index: which argument.
        real: view of the buffer that the argument is copied to, shaped as ``source`` makes the argument.
        source: size and stride to view the argument with before copying, so that entries which share an address are
            copied once; ``None``: as it is.
        fills: padded rows, and what they are filled with: entries of the buffer (broadcast) or a number.
    """

    index: int
    real: torch.Tensor
    source: Shape | None
    fills: tuple[tuple[torch.Tensor, torch.Tensor | float], ...]

    def argument(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.source is None else tensor.as_strided(*self.source)


def stage(copies: Sequence[StagedCopy], args: Sequence[torch.Tensor]) -> None:
    """Copy the real rows of every staged argument into its buffer, then fill the padded rows."""
    if not copies:
        return
    torch._foreach_copy_([c.real for c in copies], [c.argument(args[c.index]) for c in copies])
    for copy in copies:
        for padded, value in copy.fills:
            if isinstance(value, torch.Tensor):
                padded.copy_(value)
            else:
                padded.fill_(value)


def write_back(copies: Sequence[StagedCopy], args: Sequence[torch.Tensor], mutated: Collection[int]) -> None:
    """Staged arguments that the region wrote in place: their real rows go back to the caller's tensor."""
    for copy in copies:
        if copy.index in mutated:
            copy.argument(args[copy.index]).copy_(copy.real)


def shares_memory(inputs: Sequence[TensorInput], args: Sequence[torch.Tensor]) -> bool:
    """Whether an argument that the region writes meets another one in memory, and staging would take them apart.

    The compiled region sees a write through both; AOTAutograd guards against the overlap only if there was one when it
    compiled.
    """
    written = [(i, *_byte_span(args[i.index])) for i in inputs if i.mutated]
    others = [(i, *_byte_span(args[i.index])) for i in inputs if i.mutated or i.role == "staged"]
    if any(i.role == "staged" for i, _, _ in written):
        others = [(i, *_byte_span(args[i.index])) for i in inputs]
    return any(
        a is not b and (a.role == "staged" or b.role == "staged") and start < b_end and b_start < end
        for a, start, end in written
        for b, b_start, b_end in others
    )


def _byte_span(tensor: torch.Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + extent(tensor.shape, tensor.stride()) * tensor.element_size()


class StagingBuffers:
    """The buffers of one region. Buffers grow by replacement; graphs made before keep the one they read."""

    def __init__(self, device: torch.device):
        self._device = device
        self._buffers: dict[int, torch.Tensor] = {}

    def buffers(self) -> list[torch.Tensor]:
        return list(self._buffers.values())

    def at(self, tensor: TensorInput, bucket: Shape, largest: Shape) -> torch.Tensor:
        """The buffer of ``tensor``, seen at a bucket's size and stride; room is made for ``largest`` at once.

        Raises ``torch.OutOfMemoryError`` (or, on a CPU, ``RuntimeError``) if there is none.
        """
        need, provided = max(extent(*bucket), 1), extent(*largest)
        if provided * tensor.dtype.itemsize > _PROVIDED_AT_ONCE:
            provided = need
        buffer = self._buffers.get(tensor.index)
        with outside_inference_mode():
            if buffer is None or buffer.numel() < need:
                buffer = torch.zeros(max(need, provided), dtype=tensor.dtype, device=self._device)
                self._buffers[tensor.index] = buffer
            return buffer.as_strided(*bucket)


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
        return StagedCopy(index, buffer.as_strided(*once), source, ())
    fills = tuple(_fills(buffer, once[0], row_entries, fill))
    return StagedCopy(index, _narrowed(buffer, once[0]), source, fills)


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
