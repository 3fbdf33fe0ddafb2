"""The call path of one region. ``Replayer.__call__`` is where every call begins; ``_answer`` is its steady state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cudagraph_backend.debug import Debug
from cudagraph_backend.errors import Refusal, RefusalError
from cudagraph_backend.options import Options
from cudagraph_backend.region import CutOut, Region
from cudagraph_backend.runtime.bucket_run import run_padded
from cudagraph_backend.runtime.checked_state import CheckedRegionState
from cudagraph_backend.runtime.compacting import compacting
from cudagraph_backend.runtime.devices import Device
from cudagraph_backend.runtime.first_call import FirstCalls
from cudagraph_backend.runtime.planner import ChosenSizes
from cudagraph_backend.runtime.region_state import Counters, RegionState
from cudagraph_backend.torch_internals import Compiled

log = logging.getLogger("cudagraph_backend")

_SHARED_MEMORY = Refusal("an argument that is written in place shares memory with another argument")
_CALLED_WITHIN = Refusal("called by an operator of another region, whose inputs it might overwrite")
_CAPTURED_OUTSIDE = Refusal("called inside somebody else's capture")


@dataclass(slots=True)
class Rehearsal:
    """A rehearsal, while there is one: the regions that are ``called`` run, but capture and count nothing."""

    called: list[Replayer] | None = None


class Replayer:
    """Calls a region: with one list of arguments, which it empties.

    ``device`` finds the device of the process that owns driver and pool, ``register`` makes the region known to
    reports, ``chosen`` are the sizes that the frame's forward has chosen, and ``cut_out`` is told which operator can't
    be captured.
    """

    def __init__(
        self,
        region: Region,
        compiled: Compiled,
        options: Options,
        debug: Debug,
        register: Callable[[Replayer], None],
        device: Callable[[torch.device], Device],
        rehearsal: Rehearsal,
        chosen: ChosenSizes,
        cut_out: CutOut | None = None,
    ):
        self.region = region
        self.options = options
        self._debug = debug
        self._cut_out = cut_out if region.refusal is None and not self._sends_padded() else None
        self._compiled = compiled
        self._plain = compacting(compiled, region)
        self._register = register
        self._find_device = device
        self._rehearsal = rehearsal
        self._chosen = chosen
        self._writes = any(i.mutated for i in region.inputs)
        self.reset()
        self._make_known()

    def _sends_padded(self) -> bool:
        """Return whether other processes get rows that are padded: an operator that is cut out runs at real sizes."""
        return self.region.effect is not None and any(dim.refusal is None for dim in self.region.dims)

    def reset(self) -> None:
        """Forget graphs and places; the next call starts anew."""
        self.counters = Counters()  # first, as a state that another thread makes meanwhile counts in them
        self.state: RegionState | None = None
        self._refusal = self.region.refusal
        self._is_known = False
        if self.region.kind == "forward":
            self._chosen.clear()

    # ---- the hot path

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if self._rehearsal.called is not None:
            return self._rehearse(args, self._rehearsal.called)
        if self._refusal is not None:
            return self._run_compiled(args, self._refusal)
        state = self.state or self._new_state()
        if state.device.driver.is_capturing():
            return self._run_compiled(args, _CAPTURED_OUTSIDE)
        with state.device as is_within_another_call:
            outputs = _CALLED_WITHIN if is_within_another_call else self._answer(state, args)
        return self._run_compiled(args, outputs) if isinstance(outputs, Refusal) else outputs

    def _answer(self, state: RegionState, args: list[Any]) -> list[Any] | Refusal:
        state.device.driver.join()
        plan = state.planner.plan(tuple([size.read(args) for size in self.region.sizes]))
        if isinstance(plan, Refusal):
            return plan
        args.extend(plan.counts)
        if not plan.is_ready:
            plan = self._first(state).prepare(plan, args)
            if isinstance(plan, Refusal):
                return plan
        route = state.places.route(plan, args)
        if isinstance(route, Refusal):
            return route
        if self._writes and route.takes_apart(args):
            return _SHARED_MEMORY
        graph = route.graph
        if graph is None:
            return self._first(state).capture(plan, route, args)
        return state.replay(plan, route, graph, args)

    # ---- the first call

    def _first(self, state: RegionState) -> FirstCalls:
        return FirstCalls(state, self._count, self._refuse, self._take_cut_out)

    def _take_cut_out(self) -> CutOut | None:
        """Give it away once: it holds all that is needed to compile the region again."""
        cut_out, self._cut_out = self._cut_out, None
        return cut_out

    def _refuse(self, refusal: Refusal) -> None:
        """Let all calls run uncaptured from now on."""
        self._refusal = refusal

    def _new_state(self) -> RegionState:
        """Find the device's driver and pool, at the first call, and after a reset."""
        self._make_known()
        device = self._find_device(self.region.device)
        with device.lock:
            if self._debug.poison:
                device.driver.poison = True
            kind = CheckedRegionState if self._debug.addresses else RegionState  # here, as no call is to pay for it
            state = self.state or kind(self.region, self.options, device, self._compiled, self.counters, self._chosen)
            self.state = state
            return state

    # ---- the way around

    def _rehearse(self, args: list[Any], called: list[Replayer]) -> Sequence[Any]:
        called.append(self)
        return self._run_uncounted(args)

    def _run_compiled(self, args: list[Any], refusal: Refusal) -> Sequence[Any]:
        self._count(refusal)
        if self.region.effect is not None and self.region.dims and refusal is not _SHARED_MEMORY:
            return self._run_as_others_do(args)
        return self._run_uncounted(args)

    def _run_as_others_do(self, args: list[Any]) -> Sequence[Any]:
        """Run the bucket: other processes may replay its graph, and what is sent to them must have its size."""
        state = self.state or self._new_state()
        plan = state.planner.plan_without_graph(tuple([size.read(args) for size in self.region.sizes]))
        if plan is None:
            return self._run_uncounted(args)
        self._drop_counts(args)
        args.extend(plan.counts)
        outputs = run_padded(self.region, plan, self._plain, args)
        args.clear()
        return outputs

    def _run_uncounted(self, args: list[Any]) -> Sequence[Any]:
        if self.region.counts:
            values = self.region.values([size.read(args) for size in self.region.sizes])
            self._drop_counts(args)
            args.extend(count.make(values, self.region.device) for count in self.region.counts)
        return self._plain(args)

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

    def _make_known(self) -> None:
        """Report the region from now on: after a reset, only regions that are called again are reported."""
        if not self._is_known:
            self._register(self)
            self._is_known = True
