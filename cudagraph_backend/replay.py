"""The call path of one region: dispatch, staging, replay, outputs. ``Replayer.__call__`` is the hot path."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import sympy
import torch

from cudagraph_backend import buckets
from cudagraph_backend.devices import Device
from cudagraph_backend.drivers import Graph
from cudagraph_backend.errors import CaptureError, Refusal, RefusalError
from cudagraph_backend.options import Options
from cudagraph_backend.outputs import (
    Layout,
    copy_out,
    detached,
    layout_at,
    make_outputs,
    observed_layout,
    stride_refusal,
)
from cudagraph_backend.region import DynamicDim, Region, TensorInput, TensorOutput, Values, evaluate, evaluate_all
from cudagraph_backend.staging import StagedCopy, StagingBuffers, shape_at, stage, staged_copy
from cudagraph_backend.torch_internals import Compiled, addresses_equal, current_step
from cudagraph_backend.tree import CapturedGraph, Place, Ranges

log = logging.getLogger("cudagraph_backend")

Sizes = tuple[int, ...]

_CAPTURED_OUTSIDE = Refusal("called inside somebody else's capture")
_LIVE_OUTPUTS = Refusal("too many outputs of earlier calls are alive, and torch before 2.12 can't move them")
_TOO_MANY_GRAPHS = Refusal("the region holds max_graphs graphs")
_STATIC_INPUTS_MOVE = Refusal("static inputs keep moving to new addresses")
_ADDRESSES_PER_BUCKET = 64  # a loop over layers calls one region with as many sets of parameters


@dataclass(slots=True)
class Bucket:
    """One combination of capture sizes of a region, and its graphs: one per set of addresses."""

    sizes: Sizes
    args: list[Any]
    """Sizes and staging buffers, by argument; ``None`` where the call's own argument (a static input) goes."""
    layout: Layout | None = None
    graphs: list[CapturedGraph] = field(default_factory=list)


@dataclass(slots=True)
class Plan:
    """All that is decided for one combination of real sizes."""

    sizes: Sizes
    bucket: Bucket | None
    refusal: Refusal | None = None
    """Why calls of these sizes run the compiled region."""
    copies: tuple[StagedCopy, ...] = ()
    layout: Layout | None = None
    rows_real: int = 0
    rows_padded: int = 0


@dataclass(slots=True)
class Counters:
    """What a region did since it was compiled, or since the last reset."""

    captures: int = 0
    replays: int = 0
    rows_real: int = 0
    rows_padded: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)


class Replayer:
    """Calls a region: with one list of arguments, which it empties."""

    def __init__(
        self,
        region: Region,
        compiled: Compiled,
        options: Options,
        place: Hashable,
        register: Callable[[Replayer], None],
        device: Callable[[torch.device], Device],
    ):
        self.region = region
        self.options = options
        self.counters = Counters()
        self._compiled = compiled
        self._place_key = place
        self._register = register
        self._find_device = device
        self._refusal = region.refusal
        self._static = [i.index for i in region.inputs if i.role == "static"]
        self._staged = [i for i in region.inputs if i.role == "staged"]
        self._mutated = [i.index for i in self._staged if i.mutated]
        self.reset()
        self._make_known()

    def reset(self) -> None:
        """Forget graphs, buffers and place; the next call starts anew."""
        self.plans: dict[Sizes, Plan] = {}
        self.buckets: dict[Sizes, Bucket] = {}
        self.staging: StagingBuffers | None = None
        self.counters = Counters()
        self._place: Place | None = None
        self._device: Device | None = None
        self._run: Compiled = self._compiled
        self._is_registered = False

    # -------------------------------------------------------------------------------------------- the hot path

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if self._refusal is not None:
            return self._run_compiled(args, self._refusal)
        device = self._device or self._settle()
        if device.driver.is_capturing():
            return self._run_compiled(args, _CAPTURED_OUTSIDE)
        with device.lock:
            sizes = tuple([size.read(args) for size in self.region.sizes])
            plan = self.plans.get(sizes) or self._plan(sizes)
            ranges = self._place.free_ranges(len(plan.layout.range_nbytes) if plan.layout else None)
            graph = self._graph(plan, args, ranges)
            if isinstance(graph, Refusal):
                return self._run_compiled(args, graph)
            stage(plan.copies, args)
            if device.driver.poison:
                device.poison_dead_ranges()
            if graph is None:
                return self._capture(device, plan, args, ranges)
            graph.replay()
            return self._finish(plan, args, ranges)

    def _finish(self, plan: Plan, args: list[Any], ranges: Ranges) -> list[Any]:
        self._write_back(plan, args)
        self.counters.replays += 1
        self.counters.rows_real += plan.rows_real
        self.counters.rows_padded += plan.rows_padded
        outputs = make_outputs(plan.layout, ranges, args, self.region.name, current_step())
        args.clear()
        return outputs

    def _write_back(self, plan: Plan, args: list[Any]) -> None:
        """Staged arguments that the region writes in place: their real rows go back to the caller's tensor."""
        for copy in plan.copies:
            if copy.index in self._mutated:
                copy.argument(args[copy.index]).copy_(copy.real)

    def _graph(self, plan: Plan, args: list[Any], ranges: Ranges | None) -> Graph | Refusal | None:
        """The graph to replay, a refusal, or ``None`` if it must be captured first."""
        if plan.refusal is not None:
            return plan.refusal
        if ranges is None:
            return _LIVE_OUTPUTS
        if plan.layout is None and plan.bucket.layout is not None:
            plan.layout = layout_at(self.region, plan.bucket.layout, self.region.values(plan.sizes))
        for graph in plan.bucket.graphs:
            if graph.fits(ranges) and addresses_equal(args, graph.static_addresses, self._static):
                return graph.graph
        if sum(len(b.graphs) for b in self.buckets.values()) >= self.options.max_graphs:
            return _TOO_MANY_GRAPHS
        if len(plan.bucket.graphs) >= _ADDRESSES_PER_BUCKET:
            return _STATIC_INPUTS_MOVE
        return None

    def _run_compiled(self, args: list[Any], refusal: Refusal) -> Sequence[Any]:
        if self.options.strict:
            raise RefusalError(f"{self.region.name}: {refusal}")
        self._make_known()
        if refusal.reason not in self.counters.fallbacks:
            log.warning("%s runs uncaptured: %s", self.region.name, refusal)
        self.counters.fallbacks[refusal.reason] += 1
        return self._compiled(args)

    def _make_known(self) -> None:
        """After a reset only regions that are called again are reported."""
        if not self._is_registered:
            self._register(self)
            self._is_registered = True

    # -------------------------------------------------------------------------------------------- dispatch

    def _settle(self) -> Device:
        """Find the device's driver, pool and this region's place; done at the first call, and after a reset."""
        self._make_known()
        self._device = self._find_device(self.region.device)
        self._place = self._device.place(self._place_key)
        self.staging = StagingBuffers(self.region.device)
        self._run = self._device.driver.prepare(self._compiled)
        return self._device

    def _plan(self, sizes: Sizes) -> Plan:
        """Choose the bucket of a call's sizes and plan its staging."""
        chosen = self._bucket_sizes(sizes)
        if isinstance(chosen, Refusal):
            plan = Plan(sizes, None, chosen)
        else:
            try:
                bucket = self.buckets.get(chosen) or self._new_bucket(chosen)
                plan = self._plan_in(bucket, sizes)
            except torch.OutOfMemoryError:
                return Plan(sizes, None, Refusal("no memory for the staging buffers"))  # not remembered: memory may come back
        self.plans[sizes] = plan
        return plan

    def _bucket_sizes(self, sizes: Sizes) -> Sizes | Refusal:
        """The capture sizes that serve ``sizes``: padded where a dim may be, exact elsewhere."""
        region, values = self.region, dict(self.region.values(sizes))
        for dim in region.dims:
            found = {values[s] for s in dim.symbols}
            if dim.refusal is not None or len(found) > 1:  # linked dims of different size are exact
                continue
            (n,) = found
            at = {**values}

            def admits(size: int, at: dict = at, dim: DynamicDim = dim) -> bool:
                at.update(dict.fromkeys(dim.symbols, size))
                return region.shapes.admits([evaluate(s.size, at) for s in region.sizes])

            size = buckets.choose(n, self.options.capture_sizes, dim.upper, admits)
            if size is None:
                accepted = f"capture sizes reach {max(self.options.capture_sizes)}"
                return Refusal(f"size {n} of dim {dim.name} has no bucket: {accepted}")
            values.update(dict.fromkeys(dim.symbols, size))
        return tuple(evaluate(s.size, values) for s in region.sizes)

    def _new_bucket(self, sizes: Sizes) -> Bucket:
        region, values = self.region, self.region.values(sizes)
        largest = self._largest(values)
        count = 1 + max((i.index for i in (*region.inputs, *region.sizes)), default=-1)
        args: list[Any] = [None] * count
        for source, size in zip(region.sizes, sizes, strict=True):
            if source.dim is None:
                args[source.index] = size
        for tensor in self._staged:
            args[tensor.index] = self.staging.at(tensor, shape_at(tensor, values), shape_at(tensor, largest))
        self.buckets[sizes] = Bucket(sizes, args)
        return self.buckets[sizes]

    def _largest(self, values: Values) -> Values:
        """The sizes to provide memory for: those of the largest bucket, as far as it is known."""
        largest = dict(values)
        for dim in self.region.dims:
            if dim.refusal is None:
                bucket = max(values[s] for s in dim.symbols)
                size = buckets.largest(self.options.capture_sizes, dim.upper, bucket)
                largest.update(dict.fromkeys(dim.symbols, size))
        return largest

    def _plan_in(self, bucket: Bucket, sizes: Sizes) -> Plan:
        values, padded = self.region.values(sizes), self.region.values(bucket.sizes)
        copies = tuple(self._staged_copy(tensor, bucket, values) for tensor in self._staged)
        plan = Plan(sizes, bucket, copies=copies)
        for dim in self.region.dims:
            if dim.refusal is not None:
                continue
            symbol = next(iter(dim.symbols))
            plan.rows_real += values[symbol]
            plan.rows_padded += padded[symbol] - values[symbol]
        if bucket.layout is not None:
            plan.layout = layout_at(self.region, bucket.layout, values)
        return plan

    def _staged_copy(self, tensor: TensorInput, bucket: Bucket, values: Values) -> StagedCopy:
        rows = [next((values[s] for d in self.region.dims for s in d.symbols & e.free_symbols), 1) for e in tensor.size]
        size, stride = shape_at(tensor, values)
        entries = [max(length // n, 1) for length, n in zip(size, rows, strict=True)]
        fill: Any = self.options.fill
        needs_fill = any(d.needs_fill for d in self.region.dims if d.symbols & tensor.symbols)
        if self._device.driver.poison and not needs_fill and tensor.dtype.is_floating_point:
            fill = float("nan")
        return staged_copy(tensor.index, bucket.args[tensor.index], (size, stride), entries, fill)

    # -------------------------------------------------------------------------------------------- capture

    def _capture(self, device: Device, plan: Plan, args: list[Any], ranges: Ranges) -> Sequence[Any]:
        """Run the bucket once for real, which answers the call, then capture it without running it again."""
        bucket = plan.bucket
        inputs = [arg if own is None else own for arg, own in zip_longest(args, bucket.args)]
        try:
            results = device.driver.run_once(lambda: self._run(list(inputs)))
        except torch.OutOfMemoryError:
            if self.region.has_effects:
                raise
            plan.refusal = Refusal("no memory to run a padded bucket")
            return self._run_compiled(args, plan.refusal)
        refusal = self._provide_ranges(plan, results, inputs, ranges)
        if refusal is not None:
            plan.refusal = refusal
            return self._finish_detached(plan, args, inputs, results)
        copy_out(bucket.layout, results, ranges)
        del results
        self._record(device, bucket, inputs, ranges)
        return self._finish(plan, args, ranges)

    def _provide_ranges(self, plan: Plan, results: Sequence, inputs: Sequence, ranges: Ranges) -> Refusal | None:
        """Observe the bucket's layout and make the place's ranges large enough for it."""
        bucket, region = plan.bucket, self.region
        values = region.values(bucket.sizes)
        layout = observed_layout(region, results, inputs, values)
        if isinstance(layout, Refusal):
            return layout
        real = region.values(plan.sizes)
        if real != values and (refusal := stride_refusal(region, layout, values)):
            return refusal
        bucket.layout = layout
        plan.layout = layout_at(region, layout, real)
        largest = layout_at(region, layout, self._largest(values))
        needs = [max(pair) for pair in zip(layout.range_nbytes, largest.range_nbytes, strict=True)]
        try:
            self._place.reserve(ranges, needs)
        except torch.OutOfMemoryError as error:
            return Refusal(f"no memory for the output pool: {error}")
        return None

    def _record(self, device: Device, bucket: Bucket, inputs: list[Any], ranges: Ranges) -> None:
        run, layout = self._run, bucket.layout
        targets = list(ranges[: len(layout.range_nbytes)])

        def record() -> None:
            copy_out(layout, run(list(inputs)), targets)

        try:
            graph = device.driver.capture(record)
        except CaptureError as error:
            self._refusal = Refusal(f"capture failed: {error}")
            log.warning("%s runs uncaptured from now on: %s", self.region.name, self._refusal)
            return
        self.counters.captures += 1
        for other in self.buckets.values():
            other.graphs = [g for g in other.graphs if self._place.has(g)]
        addresses = [inputs[i].data_ptr() for i in self._static]
        bucket.graphs.append(CapturedGraph(graph, addresses, [r.offset for r in targets]))

    def _finish_detached(self, plan: Plan, args: list[Any], inputs: list[Any], results: Sequence[Any]) -> list[Any]:
        """Answer from a run whose results can't go to the pool: the real rows, in memory of their own."""
        values = self.region.values(plan.sizes)
        own = {id(value): args[i] for i, value in enumerate(inputs)}
        outputs: list[Any] = []
        for result, known in zip(results, self.region.outputs, strict=True):
            if isinstance(result, torch.Tensor) and isinstance(known, TensorOutput):
                real = own.get(id(result))
                outputs.append(detached(result, evaluate_all(known.size, values)) if real is None else real)
            else:
                outputs.append(evaluate(known, values) if isinstance(known, sympy.Expr) else result)
        self._write_back(plan, args)
        args.clear()
        return outputs
