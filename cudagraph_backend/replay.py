"""The call path of one region: dispatch, staging, replay, outputs. ``Replayer.__call__`` is the hot path."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from cudagraph_backend import capture, probe
from cudagraph_backend.devices import Device
from cudagraph_backend.dispatch import Table
from cudagraph_backend.drivers import Graph
from cudagraph_backend.errors import CaptureError, Refusal, RefusalError, is_out_of_memory
from cudagraph_backend.options import Options
from cudagraph_backend.outputs import Layout, apart_refusal, layout_at, make_outputs, own_memory
from cudagraph_backend.plan import Plan
from cudagraph_backend.region import DynamicDim, Region
from cudagraph_backend.staging import Where, write_back
from cudagraph_backend.torch_internals import Compiled, current_step, failed_operator
from cudagraph_backend.tree import Route

log = logging.getLogger("cudagraph_backend")

_SHARED_MEMORY = Refusal("an argument that is written in place shares memory with another argument")
_CALLED_WITHIN = Refusal("called by an operator of another region, whose inputs it might overwrite")
_NOTHING: Mapping[int, torch.UntypedStorage] = {}
_CAPTURED_OUTSIDE = Refusal("called inside somebody else's capture")


@dataclass(slots=True)
class Counters:
    """What a region did since it was compiled, or since the last reset."""

    captures: int = 0
    replays: int = 0
    rows_real: int = 0
    rows_padded: int = 0
    staged_copies: int = 0
    read_in_place: int = 0
    outputs_copied_out: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)

    def count(self, plan: Plan, route: Route, copied_out: int) -> None:
        """A call that was answered from a graph, or from the run before its capture."""
        self.replays += 1
        self.rows_real += plan.rows_real
        self.rows_padded += plan.rows_padded
        self.staged_copies += len(route.copies)
        self.read_in_place += len(route.in_place)
        self.outputs_copied_out += copied_out


CutOut = Callable[[str, str], None]
"""Told the name of an operator whose capture failed, and why, lets later calls be captured around it."""


class Replayer:
    """Calls a region: with one list of arguments, which it empties.

    ``cut_out`` is told which operator can't be captured. ``rehearsed``, in a rehearsal (``Backend.rehearsal``), gathers
    the regions that are called.
    """

    rehearsed: ClassVar[list[Replayer] | None] = None

    def __init__(
        self,
        region: Region,
        compiled: Compiled,
        options: Options,
        register: Callable[[Replayer], None],
        device: Callable[[torch.device], Device],
        cut_out: CutOut | None = None,
    ):
        self.region = region
        self._cut_out = cut_out if region.refusal is None else None
        self._compiled = compiled
        self.options = options
        self._register = register
        self._find_device = device
        self._writes = any(i.mutated for i in region.inputs)
        self.reset()
        self._make_known()

    def reset(self) -> None:
        """Forget graphs and places; the next call starts anew."""
        self.table: Table | None = None
        self._refusal = self.region.refusal
        self.counters = Counters()
        self._is_known = False

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if self.rehearsed is not None:
            self.rehearsed.append(self)
            return self._run_uncounted(args)
        if self._refusal is not None:
            return self._run_compiled(args, self._refusal)
        table = self.table or self._new_table()
        if table.device.driver.is_capturing():
            return self._run_compiled(args, _CAPTURED_OUTSIDE)
        with table.device as is_within_another_call:
            outputs = _CALLED_WITHIN if is_within_another_call else self._replay(table, args)
        return self._run_compiled(args, outputs) if isinstance(outputs, Refusal) else outputs

    # ---- the hot path

    def _replay(self, table: Table, args: list[Any]) -> list[Any] | Refusal:
        table.device.driver.join()
        plan = table.plan(tuple([size.read(args) for size in self.region.sizes]))
        if isinstance(plan, Refusal):
            return plan
        args.extend(plan.counts)
        if plan.to_probe:
            plan = self._probed(table, plan, args)
            if isinstance(plan, Refusal):
                return plan
        where = table.tree.where(plan, args)
        route = table.tree.route(plan, where, args) or table.tree.new_route(plan, where, args)
        if isinstance(route, Refusal):
            return route
        if self._writes and route.takes_apart(args):
            return _SHARED_MEMORY
        graph = route.place.graphs.get(plan.bucket.sizes)
        if graph is None or plan.layout is None:
            return self._first_call(table, plan, where, route, args)
        return self._answer(table, plan, plan.layout, route, graph, args)

    def _answer(
        self, table: Table, plan: Plan, layout: Layout, route: Route, graph: Graph, args: list[Any]
    ) -> list[Any] | Refusal:
        if table.device.driver.poison:
            table.device.poison_free_bytes()
        graph.replay(route.stage, args)
        return self._finish(table, plan, layout, route, args)

    def _finish(self, table: Table, plan: Plan, layout: Layout, route: Route, args: list[Any]) -> list[Any]:
        write_back(route.written, args)
        own = self._own_memory(layout, route) if route.place.copied else _NOTHING
        outputs = make_outputs(layout, table.device.pool, route.place.outputs, args, current_step(), own)
        if own:
            table.tree.note_copies(route.place, own)
        args.clear()
        self.counters.count(plan, route, len(own))
        return outputs

    def _own_memory(self, layout: Layout, route: Route) -> Mapping[int, torch.UntypedStorage]:
        """Memory for the outputs that the call gets copies of; where there is none, their ranges are lent."""
        try:
            return own_memory(layout, route.place.copied, self.region.device)
        except torch.OutOfMemoryError:
            return _NOTHING

    # ---- the first call of a bucket

    def _probed(self, table: Table, plan: Plan | Refusal, args: list[Any]) -> Plan | Refusal:
        """The plan that answers the call: without those dims whose padded rows the probe sees in real ones."""
        while isinstance(plan, Plan) and plan.to_probe:
            found = probe.probe(table, plan, args)
            if found is None:
                table.pass_probe(plan)
            elif isinstance(found, Refusal):
                self._refuse_dims(table, self._blamed(table, plan, args), found)
                plan = table.plan(plan.sizes) if self._refusal is None else self._refusal
            else:
                plan = table.postpone_probe(plan, found.reason)
        return plan

    def _blamed(self, table: Table, plan: Plan, args: list[Any]) -> Sequence[DynamicDim]:
        """Of several dims that failed the probe together, those that fail it alone; all of them if none does."""
        dims = probe.suspects(plan)
        if len(dims) == 1:
            return dims
        alone = [table.plan_without([other for other in dims if other is not dim], plan.sizes) for dim in dims]
        tested = zip(dims, alone, strict=True)
        failed = [d for d, p in tested if isinstance(p, Plan) and isinstance(probe.probe(table, p, args), Refusal)]
        return failed or dims

    def _refuse_dims(self, table: Table, dims: Sequence[DynamicDim], refusal: Refusal) -> None:
        names = ", ".join(dim.name for dim in dims)
        if self.options.pad != "assume" and all(dim.to_probe is None for dim in dims):
            text = "%s: dim %s was proven to be safe to pad and is not; please report this: %s"
            log.error(text, self.region.name, names, refusal)
        else:
            log.warning("%s: dim %s is not padded: %s", self.region.name, names, refusal)
        table.refuse_dims(dims, refusal)
        if self.options.strict:
            self._refusal = refusal

    def _first_call(self, table: Table, plan: Plan, where: Where, route: Route, args: list[Any]) -> list[Any] | Refusal:
        """Answer the first call of a place and bucket, or of a plan."""
        graph = route.place.graphs.get(plan.bucket.sizes)
        if graph is None:
            refusal = table.tree.refused_capture(plan, where, route.place)
            return refusal if refusal is not None else self._capture(table, plan, where, route, args)
        assert plan.bucket.layout is not None
        plan.layout = layout_at(self.region, plan.bucket.layout, self.region.values(plan.sizes))
        if (refusal := apart_refusal(plan.layout)) is not None:
            table.refuse(plan.sizes, refusal)
            return refusal
        return self._answer(table, plan, plan.layout, route, graph, args)

    def _capture(self, table: Table, plan: Plan, where: Where, route: Route, args: list[Any]) -> list[Any] | Refusal:
        if table.device.driver.poison:
            table.device.poison_free_bytes()
        route.stage(args)
        inputs = capture.with_static(route.inputs, args)
        results = capture.run_once(table, route, inputs)
        if isinstance(results, Refusal):
            table.refuse(plan.sizes, results)
            return results
        provided = capture.provide(table, plan, results, inputs, route)
        if isinstance(provided, Refusal):
            table.refuse(plan.sizes, provided)
            if not self.region.has_effects and self.region.kind != "backward":
                return provided  # the run has changed nothing
            write_back(route.written, args)
            self._count(provided)
            return capture.detached_outputs(table, plan, args, inputs, results)
        assert plan.layout is not None
        route, failed = provided, None
        try:
            graph = capture.record(table, plan.bucket, results, inputs, route.place)
            self.counters.captures += 1
            self._cut_out = None  # it holds all that is needed to compile the region again
            table.tree.add(plan, where, route, graph)
            if (slower := self._slower(table, plan, plan.layout, route, graph, args)) is not None:
                table.refuse_bucket(plan.bucket, slower)
        except CaptureError as error:
            failed = self._failed(table, error)
        outputs = self._finish(table, plan, plan.layout, route, args)
        if failed is not None:
            self._count(failed)  # last, as it may raise: what the run has changed is written back by now
        return outputs

    def _failed(self, table: Table, error: CaptureError) -> Refusal:
        """From now on the region runs uncaptured, or in parts; if memory was short, nothing is captured for a while."""
        if isinstance(error.__cause__, Exception) and is_out_of_memory(error.__cause__):
            return table.tree.pause_captures()
        name = failed_operator(error.__cause__) if error.__cause__ is not None else None
        self._refusal = Refusal(f"capture failed: {error}", op=name)
        if name is not None and self._cut_out is not None and not self.options.strict:
            self._cut_out(name, str(error))
        self._cut_out = None
        return self._refusal

    def _slower(
        self, table: Table, plan: Plan, layout: Layout, route: Route, graph: Graph, args: list[Any]
    ) -> Refusal | None:
        """Why calls had better run plain, where that can be tried: a backward may use up what it is given."""
        region, options = self.region, self.options
        if options.capture == "always" or options.strict or region.has_effects or region.kind == "backward":
            return None

        def replay() -> None:  # all that a call costs here
            table.tree.where(plan, args)
            table.device.pool.is_free(route.writes)
            graph.replay(route.stage, args)
            make_outputs(layout, table.device.pool, route.place.outputs, args, current_step(), _NOTHING)

        copied = sum(copy.bucket.nbytes for copy in route.copies)
        return table.payoff.refusal(plan.bucket.sizes, copied, lambda: self._compiled(list(args)), replay)

    # ---- the way around

    def _run_compiled(self, args: list[Any], refusal: Refusal) -> Sequence[Any]:
        self._count(refusal)
        if self.region.effect is not None and self.region.dims and refusal is not _SHARED_MEMORY:
            return self._run_as_others_do(args)
        return self._run_uncounted(args)

    def _run_as_others_do(self, args: list[Any]) -> Sequence[Any]:
        """Other processes may replay the bucket's graph: what is sent to them must have its size, padded or not."""
        table = self.table or self._new_table()
        plan = table.plan_without_graph(tuple([size.read(args) for size in self.region.sizes]))
        if plan is None:
            return self._run_uncounted(args)
        self._drop_counts(args)
        args.extend(plan.counts)
        outputs = capture.run_padded(table, plan, self._compiled, args)
        args.clear()
        return outputs

    def _run_uncounted(self, args: list[Any]) -> Sequence[Any]:
        if self.region.counts:
            values = self.region.values([size.read(args) for size in self.region.sizes])
            self._drop_counts(args)
            args.extend(count.make(values, self.region.device) for count in self.region.counts)
        return self._compiled(args)

    def _drop_counts(self, args: list[Any]) -> None:
        if self.region.counts:
            del args[self.region.counts[0].index :]

    def _count(self, refusal: Refusal) -> None:
        """Count a call that no graph answers. Raises ``RefusalError`` with ``strict``."""
        if self.options.strict:
            raise RefusalError(f"{self.region.name}: {refusal}")
        self._make_known()
        if refusal.reason not in self.counters.fallbacks:
            log.warning("%s runs uncaptured: %s", self.region.name, refusal)
        self.counters.fallbacks[refusal.reason] += 1

    def _new_table(self) -> Table:
        """At the first call, and after a reset: find the device's driver and pool."""
        self._make_known()
        device = self._find_device(self.region.device)
        with device.lock:
            table = self.table or Table(self.region, self.options, device, self._compiled)
            self.table = table
            return table

    def _make_known(self) -> None:
        """After a reset only regions that are called again are reported."""
        if not self._is_known:
            self._register(self)
            self._is_known = True
