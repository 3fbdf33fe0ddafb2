"""The call path of one region: dispatch, staging, replay, outputs. ``Replayer.__call__`` is the hot path."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cudagraph_backend import capture, probe
from cudagraph_backend.devices import Device
from cudagraph_backend.dispatch import Plan, Table
from cudagraph_backend.errors import CaptureError, Refusal, RefusalError
from cudagraph_backend.options import Options
from cudagraph_backend.outputs import Layout, make_outputs
from cudagraph_backend.region import DynamicDim, Region
from cudagraph_backend.staging import shares_memory, stage, write_back
from cudagraph_backend.torch_internals import Compiled, current_step
from cudagraph_backend.tree import Ranges

log = logging.getLogger("cudagraph_backend")

_LIVE_OUTPUTS = Refusal("too many outputs of earlier calls are alive, and torch before 2.12 can't move them")
_SHARED_MEMORY = Refusal("an argument that is written in place shares memory with another argument")
_CAPTURED_OUTSIDE = Refusal("called inside somebody else's capture")


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
        self._compiled = compiled
        self.options = options
        self._place = place
        self._register = register
        self._find_device = device
        self._writes = any(i.mutated for i in region.inputs)
        self._mutated = frozenset(i.index for i in region.inputs if i.role == "staged" and i.mutated)
        self.reset()
        self._make_known()

    def reset(self) -> None:
        """Forget graphs, buffers and place; the next call starts anew."""
        self.table: Table | None = None
        self._refusal = self.region.refusal
        self.counters = Counters()
        self._is_known = False

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if self._refusal is not None:
            return self._run_compiled(args, self._refusal)
        table = self.table or self._new_table()
        if table.device.driver.is_capturing():
            return self._run_compiled(args, _CAPTURED_OUTSIDE)
        with table.device.lock:
            outputs = self._replay(table, args)
        return self._run_compiled(args, outputs) if isinstance(outputs, Refusal) else outputs

    # ---- the hot path

    def _replay(self, table: Table, args: list[Any]) -> list[Any] | Refusal:
        plan = table.plan(tuple([size.read(args) for size in self.region.sizes]))
        if isinstance(plan, Refusal):
            return plan
        args.extend(plan.counts)
        if self._writes and shares_memory(self.region.inputs, args):
            return _SHARED_MEMORY
        if plan.to_probe:
            plan = self._probed(table, plan, args)
            if isinstance(plan, Refusal):
                return plan
        ranges = table.place.free_ranges(len(plan.layout.range_nbytes) if plan.layout else None)
        if ranges is None:
            return _LIVE_OUTPUTS
        graph = table.graph(plan, args, ranges)
        if isinstance(graph, Refusal):
            return graph
        stage(plan.copies, args)
        if table.device.driver.poison:
            table.device.poison_dead_ranges()
        if graph is None or plan.layout is None:
            return self._capture(table, plan, args, ranges)
        graph.replay()
        self._count_replay(plan)
        return self._finish(plan, plan.layout, args, ranges)

    def _count_replay(self, plan: Plan) -> None:
        self.counters.replays += 1
        self.counters.rows_real += plan.rows_real
        self.counters.rows_padded += plan.rows_padded

    def _finish(self, plan: Plan, layout: Layout, args: list[Any], ranges: Ranges) -> list[Any]:
        if self._mutated:
            write_back(plan.copies, args, self._mutated)
        outputs = make_outputs(layout, ranges, args, self.region.name, current_step())
        args.clear()
        return outputs

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

    def _capture(self, table: Table, plan: Plan, args: list[Any], ranges: Ranges) -> list[Any] | Refusal:
        inputs = capture.bucket_inputs(plan, args)
        results = capture.run_once(table, inputs)
        if isinstance(results, Refusal):
            table.refuse(plan.sizes, results)
            return results
        layout = capture.provide_ranges(table, plan, results, inputs, ranges)
        if isinstance(layout, Refusal):
            table.refuse(plan.sizes, layout)
            write_back(plan.copies, args, self._mutated)
            self._count(layout)
            return capture.detached_outputs(table, plan, args, inputs, results)
        del results  # scratch of the memory pool: capture may use it
        try:
            capture.record(table, plan.bucket, layout, inputs, ranges)
            self.counters.captures += 1
            self._count_replay(plan)
            return self._finish(plan, plan.layout or layout, args, ranges)
        except CaptureError as error:
            self._refusal = Refusal(f"capture failed: {error}")
        outputs = self._finish(plan, plan.layout or layout, args, ranges)
        self._count(self._refusal)  # last, as it may raise: what the run has changed is written back by now
        return outputs

    # ---- the way around

    def _run_compiled(self, args: list[Any], refusal: Refusal) -> Sequence[Any]:
        self._count(refusal)
        if self.region.counts:
            values = self.region.values([size.read(args) for size in self.region.sizes])
            del args[self.region.counts[0].index :]
            args.extend(count.make(values, self.region.device) for count in self.region.counts)
        return self._compiled(args)

    def _count(self, refusal: Refusal) -> None:
        """Count a call that no graph answers. Raises ``RefusalError`` with ``strict``."""
        if self.options.strict:
            raise RefusalError(f"{self.region.name}: {refusal}")
        self._make_known()
        if refusal.reason not in self.counters.fallbacks:
            log.warning("%s runs uncaptured: %s", self.region.name, refusal)
        self.counters.fallbacks[refusal.reason] += 1

    def _new_table(self) -> Table:
        """At the first call, and after a reset: find the device's driver and pool, and this region's place."""
        self._make_known()
        device = self._find_device(self.region.device)
        self.table = Table(self.region, self.options, device, self._place, self._compiled)
        return self.table

    def _make_known(self) -> None:
        """After a reset only regions that are called again are reported."""
        if not self._is_known:
            self._register(self)
            self._is_known = True
