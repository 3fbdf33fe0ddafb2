"""Choosing a place: where a call is answered, or where a new graph is captured.

From place to place leads what a call finds its arguments to be: an output of the place before, read where it lies.
Nothing says beforehand that a place may be used: other places may use the same bytes. It may if nothing is alive in
what it writes. That is looked up at every call, so that no order of calls, and no lifetime of an output, is a mistake.
What was handed out is never moved or overwritten: where callers keep the outputs of a few places, the next place keeps
its ranges, and calls get copies of what is written there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from threading import get_ident
from typing import Any

import torch

from cudagraph_backend.drivers import Graph
from cudagraph_backend.errors import Refusal
from cudagraph_backend.memory.copies import StagedCopy, Staging, byte_span, prepare
from cudagraph_backend.memory.output_pool import OutputPool
from cudagraph_backend.memory.output_range import OutputRange
from cudagraph_backend.memory.spans import Span, merged
from cudagraph_backend.options import Options
from cudagraph_backend.region import Region
from cudagraph_backend.runtime.finder import Finder
from cudagraph_backend.runtime.limits import (
    ADDRESSES_MOVE,
    LIMITS,
    MET_ONCE,
    NO_MEMORY,
    TOO_MANY_GRAPHS,
    Admission,
    Limits,
)
from cudagraph_backend.runtime.plan import Plan, Sizes
from cudagraph_backend.runtime.readings import Where
from cudagraph_backend.runtime.route import Copies, Place, Route, bucket_inputs
from cudagraph_backend.torch_internals import addresses_equal, current_step


class Places:
    """The places of one region, and the routes to them that calls took."""

    def __init__(
        self,
        region: Region,
        pool: OutputPool,
        options: Options,
        prepare: Callable[[Sequence[StagedCopy], Sequence[StagedCopy]], Staging] = prepare,
        limits: Limits = LIMITS,
    ):
        self._prepare = prepare
        self._region = region
        self._static = region.static
        self._objects = region.objects
        self._pool = pool
        self._options = options
        self._limits = limits
        self.clear()

    def clear(self) -> None:
        """Drop all graphs and places; nothing that was learnt of addresses holds any more."""
        self.listed: list[Place] = []
        self._routes: dict[tuple[Sizes, Sizes, Where], list[Route]] = {}
        self._finder = Finder(self._pool, self._limits)
        self._admission = Admission(self._limits, self._region.sizes_from_data)
        self._lent_after_all = 0

    # ---- the hot path

    def route(self, plan: Plan, args: list[Any]) -> Route | Refusal:
        """Return a route to a place where nothing is alive in what a call writes: one with a graph, if there is one."""
        where = self._finder.where(plan, args)
        return self._known_route(plan, where, args) or self._new_route(plan, where, args)

    def look_up(self, plan: Plan, args: list[Any]) -> Route | None:
        """Do what finding a route takes where there is one, and nothing else: to measure it."""
        return self._known_route(plan, self._finder.where(plan, args), args)

    def _known_route(self, plan: Plan, where: Where, args: list[Any]) -> Route | None:
        sizes = plan.bucket.sizes
        for route in self._routes.get((plan.sizes, sizes, where), ()):
            place = route.place
            if sizes in place.graphs and self._is_called_at(place, args) and self._pool.live.are_free(route.writes):
                return route
        return None

    def note_replay(self, route: Route) -> None:
        """Note that a call was answered from a graph."""
        admission = self._admission
        admission.calls += 1
        route.place.used = admission.calls
        admission.unused[route.sizes] = 0

    def _is_called_at(self, place: Place, args: list[Any]) -> bool:
        """Return whether a call has a place's static inputs and objects."""
        return addresses_equal(args, place.static_addresses, self._static) and (
            not self._objects or all(args[i] is o for i, o in zip(self._objects, place.objects, strict=True))
        )

    # ---- the way to a route

    def _new_route(self, plan: Plan, where: Where, args: list[Any]) -> Route | Refusal:
        """Return a route to a place where nothing is alive in what is written.

        Its place may lack a graph for the plan's bucket, and if it is new, outputs. Outputs of this step will die with
        it, so that a new place for each is of use again in the next step. Those of earlier steps are kept by a caller
        who may go on keeping them: after a few places, calls get copies of such outputs.
        """
        held: list[Place] = []
        fitting = self._fitting(plan, where, args)
        may_invalidate = self._options.on_overwrite == "error"
        for route in fitting:
            blockers = route.blockers(self._pool)
            if blockers and may_invalidate and self._may_be_lost(blockers, where, args):
                if plan.bucket.sizes not in route.place.graphs:
                    refusal = self.refused_capture(route)
                    if refusal is not None:
                        return refusal
                may_invalidate = False  # of one place only, though on CPU builds its ranges are not free by that
                for taken in blockers:
                    self._pool.invalidate(taken)
                blockers = route.blockers(self._pool)
            if not blockers:
                return route
            is_older = any(taken.step != current_step() for taken in blockers)
            if is_older or len(fitting) >= self._limits.places_per_step:
                held.append(route.place)
        return self._elsewhere(plan, where, args, held)

    def _elsewhere(self, plan: Plan, where: Where, args: Sequence[Any], held: Sequence[Place]) -> Route | Refusal:
        """Make a route to a new place, with copies of the outputs that callers keep in enough of the ``held``."""
        enough = self._limits.held_places
        if held and self.is_full() and not self._admission.is_paused:
            self._drop(min(held, key=lambda place: place.used))
            enough = 1
        try:
            place = self._new_place(plan, where, args)
        except torch.OutOfMemoryError as error:
            return no_memory(error)
        kept = Counter(index for other in held for index, taken in enumerate(other.outputs) if self._is_kept(taken))
        place.copied = {index: Copies(self._limits.copies_watched) for index, count in kept.items() if count >= enough}
        return self._route_to(place, plan, where, args)

    def _is_kept(self, taken: OutputRange) -> bool:
        """Return whether an output of this region is alive there."""
        return taken.loan is not None and taken.loan.region == self._region.name and taken.is_live()

    def note_copies(self, place: Place, copies: Mapping[int, torch.UntypedStorage]) -> None:
        """Note the copies that a call got of some ranges; those whose copies die young are lent from now on.

        Places that kept outputs blocked all the while are dropped then: this one has taken their role. Where now and
        then an output is kept after all, that blocks this place, too, and costs captures: so it takes twice as many
        copies each time.
        """
        enough = self._limits.copies_died << min(self._lent_after_all, self._limits.most_doublings)
        for index, copy in copies.items():
            if place.copied[index].add(copy) >= enough and not self.is_full():
                del place.copied[index]
                self._lent_after_all += 1
        if not place.copied:
            for other in [other for other in self.listed if self._is_blocked_twin(other, place)]:
                self._drop(other)

    def _is_blocked_twin(self, other: Place, place: Place) -> bool:
        """Return whether calls of ``place`` would come to the other one, which kept outputs have blocked for long."""
        is_twin = (other.inputs, other.static_addresses) == (place.inputs, place.static_addresses)
        is_idle = other.used < self._admission.calls - self._limits.blocked_calls
        return other is not place and is_twin and is_idle and any(map(self._is_kept, other.outputs))

    def _may_be_lost(self, blockers: Sequence[OutputRange], where: Where, args: Sequence[Any]) -> bool:
        """Return whether later uses of live outputs may raise instead, if the user chose that.

        Never of an output of this step, nor of another thread, which may be reading it at this moment: steps are
        counted for all threads together. Nor of what a backward may need, or what the call itself is given.
        """
        read = self._offsets_read(where, args)
        given = [self._pool.holder(arg.untyped_storage()) for arg in args if isinstance(arg, torch.Tensor)]
        return not any(
            taken.step == current_step()
            or taken.thread != get_ident()
            or taken.is_saved
            or taken in given
            or any(taken.offset <= offset < taken.end for offset in read)
            for taken in blockers
        )

    def _offsets_read(self, where: Where, args: Sequence[Any]) -> list[int]:
        """Return where in the pool, or outside of it, arguments are that must stay there: those that are not copied."""
        static = [args[index].data_ptr() - self._pool.address for index in self._static]
        return [*static, *(found for found in where if found is not None)]

    def _fitting(self, plan: Plan, where: Where, args: list[Any]) -> list[Route]:
        """Return routes to places with the call's addresses; first those that have its bucket's graph, and lend it."""
        routes, layout = self._routes.setdefault((plan.sizes, plan.bucket.sizes, where), []), plan.bucket.layout
        known = {route.place for route in routes}
        routes += [
            self._route_to(place, plan, where, args)
            for place in self.listed
            if place not in known
            and self._is_called_at(place, args)
            and place.accepts(plan.readings, where)
            and (layout is None or place.holds(layout.range_nbytes))
        ]
        fitting = [r for r in routes if self._is_called_at(r.place, args)]
        return sorted(fitting, key=lambda r: (plan.bucket.sizes not in r.place.graphs, bool(r.place.copied)))

    def _route_to(self, place: Place, plan: Plan, where: Where, args: Sequence[Any]) -> Route:
        buffers: dict[int, torch.Tensor] = {}
        copies: list[StagedCopy] = []
        in_place: list[StagedCopy] = []
        for reading, found, (first, _) in zip(plan.readings, where, place.inputs, strict=True):
            buffers[reading.index] = buffer = reading.buffer(self._pool, first)
            (copies if found is None else in_place).append(reading.copy_to(buffer))
        inputs = bucket_inputs(self._region, plan.bucket.sizes, buffers)
        copied = {copy.index for copy in copies}
        mutated = {tensor.index for tensor in self._region.inputs if tensor.mutated}
        fixed = [i.index for i in self._region.inputs if i.index not in copied and mutated]
        return Route(
            place,
            plan.bucket.sizes,
            where,
            inputs,
            tuple(copies),
            tuple(in_place),
            tuple(copy for copy in copies if copy.index in mutated),
            self._writes(place.outputs, copies),
            merged(byte_span(args[index]) for index in fixed),
            merged(byte_span(args[index]) for index in fixed if index in mutated),
            self._prepare(copies, in_place),
        )

    def _writes(self, outputs: Sequence[OutputRange], copies: Sequence[StagedCopy]) -> list[Span]:
        copied = (byte_span(copy.bucket) for copy in copies)
        start = self._pool.address
        return merged([*(taken.span for taken in outputs), *((first - start, end - start) for first, end in copied)])

    # ---- new places and graphs

    def _new_place(self, plan: Plan, where: Where, args: Sequence[Any]) -> Place:
        """Make a place that reads arguments where they are, and others where they were read before or at free bytes.

        Raises ``torch.OutOfMemoryError``.
        """
        spans: list[Span | None] = [
            None if found is None else (found, found + reading.nbytes)
            for reading, found in zip(plan.readings, where, strict=True)
        ]
        for position, reading in enumerate(plan.readings):
            if spans[position] is None:
                before = [place.inputs[position] for place in self.listed if place.inputs[position] in place.staging]
                taken = [span for span in spans if span is not None]
                spans[position] = self._pool.find_room(max(reading.nbytes, reading.provided), taken, before).span
        inputs = tuple(span for span in spans if span is not None)
        apart = (span for span in inputs if sum(a < span[1] and span[0] < b for a, b in inputs) == 1)
        staging = frozenset(span for span in apart if span[0] >= 0 and span[1] <= self._pool.nbytes)
        static = set(self._static)
        addresses = [arg.data_ptr() if i in static else None for i, arg in enumerate(args)]
        return Place(addresses, inputs, staging, objects=tuple(args[i] for i in self._objects))

    def refused_capture(self, route: Route) -> Refusal | None:
        """Return why no graph is captured for a call, though there is none for it."""
        admission, place = self._admission, route.place
        admission.calls += 1
        if admission.is_paused:
            return NO_MEMORY
        if admission.is_met_once(route.sizes):
            return MET_ONCE
        if not self.has_room():
            return TOO_MANY_GRAPHS
        if place not in self.listed and len(self.listed) >= self._limits.places and not self._drop_idle_place():
            return ADDRESSES_MOVE
        addresses = (route.where, (*place.static_addresses, *map(id, place.objects)))
        return ADDRESSES_MOVE if admission.is_put_off(route.sizes, addresses) else None

    def pause_captures(self) -> Refusal:
        """Capture nothing for a while, after a capture for which there was no memory."""
        return self._admission.pause()

    def _drop_idle_place(self) -> bool:
        idle = min(self.listed, key=lambda place: place.used, default=None)
        if idle is None or self._admission.calls - idle.used < self._limits.idle_calls:
            return False
        self._drop(idle)
        return True

    def _drop(self, place: Place) -> None:
        self.listed.remove(place)
        for key, routes in self._routes.items():
            self._routes[key] = [route for route in routes if route.place is not place]

    def provide(self, route: Route, range_nbytes: Sequence[int], provided: Sequence[int]) -> Route:
        """Return the same route, or one to a new place with the same inputs, where outputs of ``range_nbytes`` fit.

        A new place has room for the ``provided`` bytes, if they can be had. Raises ``torch.OutOfMemoryError``.
        """
        place = route.place
        if not place.holds(range_nbytes):
            try:
                outputs = self._ranges(place, provided)
            except torch.OutOfMemoryError:
                outputs = self._ranges(place, range_nbytes)
            place = replace(place, outputs=outputs, graphs={})
            route = replace(route, place=place, writes=self._writes(outputs, route.copies))
        return route

    def _ranges(self, place: Place, needs: Sequence[int]) -> tuple[OutputRange, ...]:
        taken: list[Span] = list(place.inputs)
        known = [span for p in self.listed for span in (*p.staging, *(r.span for r in p.outputs))]
        ranges: list[OutputRange] = []
        for need in needs:
            ranges.append(self._pool.find_room(need, taken, known))
            taken.append(ranges[-1].span)
        return tuple(ranges)

    def add(self, plan: Plan, route: Route, graph: Graph) -> None:
        """Keep a new graph, and the route to it."""
        place = route.place
        self._admission.calls += 1
        place.used = self._admission.calls
        place.graphs[route.sizes] = graph
        if place not in self.listed:
            self.listed.append(place)
        routes = self._routes.setdefault((plan.sizes, route.sizes, route.where), [])
        if route not in routes:
            routes.append(route)
            routes.sort(key=lambda known: bool(known.place.copied))  # those that spare a copy first
        self._admission.unused[route.sizes] = self._admission.unused.get(route.sizes, 0) + 1

    def drop_graphs(self, sizes: Sizes) -> None:
        """Drop the graphs of one bucket at all places."""
        for place in self.listed:
            place.graphs.pop(sizes, None)

    def has_room(self) -> bool:
        """Return whether one more graph may be held; those of a place that is idle for long make room."""
        return not self.is_full() or self._drop_idle_place()

    def is_full(self) -> bool:
        return self.graph_count() >= self._options.max_graphs

    def graph_count(self) -> int:
        return sum(len(place.graphs) for place in self.listed)


def no_memory(error: torch.OutOfMemoryError) -> Refusal:
    return Refusal(f"no memory for the output pool: {error}")
