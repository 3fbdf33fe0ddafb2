"""The first call: what no graph answers yet is run once for real, laid out, captured, and measured against plain calls.

A plan is *prepared* (probed, where asked for, and laid out) before it first answers a call. A bucket is *captured* at
each place where it is first called: the run answers the call, and the capture runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cudagraph_backend.drivers import Graph
from cudagraph_backend.errors import CaptureError, Refusal, is_out_of_memory
from cudagraph_backend.memory.copies import write_back
from cudagraph_backend.region import CutOut
from cudagraph_backend.runtime.bucket_run import detached_outputs, run_once, with_static
from cudagraph_backend.runtime.layout import (
    Layout,
    Pooled,
    apart_refusal,
    copy_out,
    layout_at,
    observed_layout,
    range_nbytes_at,
    stride_refusal,
)
from cudagraph_backend.runtime.places import no_memory
from cudagraph_backend.runtime.plan import Bucket, Plan
from cudagraph_backend.runtime.probe import probed
from cudagraph_backend.runtime.readings import compact_saved
from cudagraph_backend.runtime.region_state import RegionState
from cudagraph_backend.runtime.route import Place, Route
from cudagraph_backend.torch_internals import failed_operator, is_generator


class FirstCalls:
    """Answers the calls of one region that no graph can answer yet.

    ``count`` counts a call that no graph answers, and may raise; ``refuse`` lets all later calls run uncaptured;
    ``take_cut_out`` gives, once, what is told which operator can't be captured.
    """

    def __init__(
        self,
        state: RegionState,
        count: Callable[[Refusal], None],
        refuse: Callable[[Refusal], None],
        take_cut_out: Callable[[], CutOut | None],
    ):
        self._state = state
        self._count = count
        self._refuse = refuse
        self._take_cut_out = take_cut_out

    def prepare(self, plan: Plan, args: list[Any]) -> Plan | Refusal:
        """Probe a plan, and lay it out if its bucket is; return the plan that answers the call."""
        if plan.to_probe:
            compact_saved(plan.readings, args)  # it runs the region at the exact size
            found = probed(self._state, plan, args, self._refuse)
            if isinstance(found, Refusal):
                return found
            plan = found
        if plan.layout is None and plan.bucket.layout is not None:
            return self._lay_out(plan, plan.bucket.layout) or plan
        return plan

    def _lay_out(self, plan: Plan, layout: Layout) -> Refusal | None:
        region = self._state.region
        plan.layout = layout_at(region, layout, region.values(plan.sizes))
        refusal = apart_refusal(region, plan.layout)
        if refusal is not None:
            self._state.planner.refuse(plan.sizes, refusal)
        return refusal

    def capture(self, plan: Plan, route: Route, args: list[Any]) -> list[Any] | Refusal:
        """Answer a call from a run of its bucket, and capture that for later calls."""
        state = self._state
        refusal = state.places.refused_capture(route)
        if refusal is not None:
            return refusal
        if state.device.driver.poison:
            state.device.poison_free_bytes()
        route.stage(args)
        inputs = with_static(route.inputs, args)
        results = run_once(state, route, inputs)
        if isinstance(results, Refusal):
            state.planner.refuse(plan.sizes, results)
            return results
        provided = self._provide(plan, results, inputs, route)
        if isinstance(provided, Refusal):
            return self._unpooled(plan, route, args, inputs, results, provided)
        return self._record(plan, provided, args, inputs, results)

    def _unpooled(
        self, plan: Plan, route: Route, args: list[Any], inputs: list[Any], results: list[Any], refusal: Refusal
    ) -> list[Any] | Refusal:
        """Answer from results that can't go to the pool."""
        region = self._state.region
        self._state.planner.refuse(plan.sizes, refusal)
        if not region.has_effects and region.kind != "backward":
            return refusal  # the run has changed nothing
        write_back(route.written, args)
        self._count(refusal)
        return detached_outputs(region, plan, args, inputs, results)

    def _record(self, plan: Plan, route: Route, args: list[Any], inputs: list[Any], results: list[Any]) -> list[Any]:
        state, failed = self._state, None
        try:
            graph = record(state, plan.bucket, results, inputs, route.place)
            state.counters.captures += 1
            self._take_cut_out()  # and drop it: nothing has to be cut out
            state.places.add(plan, route, graph)
            if (slower := self._slower(plan, route, graph, args)) is not None:
                state.planner.refuse_bucket(plan.bucket, slower)
                state.places.drop_graphs(plan.bucket.sizes)
        except CaptureError as error:
            failed = self._failed(error)
        outputs = state.outputs(plan, route, args)
        if failed is not None:
            self._count(failed)  # last, as it may raise: what the run has changed is written back by now
        return outputs

    def _failed(self, error: CaptureError) -> Refusal:
        """Let the region run uncaptured, or in parts; if memory was short, nothing is captured for a while."""
        if isinstance(error.__cause__, Exception) and is_out_of_memory(error.__cause__):
            return self._state.places.pause_captures()
        name = failed_operator(error.__cause__) if error.__cause__ is not None else None
        refusal = Refusal(f"capture failed: {error}", op=name)
        self._refuse(refusal)
        cut_out = self._take_cut_out()
        if name is not None and cut_out is not None and not self._state.options.strict:
            cut_out(name, str(error))
        return refusal

    def _slower(self, plan: Plan, route: Route, graph: Graph, args: list[Any]) -> Refusal | None:
        """Return why calls had better run plain, where that can be tried: a backward may use up what it is given."""
        state = self._state
        region, options = state.region, state.options
        if options.capture == "always" or options.strict or region.has_effects or region.kind == "backward":
            return None

        def replay() -> None:  # all that a call costs here
            state.places.look_up(plan, args)
            graph.replay(route.stage, args)
            state.views(plan, route, args, {})

        copied = sum(copy.bucket.nbytes for copy in route.copies)
        return state.payoff.refusal(plan.bucket.sizes, copied, lambda: state.compiled(list(args)), replay)

    def _provide(self, plan: Plan, results: Sequence[Any], inputs: Sequence[Any], route: Route) -> Route | Refusal:
        """Observe the bucket's layout, and find ranges for it; the route may lead to a new place then.

        They are long enough for the largest bucket that is known of.
        """
        region, bucket = self._state.region, plan.bucket
        values = region.values(bucket.sizes)
        layout = observed_layout(region, results, inputs, values)
        if isinstance(layout, Refusal):
            return layout
        if refusal := stride_refusal(region, layout, values):
            return refusal
        if bucket.layout not in (None, layout):  # graphs of the bucket share one layout
            return Refusal("with these static inputs the outputs lie elsewhere than with those captured before")
        largest = range_nbytes_at(region, layout, self._state.planner.largest(values))
        provided = [max(pair) for pair in zip(layout.range_nbytes, largest, strict=True)]
        try:
            route = self._state.places.provide(route, layout.range_nbytes, provided)
        except torch.OutOfMemoryError as error:
            return no_memory(error)
        bucket.layout = layout
        return self._lay_out(plan, layout) or route


def record(state: RegionState, bucket: Bucket, results: list[Any], inputs: Sequence[Any], place: Place) -> Graph:
    """Put the results of the run in the pool, and capture the bucket, which writes them there itself.

    The list of results is emptied, so that they take no memory while the bucket is captured. Raises ``CaptureError``.
    """
    layout, pool, run, allocations = bucket.layout, state.device.pool, state.run, state.allocations
    assert layout is not None
    ranges = zip(place.outputs, layout.range_nbytes, strict=False)
    storages = [pool.bytes(taken.offset, nbytes).untyped_storage() for taken, nbytes in ranges]
    memory = _memory_of_buffers(state, layout, results, storages)
    copy_out(layout, results, storages)
    results.clear()

    def run_into_pool() -> None:
        with allocations.run(memory):
            bucket.copied = copy_out(layout, run(list(inputs)), storages)

    generators = [inputs[i] for i in state.region.objects if is_generator(inputs[i])]
    return state.device.driver.capture(
        run_into_pool, draws=state.region.may_draw, stages=bool(state.region.staged), generators=generators
    )


def _memory_of_buffers(
    state: RegionState, layout: Layout, results: Sequence[Any], storages: Sequence[torch.UntypedStorage]
) -> Mapping[int, torch.UntypedStorage]:
    """Return, for those buffers of the run that ended up as outputs, the memory of their ranges."""
    memory: dict[int, torch.UntypedStorage] = {}
    for entry, result in zip(layout.entries, results, strict=True):
        if isinstance(entry, Pooled):
            number, storage = state.allocations.number_of(result), storages[entry.range]
            if number is not None and result.untyped_storage().nbytes() <= storage.nbytes():
                memory[number] = storage
    return memory
