"""Dispatch: sizes of a call -> plan -> bucket -> graph. All that one region holds on its device hangs off its table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cudagraph_backend import buckets
from cudagraph_backend.devices import Device
from cudagraph_backend.drivers import Graph
from cudagraph_backend.errors import Refusal, is_out_of_memory
from cudagraph_backend.fill import Fill
from cudagraph_backend.options import Options
from cudagraph_backend.outputs import Layout, layout_at
from cudagraph_backend.region import DynamicDim, Region, TensorInput, Values, evaluate
from cudagraph_backend.staging import StagedCopy, StagingBuffers, shape_at, staged_copy
from cudagraph_backend.strides import overlaps_itself
from cudagraph_backend.torch_internals import Compiled, addresses_equal
from cudagraph_backend.tree import CapturedGraph, Ranges

Sizes = tuple[int, ...]

_TOO_MANY_GRAPHS = Refusal("the region holds max_graphs graphs")
_STATIC_INPUTS_MOVE = Refusal("static inputs keep moving to new addresses")
_NO_MEMORY = Refusal("no memory for the staging buffers")
_PROBES_PER_SIZE = 3  # that couldn't tell; some inputs never do (token types are mostly zeros), and each one costs runs
_ADDRESSES_PER_BUCKET = 64  # a loop over layers calls one region with as many sets of parameters
_UNUSED_CAPTURES = 8


@dataclass(slots=True)
class Bucket:
    """One combination of capture sizes of a region, and its graphs: one per set of addresses.

    ``args`` holds sizes and staging buffers by argument, ``None`` where the call's own (static) argument goes.
    ``layout`` is observed at the first capture. ``unused`` counts captures since a graph was last replayed, and
    ``last_addresses`` are the static addresses that were refused last.
    """

    sizes: Sizes
    args: list[Any]
    layout: Layout | None = None
    graphs: list[CapturedGraph] = field(default_factory=list)
    unused: int = 0
    last_addresses: list[int] | None = None


@dataclass(slots=True)
class Plan:
    """All that is decided for one combination of real sizes.

    ``counts`` are the region's ``CountInput``s for them; ``to_probe`` are the padded dims that the probe must look at
    before the plan may answer a call.
    """

    sizes: Sizes
    bucket: Bucket
    copies: tuple[StagedCopy, ...]
    rows_real: int
    rows_padded: int
    counts: tuple[torch.Tensor, ...] = ()
    to_probe: tuple[DynamicDim, ...] = ()
    layout: Layout | None = None


class Table:
    """The plans, buckets, staging buffers and place of one region.

    ``dims`` are the region's, those refused that failed the probe. ``probed`` has the buckets in which a dim passed,
    and ``postponed`` why the probe couldn't tell at a call, once per such call.
    """

    def __init__(self, region: Region, options: Options, device: Device, place: Hashable, compiled: Compiled):
        self.region = region
        self.device = device
        self.place = device.place(place)
        self.run = device.driver.prepare(compiled)
        self.staging = StagingBuffers(region.device)
        self.dims = region.dims
        self.probed: dict[str, set[int]] = {}
        self.postponed: dict[Sizes, list[str]] = {}
        self.buckets: dict[Sizes, Bucket] = {}
        self._plans: dict[Sizes, Plan | Refusal] = {}
        self._options = options
        self.static = [i.index for i in region.inputs if i.role == "static"]
        self.staged = [i for i in region.inputs if i.role == "staged"]

    def plan(self, sizes: Sizes) -> Plan | Refusal:
        """The plan for a call's sizes, or why such calls run the compiled region."""
        plan = self._plans.get(sizes)
        if plan is None:
            plan = self.plan_without((), sizes)
            if plan is not _NO_MEMORY:  # not remembered, as memory may come back
                self._plans[sizes] = plan
        return plan

    def plan_without(self, dims: Collection[DynamicDim], sizes: Sizes) -> Plan | Refusal:
        """A new plan for a call's sizes, with ``dims`` at their exact sizes."""
        try:
            return self._new_plan(sizes, without=dims)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return _NO_MEMORY

    def refuse(self, sizes: Sizes, refusal: Refusal) -> None:
        """From now on calls of these sizes run the compiled region."""
        self._plans[sizes] = refusal

    def pass_probe(self, plan: Plan) -> None:
        """From now on the plan answers calls."""
        values = self.region.values(plan.bucket.sizes)
        for dim in plan.to_probe:
            self.probed.setdefault(dim.name, set()).add(values[next(iter(dim.symbols))])
        plan.to_probe = ()

    def postpone_probe(self, plan: Plan, reason: str) -> Plan | Refusal:
        """The plan to answer this call with, which the probe can't tell about: dims without a proof aren't padded.

        Its sizes keep that plan if this goes on.
        """
        unproven = [dim for dim in plan.to_probe if dim.to_probe is not None]
        instead = self.plan_without(unproven, plan.sizes)
        if isinstance(instead, Plan):
            instead.to_probe = ()
        reasons = self.postponed.setdefault(plan.sizes, [])
        reasons.append(reason)
        if len(reasons) == _PROBES_PER_SIZE and instead is not _NO_MEMORY:
            self._plans[plan.sizes] = instead
        return instead

    def refuse_dims(self, dims: Collection[DynamicDim], refusal: Refusal) -> None:
        """From now on ``dims`` are not padded; nothing that was planned or captured with them is used again."""
        self.dims = tuple(replace(dim, refusal=refusal) if dim in dims else dim for dim in self.dims)
        self._plans.clear()
        self.postponed.clear()
        self.buckets.clear()

    def graph(self, plan: Plan, args: list[Any], ranges: Ranges) -> Graph | Refusal | None:
        """The graph to replay for a call; ``None`` if it must be captured first; or why it can't be."""
        if plan.layout is None and plan.bucket.layout is not None:
            plan.layout = layout_at(self.region, plan.bucket.layout, self.region.values(plan.sizes))
        for captured in plan.bucket.graphs:
            if captured.fits(ranges) and addresses_equal(args, captured.static_addresses, self.static):
                plan.bucket.unused = 0
                return captured.graph
        if self._graph_count() >= self._options.max_graphs:
            return _TOO_MANY_GRAPHS
        return self._refused_move(plan.bucket, args)

    def _refused_move(self, bucket: Bucket, args: list[Any]) -> Refusal | None:
        """After several captures that no call made use of, addresses must be met twice in a row to be captured."""
        if bucket.unused < _UNUSED_CAPTURES:
            return None
        addresses = [args[i].data_ptr() for i in self.static]
        if addresses == bucket.last_addresses:
            return None
        bucket.last_addresses = addresses
        return _STATIC_INPUTS_MOVE

    def _graph_count(self) -> int:
        return sum(len(bucket.graphs) for bucket in self.buckets.values())

    def add(self, bucket: Bucket, captured: CapturedGraph) -> None:
        """Keep a new graph; graphs whose output ranges have moved since are of no use any more."""
        for other in self.buckets.values():
            other.graphs = [graph for graph in other.graphs if self.place.has(graph)]
        bucket.graphs = [*bucket.graphs[1 - _ADDRESSES_PER_BUCKET :], captured]
        bucket.unused += 1

    def largest(self, values: Values, *, exact_dims: bool = False) -> Values:
        """The sizes to provide memory for: those of the largest bucket, as far as it is known.

        With ``exact_dims``, dims that are not padded count as well: buffers that grow one exact size at a time would
        be as many as there are sizes.
        """
        largest = dict(values)
        for dim in self.dims if exact_dims else self._padded_dims():
            sizes = self._options.capture_sizes if dim.refusal is None else "auto"
            size = buckets.largest(sizes, dim.upper, max(values[s] for s in dim.symbols))
            largest.update(dict.fromkeys(dim.symbols, size))
        return largest

    def _padded_dims(self) -> list[DynamicDim]:
        return [dim for dim in self.dims if dim.refusal is None]

    def _new_plan(self, sizes: Sizes, without: Collection[DynamicDim] = ()) -> Plan | Refusal:
        chosen = self._bucket_sizes(sizes, [dim for dim in self._padded_dims() if dim not in without])
        if isinstance(chosen, Refusal):
            return chosen
        if any(t.mutated and overlaps_itself(*shape_at(t, self.region.values(sizes))) for t in self.staged):
            return Refusal("an input that is written in place overlaps itself in memory")
        bucket = self.buckets.get(chosen)
        if bucket is None and self._graph_count() >= self._options.max_graphs:
            return _TOO_MANY_GRAPHS
        bucket = bucket or self._new_bucket(chosen)
        values, padded = self.region.values(sizes), self.region.values(chosen)
        rows = [next(iter(dim.symbols)) for dim in self._padded_dims()]
        return Plan(
            sizes,
            bucket,
            copies=tuple(self._staged_copy(tensor, bucket, values) for tensor in self.staged),
            rows_real=sum(values[s] for s in rows),
            rows_padded=sum(padded[s] - values[s] for s in rows),
            counts=tuple(count.make(values, self.region.device) for count in self.region.counts),
            to_probe=tuple(self._dims_to_probe(values, padded)),
        )

    def _dims_to_probe(self, values: Values, padded: Values) -> list[DynamicDim]:
        verifies = self._options.verify == "capture"
        dims = [d for d in self._padded_dims() if verifies or d.to_probe is not None]
        return [d for d in dims if any(values[s] != padded[s] for s in d.symbols)]

    def _bucket_sizes(self, sizes: Sizes, dims: Sequence[DynamicDim]) -> Sizes | Refusal:
        """The capture sizes that serve ``sizes``: padded for ``dims``, where they may be; exact elsewhere."""
        values = dict(self.region.values(sizes))
        for dim in dims:
            found = {values[s] for s in dim.symbols}
            # The proof holds for dims of equal size. Rows of an input that share memory can't be padded apart.
            if len(found) > 1 or self._overlaps(dim, values):
                continue
            n = found.pop()
            if n == 0:  # there is no last row to repeat
                continue
            size = buckets.choose(n, self._options.capture_sizes, dim.upper, self._admits(dim, values))
            if size is None:
                return Refusal(f"dim {dim.name} is larger than the largest of capture_sizes")
            values.update(dict.fromkeys(dim.symbols, size))
        kept = self._kept_equal(self.region.values(sizes), values, dims)
        return tuple(evaluate(s.size, kept) for s in self.region.sizes)

    def _kept_equal(self, real: Values, padded: Values, dims: Sequence[DynamicDim]) -> Values:
        """``padded``, with dims that have no proof padded only where sizes that are equal in the call stay equal.

        Such sizes may belong together, though neither a guard nor a proof says so: an index made of one may run out of
        the range of the other, which on a GPU is the end of the process's CUDA context.
        """
        apart = [
            s
            for dim in dims
            for s in dim.symbols
            if dim.to_probe is not None and len({padded[t] for t in real if real[t] == real[s]}) > 1
        ]
        if not apart:
            return padded
        kept = {**padded, **{s: real[s] for s in apart}}
        return kept if self.region.shapes.admits([evaluate(s.size, kept) for s in self.region.sizes]) else real

    def _admits(self, dim: DynamicDim, values: Values) -> Callable[[int], bool]:
        def admits(size: int) -> bool:
            padded = {**values, **dict.fromkeys(dim.symbols, size)}
            if self._overlaps(dim, padded):
                return False
            return self.region.shapes.admits([evaluate(s.size, padded) for s in self.region.sizes])

        return admits

    def _overlaps(self, dim: DynamicDim, values: Values) -> bool:
        return any(overlaps_itself(*shape_at(t, values)) for t in self.staged if t.symbols & dim.symbols)

    def _new_bucket(self, sizes: Sizes) -> Bucket:
        values = self.region.values(sizes)
        largest = self.largest(values, exact_dims=True)
        indices = [i.index for i in self.region.inputs] + [s.index for s in self.region.sizes]
        args: list[Any] = [None] * (1 + max(indices, default=-1))
        for source, size in zip(self.region.sizes, sizes, strict=True):
            if source.dim is None:
                args[source.index] = size
        for tensor in self.staged:
            args[tensor.index] = self.staging.at(tensor, shape_at(tensor, values), shape_at(tensor, largest))
        self.buckets[sizes] = Bucket(sizes, args)
        return self.buckets[sizes]

    def _staged_copy(self, tensor: TensorInput, bucket: Bucket, values: Values) -> StagedCopy:
        size, stride = shape_at(tensor, values)
        return staged_copy(
            tensor.index,
            buffer=bucket.args[tensor.index],
            real=(size, stride),
            row_entries=[self._row_entries(e, n, values) for e, n in zip(tensor.size, size, strict=True)],
            fill=self._fill(tensor),
        )

    def _row_entries(self, expression: Any, length: int, values: Values) -> int:
        """Entries per row of a dim whose size is ``expression``: 2 for ``2*s``."""
        rows = next((values[s] for s in expression.free_symbols if any(s in d.symbols for d in self._padded_dims())), 1)
        return max(length // max(rows, 1), 1)

    def _fill(self, tensor: TensorInput) -> Fill:
        irrelevant = not any(d.needs_fill for d in self._padded_dims() if d.symbols & tensor.symbols)
        if self.device.driver.poison and irrelevant and tensor.dtype.is_floating_point:
            return float("nan")
        return tensor.fill
