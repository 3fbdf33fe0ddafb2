"""Debugging: a region's state that compares addresses before each replay (``SHAREDGRAPH_DEBUG=addresses``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cudagraph_backend.drivers import Graph
from cudagraph_backend.errors import AddressError
from cudagraph_backend.region import Region
from cudagraph_backend.runtime.plan import Plan
from cudagraph_backend.runtime.region_state import RegionState
from cudagraph_backend.runtime.route import Route


class CheckedRegionState(RegionState):
    """Like ``RegionState``, but raises ``AddressError`` where a graph would read what is no argument of the call."""

    def replay(self, plan: Plan, route: Route, graph: Graph, args: list[Any]) -> list[Any]:
        for name, found, expected, why in _mismatches(self.region, route, args):
            raise AddressError(
                f"{self.region.name}: input {name} is at {found:#x}, but the graph of sizes {route.sizes} {why} "
                f"{expected:#x}: please report it, unless a guard was filtered away"
            )
        return super().replay(plan, route, graph, args)


def _mismatches(region: Region, route: Route, args: Sequence[Any]) -> Iterator[tuple[str, int, int, str]]:
    """Yield each input that is elsewhere: its name, the addresses found and expected, and what expects it there."""
    read_at = {copy.index: copy.bucket.data_ptr() for copy in route.in_place}
    for tensor in region.inputs:
        static = route.place.static_addresses[tensor.index] if tensor.role == "static" else None
        expected = static if static is not None else read_at.get(tensor.index)
        if expected is None:
            continue  # it is copied
        found = args[tensor.index].data_ptr()
        if found != expected:
            name = tensor.name if tensor.given is None else f"{tensor.name} ({tensor.given.path})"
            yield name, found, expected, "was captured with it at" if static is not None else "reads it in place at"
