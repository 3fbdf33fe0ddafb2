"""Outputs: where the compiled region's results go in the output pool, and the tensors a call gets back.

A bucket's *layout* says, for every output, whether it is a view on the pool, an argument handed back, or a number. It
is observed in the run before capture. From it and the region's expressions come the *views* of a call's real rows.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from cudagraph_backend.errors import Refusal
from cudagraph_backend.memory.copies import compact
from cudagraph_backend.memory.output_pool import OutputPool
from cudagraph_backend.memory.output_range import Loan, OutputRange, RangeStorage, Step
from cudagraph_backend.memory.strides import extent, reaching_once, same_places
from cudagraph_backend.region import ArgumentOutput, Region, TensorOutput, Values, evaluate, evaluate_all
from cudagraph_backend.torch_internals import outside_inference_mode


@dataclass(frozen=True, slots=True)
class StorageView:
    """A tensor on a storage; ``size``, ``stride`` and ``offset`` in elements."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes from the storage's first one to the last that the tensor reaches."""
        return (self.offset + extent(self.size, self.stride)) * self.dtype.itemsize

    def on(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """Return the tensor, one of its own (no autograd view)."""
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(
            storage, self.offset, self.size, self.stride
        )


def _view_of(tensor: torch.Tensor) -> StorageView:
    return StorageView(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


@dataclass(frozen=True, slots=True)
class Pooled:
    """An output in the output pool: a view on the range with this index among the place's ranges."""

    range: int
    view: StorageView


@dataclass(frozen=True, slots=True)
class Compacted:
    """An output whose padded rows lie between the real ones: a tensor of its own, copied from the range after replay.

    ``view`` is where the real rows are, ``stride`` what the output gets (``None``: dense, in the order of ``view``).
    """

    range: int
    view: StorageView
    stride: tuple[int, ...] | None

    def copied(self, storage: torch.UntypedStorage) -> torch.Tensor:
        rows = self.view.on(storage)
        return rows.clone() if self.stride is None else compact(rows, self.stride)


@dataclass(frozen=True, slots=True)
class Returned:
    """An output that is one of the arguments, or a view of a static one.

    The offset of ``view`` counts from the argument's beginning: the region may be called with parameters that lie
    elsewhere in their storage. ``None``: the argument itself.
    """

    index: int
    view: StorageView | None

    def of(self, argument: Any) -> Any:
        if self.view is None:
            return argument
        start = argument.storage_offset() * argument.element_size() // self.view.dtype.itemsize
        return replace(self.view, offset=start + self.view.offset).on(argument.untyped_storage())


@dataclass(frozen=True, slots=True)
class OnMeta:
    """An output on the device ``meta``, which has a shape and no memory: made anew at every call."""

    view: StorageView

    def tensor(self) -> torch.Tensor:
        return torch.empty_strided(self.view.size, self.view.stride, dtype=self.view.dtype, device="meta")


@dataclass(frozen=True, slots=True)
class Same:
    """An output that is the same tensor object as an earlier one, as autograd's version counters must know."""

    index: int


@dataclass(frozen=True, slots=True)
class Number:
    """An output that is a size, or ``None``."""

    value: int | None


Entry = Pooled | Compacted | Returned | OnMeta | Same | Number

_VIEWS = (Pooled, Returned, OnMeta)


@dataclass(frozen=True, slots=True)
class Layout:
    """Outputs at certain sizes, the bytes needed of each range, and what it is lent for (``None``: not lent)."""

    entries: tuple[Entry, ...]
    range_nbytes: tuple[int, ...]
    loans: tuple[Loan | None, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.range_nbytes)


def observed_layout(region: Region, outputs: Sequence[Any], args: Sequence[Any], values: Values) -> Layout | Refusal:
    """Return the layout of what one run at a bucket's sizes returned.

    Outputs that share a storage share a range. Returns a refusal if the run contradicts what the analysis expects.
    """
    returned = {id(args[i]): i for i in handed_back(region)}
    static = [(i.index, args[i.index]) for i in region.inputs if i.role == "static"]
    ranges: dict[int, int] = {}
    seen: dict[int, int] = {}
    entries: list[Entry] = []
    for index, (output, known) in enumerate(zip(outputs, region.outputs, strict=True)):
        if isinstance(known, ArgumentOutput):
            entries.append(Returned(known.argument, None))
            continue
        if not isinstance(output, torch.Tensor):
            entries.append(Number(output))
            continue
        if not isinstance(known, TensorOutput) or evaluate_all(known.size, values) != tuple(output.shape):
            return Refusal(f"output {index} has size {tuple(output.shape)}, which the graph does not state")
        if id(output) in returned:
            entries.append(Returned(returned[id(output)], None))
        elif id(output) in seen:
            entries.append(Same(seen[id(output)]))
        elif output.device.type == "meta":
            entries.append(OnMeta(_view_of(output)))
        elif (view := _view_of_static(output, static)) is not None:
            entries.append(view)
        else:
            storage = output.untyped_storage()._cdata
            entries.append(Pooled(ranges.setdefault(storage, len(ranges)), _view_of(output)))
        seen.setdefault(id(output), index)
    return _layout(region, entries)


def handed_back(region: Region) -> frozenset[int]:
    """Return the indices of arguments that may come back as they are: the graph says so, or they are written in place.

    Any other one may come back as well, as memory for an output: what a backward gets is its own, and used again.
    """
    stated = {known.argument for known in region.outputs if isinstance(known, TensorOutput)}
    return frozenset(i.index for i in region.inputs if i.mutated or i.index in stated)


def _view_of_static(output: torch.Tensor, static: Sequence[tuple[int, torch.Tensor]]) -> Returned | None:
    """Return the output as a view of the static input that holds all of it, if there is one."""
    view = _view_of(output)
    for index, source in static:
        if source.untyped_storage()._cdata != output.untyped_storage()._cdata:
            continue
        start = source.storage_offset() * source.element_size()
        end = start + extent(source.shape, source.stride()) * source.element_size()
        first = view.offset * view.dtype.itemsize
        if start <= first and view.nbytes <= end and (first - start) % view.dtype.itemsize == 0:
            return Returned(index, replace(view, offset=(first - start) // view.dtype.itemsize))
    return None


def layout_at(region: Region, bucket: Layout, values: Values) -> Layout:
    """Return the layout of a call's real rows inside a bucket's: same places, the sizes and strides of the call."""
    entries: list[Entry] = []
    for entry, known in zip(bucket.entries, region.outputs, strict=True):
        if isinstance(known, TensorOutput) and isinstance(entry, _VIEWS) and entry.view is not None:
            size = evaluate_all(known.size, values)
            stride = None if known.stride is None else evaluate_all(known.stride, values)
            if isinstance(entry, Pooled) and not known.visible:
                stride = entry.view.stride  # a backward that is padded alike reads it where it lies
            real = _real_rows(entry, entry.view, size, stride)
            is_loss = region.kind == "forward" and known.visible and size == ()
            entries.append(_copied_if_alone(real, bucket) if is_loss else real)
        elif isinstance(entry, Number) and isinstance(known, sympy.Expr):
            entries.append(Number(evaluate(known, values)))
        else:
            entries.append(entry)
    return _layout(region, entries)


def _copied_if_alone(entry: Entry, bucket: Layout) -> Entry:
    """Let a call get a copy of a loss, unless that shares memory with other outputs.

    Nearly every training loop holds it until it has the next one. Lent, it would make every other step write elsewhere,
    and so have two graphs of each bucket.
    """
    if not isinstance(entry, Pooled) or sum(getattr(one, "range", None) == entry.range for one in bucket.entries) > 1:
        return entry
    return Compacted(entry.range, entry.view, ())


def _real_rows(
    entry: Pooled | Returned | OnMeta, bucket: StorageView, size: tuple[int, ...], stride: tuple[int, ...] | None
) -> Entry:
    """Return the first ``size`` entries of an output at a bucket's sizes, where they are or else as a compact copy."""
    stay = size == bucket.size if stride is None else same_places(size, stride, bucket.stride)
    if isinstance(entry, Pooled) and not stay:
        return Compacted(entry.range, replace(bucket, size=size), stride)
    return replace(entry, view=replace(bucket, size=size, stride=bucket.stride if stride is None else stride))


def apart_refusal(region: Region, layout: Layout) -> Refusal | None:
    """Return a refusal if outputs that share memory would each be copied compactly, and not share it any more.

    What the backward alone reads may be a copy.
    """
    outputs = zip(region.outputs, layout.entries, strict=True)
    visible = [entry for known, entry in outputs if not isinstance(known, TensorOutput) or known.visible]
    pooled = [entry.range for entry in visible if isinstance(entry, (Pooled, Compacted))]
    compacted = {entry.range for entry in layout.entries if isinstance(entry, Compacted)}
    if any(pooled.count(index) > 1 for index in compacted):
        return Refusal("outputs that share memory have padded rows between their real ones")
    return None


def range_nbytes_at(region: Region, bucket: Layout, values: Values) -> tuple[int, ...]:
    """Return the bytes that a bucket of other sizes will need of each range."""
    entries: list[Entry] = []
    for entry, known in zip(bucket.entries, region.outputs, strict=True):
        if isinstance(known, TensorOutput) and isinstance(entry, Pooled):
            stride = entry.view.stride if known.stride is None else evaluate_all(known.stride, values)
            entry = replace(entry, view=replace(entry.view, size=evaluate_all(known.size, values), stride=stride))
        entries.append(entry)
    return _layout(region, entries).range_nbytes


def stride_refusal(region: Region, bucket: Layout, values: Values) -> Refusal | None:
    """Return a refusal if Inductor stated other strides than it returned: other sizes would be a guess then."""
    for index, (entry, known) in enumerate(zip(bucket.entries, region.outputs, strict=True)):
        if not isinstance(entry, (Pooled, Returned)) or entry.view is None:
            continue
        if isinstance(known, TensorOutput) and known.stride is not None:
            stated, view = evaluate_all(known.stride, values), entry.view
            if not same_places(view.size, stated, view.stride):
                return Refusal(f"output {index} has strides {view.stride} where Inductor states {stated}")
    return None


def copy_out(layout: Layout, outputs: Sequence[Any], storages: Sequence[torch.UntypedStorage]) -> int:
    """Copy results of a run that are not in the pool yet to it, captured as part of the graph; return how many.

    ``storages`` are those of the layout's ranges.
    """
    targets, results = [], []
    for entry, output in zip(layout.entries, outputs, strict=True):
        if isinstance(entry, Pooled) and output.numel():
            size, stride = reaching_once(entry.view.size, entry.view.stride)
            target = replace(entry.view, size=size, stride=stride).on(storages[entry.range])
            if target.data_ptr() != output.data_ptr():
                targets.append(target)
                results.append(output.as_strided(size, stride))
    if targets:
        torch._foreach_copy_(targets, results)
    return len(targets)


def own_memory(layout: Layout, copied: Container[int], device: torch.device) -> dict[int, torch.UntypedStorage]:
    """Allocate memory that is no range's, for the copies that a call gets of the ranges with these indices.

    Raises ``torch.OutOfMemoryError``.
    """
    with outside_inference_mode():
        return {
            index: torch.empty(layout.range_nbytes[index], dtype=torch.uint8, device=device).untyped_storage()
            for index, loan in enumerate(layout.loans)
            if loan is not None and index in copied
        }


def make_outputs(
    layout: Layout,
    pool: OutputPool,
    ranges: Sequence[OutputRange],
    args: Sequence[Any],
    step: Step,
    own: Mapping[int, torch.UntypedStorage],
) -> list[Any]:
    """Make the tensors of one call: views of the real rows, marked as aliases of the output pool by the ranges' loans.

    Where a range has memory of a call's ``own``, they are on a copy there, and the range is not lent.
    """
    storages = []
    for index, (taken, nbytes, loan) in enumerate(zip(ranges, layout.range_nbytes, layout.loans, strict=False)):
        if index in own:
            own[index].copy_(pool.storage_of(taken, nbytes).storage)
            storages.append(RangeStorage(own[index]))
        else:
            storages.append(pool.lend(taken, nbytes, loan, step) if loan else pool.storage_of(taken, nbytes))
    outputs: list[Any] = []
    for entry in layout.entries:
        if isinstance(entry, Pooled):
            view = entry.view
            outputs.append(storages[entry.range].tensor(view.dtype, view.size, view.stride, view.offset))
        elif isinstance(entry, Compacted):
            outputs.append(entry.copied(storages[entry.range].storage))
        elif isinstance(entry, Returned):
            outputs.append(entry.of(args[entry.index]))
        elif isinstance(entry, OnMeta):
            outputs.append(entry.tensor())
        elif isinstance(entry, Same):
            outputs.append(outputs[entry.index])
        else:
            outputs.append(entry.value)
    return outputs


def detached(result: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return the first entries of a result along every dim, in memory of their own, in the result's order of dims."""
    for dim, length in enumerate(size):
        result = result.narrow(dim, 0, length)
    return result.clone()


def _layout(region: Region, entries: Sequence[Entry]) -> Layout:
    count = 1 + max((e.range for e in entries if isinstance(e, (Pooled, Compacted))), default=-1)
    nbytes = [0] * count
    extents: list[list[tuple[int, int, int]]] = [[] for _ in range(count)]
    for index, entry in enumerate(entries):
        if isinstance(entry, (Pooled, Compacted)):
            end = entry.view.nbytes
            nbytes[entry.range] = max(nbytes[entry.range], end)
        if isinstance(entry, Pooled):
            extents[entry.range].append((index, entry.view.offset * entry.view.dtype.itemsize, end))
    return Layout(tuple(entries), tuple(nbytes), tuple(_loan(region, found) if found else None for found in extents))


def _loan(region: Region, extents: Sequence[tuple[int, int, int]]) -> Loan:
    known = [region.outputs[index] for index, _, _ in extents]
    sources = tuple(output.source if isinstance(output, TensorOutput) else None for output in known)
    is_hidden = all(isinstance(output, TensorOutput) and not output.visible for output in known) and len(known) == 1
    return Loan(region.name, tuple(extents), sources, is_saved=region.kind != "inference", is_hidden=is_hidden)
