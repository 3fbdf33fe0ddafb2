"""What calls of one region share on its device, and how one of them is answered from a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cudagraph_backend.drivers import Graph
from cudagraph_backend.memory.copies import write_back
from cudagraph_backend.options import Options
from cudagraph_backend.region import Region
from cudagraph_backend.runtime.allocations import Allocations
from cudagraph_backend.runtime.devices import Device
from cudagraph_backend.runtime.layout import make_outputs, own_memory
from cudagraph_backend.runtime.payoff import Payoff
from cudagraph_backend.runtime.places import Places
from cudagraph_backend.runtime.plan import Plan
from cudagraph_backend.runtime.planner import ChosenSizes, Planner
from cudagraph_backend.runtime.route import Route
from cudagraph_backend.torch_internals import Compiled, current_step

_NOTHING: Mapping[int, torch.UntypedStorage] = {}


@dataclass(slots=True)
class Counters:
    """What a region did since it was compiled, or since the last reset."""

    captures: int = 0
    replays: int = 0
    staged_copies: int = 0
    read_in_place: int = 0
    outputs_copied_out: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)

    def count(self, plan: Plan, route: Route, copied_out: int) -> None:
        """Count a call that was answered from a graph, or from the run before its capture."""
        self.replays += 1
        plan.served.calls += 1
        self.staged_copies += len(route.copies)
        self.read_in_place += len(route.in_place)
        self.outputs_copied_out += copied_out


class RegionState:
    """What is learnt of a region while it is called, until the next reset.

    Attributes:
        compiled: the region's code.
        run: the same code, with ``allocations`` for its buffers.
        planner: sizes of calls, and the plans that answer them.
        places: addresses of calls, and the graphs captured there.
        payoff: whether graphs are worth replaying.
    """

    def __init__(
        self,
        region: Region,
        options: Options,
        device: Device,
        compiled: Compiled,
        counters: Counters,
        chosen: ChosenSizes,
    ):
        self.region = region
        self.options = options
        self.device = device
        self.compiled = compiled
        self.counters = counters
        self.allocations = Allocations(device.driver.allocate)
        self.run = self.allocations.bound_to(compiled, region.device.type)
        self.payoff = Payoff(device.driver)
        self.places = Places(region, device.pool, options, device.driver.prepare_staging)
        self.planner = Planner(region, options, chosen, self.places.has_room, lambda: device.driver.poison)

    def replay(self, plan: Plan, route: Route, graph: Graph, args: list[Any]) -> list[Any]:
        """Answer a call from a graph: stage its arguments, launch, and make its outputs."""
        if self.device.driver.poison:
            self.device.poison_free_bytes()
        graph.replay(route.stage, args)
        outputs = self.outputs(plan, route, args)
        self.places.note_replay(route)
        return outputs

    def outputs(self, plan: Plan, route: Route, args: list[Any]) -> list[Any]:
        """Make the outputs of a call whose results are in the place's ranges; the arguments are dropped."""
        write_back(route.written, args)
        own = self._own_memory(plan, route) if route.place.copied else _NOTHING
        outputs = self.views(plan, route, args, own)
        if own:
            self.places.note_copies(route.place, own)
        args.clear()
        self.counters.count(plan, route, len(own))
        return outputs

    def views(self, plan: Plan, route: Route, args: list[Any], own: Mapping[int, torch.UntypedStorage]) -> list[Any]:
        """Make the outputs' tensors; those of ranges that have memory of the call's ``own`` are copies there."""
        assert plan.layout is not None
        return make_outputs(plan.layout, self.device.pool, route.place.outputs, args, current_step(), own)

    def _own_memory(self, plan: Plan, route: Route) -> Mapping[int, torch.UntypedStorage]:
        """Return memory for the outputs that the call gets copies of; where there is none, their ranges are lent."""
        assert plan.layout is not None
        try:
            return own_memory(plan.layout, route.place.copied, self.region.device)
        except torch.OutOfMemoryError:
            return _NOTHING
