"""The tree: places in the step where a region is called, the graphs captured there, and the routes of calls to them.

A *place* is a region called with certain addresses: those of its static inputs, where in the output pool it reads its
other inputs, and the ranges that it writes its outputs to. From place to place leads what a call finds its arguments to
be: an output of the place before, read where it lies. All buckets share a place's addresses, one graph each.

Nothing says beforehand that a place may be used: other places may use the same bytes. It may if nothing is alive in
what it writes. That is looked up at every call, so that no order of calls, and no lifetime of an output, is a mistake.
What was handed out is never moved or overwritten: where callers keep the outputs of a few places, the next place keeps
its ranges, and calls get copies of what is written there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any
from weakref import ref

import torch

from cudagraph_backend.drivers import Graph
from cudagraph_backend.errors import Refusal
from cudagraph_backend.options import Options
from cudagraph_backend.output_pool import OutputPool, OutputRange, RangeStorage
from cudagraph_backend.plan import Plan, Sizes
from cudagraph_backend.region import Region
from cudagraph_backend.spans import Span, meets, merged
from cudagraph_backend.staging import (
    Reading,
    Sighting,
    StagedCopy,
    Staging,
    Where,
    byte_span,
    is_aligned,
    prepare,
)
from cudagraph_backend.torch_internals import StorageWeakRef, addresses_equal, current_step

TOO_MANY_GRAPHS = Refusal("the region holds max_graphs graphs")
_NO_MEMORY = Refusal("no memory to capture a graph")
_MET_ONCE = Refusal("a size that depends on data is met for the first time")
_ADDRESSES_MOVE = Refusal("arguments keep moving to new addresses")

_UNUSED_CAPTURES = 32  # a loop over layers calls one region with as many sets of parameters before any is met again
_PLACES = 128
_IDLE_CALLS = 1000  # after so many calls a place that none of them used may make room, or memory may be had again
_FOUND_PER_INPUT = 8
_CACHES_PER_INPUT = 2
_FOUND_OFTEN = 8
_FOUND_REMEMBERED = 256
_SIZES_REMEMBERED = 1024
_SIGHTINGS = 4  # x = f(x) alternates between two
_HELD_PLACES = 2  # out = f(x) alternates between two; where more outputs are kept, calls get copies
_PLACES_PER_STEP = 16  # whose outputs are all alive; with the next place calls get copies, too
_COPIES_WATCHED = 4  # a caller who keeps no more than so many outputs would do with as many places
_COPIES_DIED = 8
_MOST_DOUBLINGS = 12
_BLOCKED_CALLS = 64  # a place that was of no use for so many calls is dropped when another one takes its role


class Copies:
    """What became of the copies that calls got of one range, which tells whether it might be lent as well."""

    def __init__(self) -> None:
        self._last: deque[StorageWeakRef] = deque(maxlen=_COPIES_WATCHED)
        self._died = 0

    def add(self, copy: torch.UntypedStorage) -> int:
        """Note a new copy; returns how many in a row were made since when an older one had died young."""
        self._died = self._died + 1 if self._last and self._last[0].expired() else 0
        self._last.append(StorageWeakRef(copy))
        return self._died


@dataclass(eq=False)
class Place:
    """The addresses of one place, and its graphs by bucket.

    ``static_addresses`` has the address of each static argument (``None`` for any other), ``inputs`` the bytes that
    graphs read, per staged input, and ``staging`` those among them to which an argument may be copied. ``copied`` are
    the indices of the ranges that are lent to nobody: a call gets a copy of what is written there. ``objects`` are the
    arguments at ``Region.objects``. ``used`` is the number of the region's call that used the place last.
    """

    static_addresses: list[int | None]
    inputs: tuple[Span, ...]
    staging: frozenset[Span]
    outputs: tuple[OutputRange, ...] = ()
    graphs: dict[Sizes, Graph] = field(default_factory=dict)
    copied: dict[int, Copies] = field(default_factory=dict)
    used: int = 0
    objects: tuple[Any, ...] = ()

    def accepts(self, readings: Sequence[Reading], where: Where) -> bool:
        """Whether arguments found there are read here, and others can be copied to where they are read."""
        return all(
            found == span[0] if found is not None else span in self.staging and span[0] + reading.nbytes <= span[1]
            for reading, found, span in zip(readings, where, self.inputs, strict=True)
        )

    def holds(self, range_nbytes: Sequence[int]) -> bool:
        """Whether outputs of these sizes fit."""
        return len(range_nbytes) <= len(self.outputs) and all(
            need <= taken.nbytes for need, taken in zip(range_nbytes, self.outputs, strict=False)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """How calls of certain sizes, whose arguments are found in certain places, are answered at a place.

    Attributes:
        inputs: what the bucket runs with: sizes and views of the pool by argument, ``None`` for static ones.
        copies: of the arguments that are copied.
        in_place: of those that are read where they lie; only their padded rows are written.
        written: those of ``copies`` whose arguments the region changes.
        writes: the bytes of the pool that a call writes, as merged spans.
        fixed: where the other arguments are, static or read in place, as merged spans of addresses; those that the
            region changes in ``fixed_written``. Both are empty for a region that changes none.
        stage: copies ``copies``, and fills the padded rows of these and of ``in_place``.
    """

    place: Place
    inputs: list[Any]
    copies: tuple[StagedCopy, ...]
    in_place: tuple[StagedCopy, ...]
    written: tuple[StagedCopy, ...]
    writes: list[Span]
    fixed: list[Span]
    fixed_written: list[Span]
    stage: Staging

    def takes_apart(self, args: Sequence[Any]) -> bool:
        """Whether an argument that the region changes meets another one in memory, and one of them is copied.

        The compiled region sees a change through both; AOTAutograd guards against the overlap only if there was one
        when it compiled.
        """
        copied = [(copy, copy.span(args)) for copy in self.copies]
        if any(meets(span, self.fixed_written) for _, span in copied):
            return True
        for written in self.written:
            span = written.span(args)
            others = merged(other for copy, other in copied if copy is not written)
            if meets(span, self.fixed) or meets(span, others):
                return True
        return False

    def blockers(self, pool: OutputPool) -> list[OutputRange]:
        """The ranges with live outputs that a call would overwrite."""
        return list(dict.fromkeys(taken for span in self.writes for taken in pool.live_in(span)))


class Tree:
    """The places of one region, and the routes to them that calls took."""

    def __init__(
        self,
        region: Region,
        pool: OutputPool,
        options: Options,
        prepare: Callable[[Sequence[StagedCopy], Sequence[StagedCopy]], Staging] = prepare,
    ):
        self._prepare = prepare
        self.places: list[Place] = []
        self.found: dict[tuple[Sizes, int], Counter[int]] = {}
        self._region = region
        self._static = region.static
        self._objects = region.objects
        self._pool = pool
        self._options = options
        self._routes: dict[tuple[Sizes, Sizes, Where], list[Route]] = {}
        self._calls = 0
        self._captures_again = 0  # the number of the call from which on there may be memory
        self._unused: dict[Sizes, int] = {}  # captures of a bucket since one of its graphs was replayed
        self._met: set[Sizes] = set()  # buckets, where sizes depend on data
        self._lent_after_all = 0
        self._put_off: set[tuple[Where, tuple[int | None, ...]]] = set()

    # ---- the hot path

    def where(self, plan: Plan, args: Sequence[Any]) -> Where:
        """Where the call's arguments are read."""
        for sighting in plan.sightings:
            if sighting.holds(self._pool, args):
                return sighting.where
        return self._look(plan, args)

    def route(self, plan: Plan, where: Where, args: list[Any]) -> Route | None:
        """A route to a captured graph that may be replayed, among those that were taken before."""
        sizes = plan.bucket.sizes
        for route in self._routes.get((plan.sizes, sizes, where), ()):
            place = route.place
            if sizes in place.graphs and self._is_called_at(place, args) and self._pool.is_free(route.writes):
                self._calls += 1
                place.used = self._calls
                self._unused[sizes] = 0
                return route
        return None

    def _is_called_at(self, place: Place, args: list[Any]) -> bool:
        """Whether a call has a place's static inputs and objects."""
        return addresses_equal(args, place.static_addresses, self._static) and (
            not self._objects or all(args[i] is o for i, o in zip(self._objects, place.objects, strict=True))
        )

    # ---- the way to a route

    def _look(self, plan: Plan, args: Sequence[Any]) -> Where:
        where: list[int | None] = []
        padded: list[OutputRange] = []
        inside: list[tuple[int, int, ref[RangeStorage] | None]] = []
        is_settled = True
        for reading in plan.readings:
            tensor = args[reading.index]
            address = tensor.data_ptr()
            offset = address - self._pool.address
            is_inside = 0 <= offset < self._pool.nbytes
            taken = reading.found_in(self._pool, tensor) if is_inside else None
            found, may_stay = None, False
            if taken is None:
                may_stay = reading.is_cache and is_aligned(address)
                found = self._few((), reading.index, offset, _CACHES_PER_INPUT) if may_stay else None
            # Of two arguments on one range, one might overwrite the padded rows of the other.
            elif not reading.is_padded or taken not in padded:
                may_stay = True
                padded += [taken] if reading.is_padded else []
                found = self._few(plan.bucket.sizes, reading.index, offset, _FOUND_PER_INPUT)
            where.append(found)
            is_settled &= not may_stay or found is not None
            if is_inside:
                lent = self._pool.lent(tensor.untyped_storage())
                is_settled &= lent is not None
                inside.append((reading.index, address, ref(lent) if lent is not None else None))
            elif reading.is_cache:
                inside.append((reading.index, address, None))
        if is_settled:
            known = {index for index, _, _ in inside}
            outside = tuple(reading.index for reading in plan.readings if reading.index not in known)
            sighting = Sighting(tuple(where), tuple(inside), outside)
            plan.sightings = [sighting, *plan.sightings[: _SIGHTINGS - 1]]
        return tuple(where)

    def _few(self, sizes: Sizes, index: int, offset: int, most: int) -> int | None:
        """The offset, unless graphs read this input at many others already: then it must be met often, or is copied."""
        found = self.found.setdefault((sizes, index), Counter())
        if len(found) > _FOUND_REMEMBERED:
            found.clear()
        if offset not in found and len(found) < most:
            found[offset] = _FOUND_OFTEN
        found[offset] += 1
        return offset if found[offset] > _FOUND_OFTEN else None

    def new_route(self, plan: Plan, where: Where, args: list[Any]) -> Route | Refusal:
        """A route to a place where nothing is alive in what is written.

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
                    refusal = self.refused_capture(plan, where, route.place)
                    if refusal is not None:
                        return refusal
                may_invalidate = False  # of one place only, though on CPU builds its ranges are not free by that
                for taken in blockers:
                    self._pool.invalidate(taken)
                blockers = route.blockers(self._pool)
            if not blockers:
                return route
            is_older = any(taken.step != current_step() for taken in blockers)
            if is_older or len(fitting) >= _PLACES_PER_STEP:
                held.append(route.place)
        return self._elsewhere(plan, where, args, held)

    def _elsewhere(self, plan: Plan, where: Where, args: Sequence[Any], held: Sequence[Place]) -> Route | Refusal:
        """A route to a new place, which gives copies of those outputs that callers keep in enough of the ``held``."""
        enough = _HELD_PLACES
        if held and self.is_full() and self._calls >= self._captures_again:
            self._drop(min(held, key=lambda place: place.used))
            enough = 1
        try:
            place = self._new_place(plan, where, args)
        except torch.OutOfMemoryError as error:
            return no_memory(error)
        kept = Counter(index for other in held for index, taken in enumerate(other.outputs) if self._is_kept(taken))
        place.copied = {index: Copies() for index, count in kept.items() if count >= enough}
        return self._route_to(place, plan, where, args)

    def _is_kept(self, taken: OutputRange) -> bool:
        """Whether an output of this region is alive there."""
        return taken.loan is not None and taken.loan.region == self._region.name and taken.is_live()

    def note_copies(self, place: Place, copies: Mapping[int, torch.UntypedStorage]) -> None:
        """After a call that got copies of some ranges: lend those ranges from now on whose copies die young.

        Places that kept outputs blocked all the while are dropped then: this one has taken their role. Where now and
        then an output is kept after all, that blocks this place, too, and costs captures: so it takes twice as many
        copies each time.
        """
        enough = _COPIES_DIED << min(self._lent_after_all, _MOST_DOUBLINGS)
        for index, copy in copies.items():
            if place.copied[index].add(copy) >= enough and not self.is_full():
                del place.copied[index]
                self._lent_after_all += 1
        if not place.copied:
            for other in [other for other in self.places if self._is_blocked_twin(other, place)]:
                self._drop(other)

    def _is_blocked_twin(self, other: Place, place: Place) -> bool:
        """Whether calls that come to ``place`` would come to the other one, which kept outputs block for long."""
        is_twin = (other.inputs, other.static_addresses) == (place.inputs, place.static_addresses)
        is_idle = other.used < self._calls - _BLOCKED_CALLS
        return other is not place and is_twin and is_idle and any(map(self._is_kept, other.outputs))

    def _may_be_lost(self, blockers: Sequence[OutputRange], where: Where, args: Sequence[Any]) -> bool:
        """Whether later uses of live outputs may raise instead, if the user chose that.

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
        """Where in the pool, or outside of it, arguments are that must stay there: those that are not copied."""
        static = [args[index].data_ptr() - self._pool.address for index in self._static]
        return [*static, *(found for found in where if found is not None)]

    def _fitting(self, plan: Plan, where: Where, args: list[Any]) -> list[Route]:
        """The routes to places with the call's addresses; first those that have a graph for its bucket, and lend it."""
        routes, layout = self._routes.setdefault((plan.sizes, plan.bucket.sizes, where), []), plan.bucket.layout
        known = {route.place for route in routes}
        routes += [
            self._route_to(place, plan, where, args)
            for place in self.places
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
        """A place that reads arguments where they are found, and others where they were read before or at free bytes.

        Raises ``torch.OutOfMemoryError``.
        """
        spans: list[Span | None] = [
            None if found is None else (found, found + reading.nbytes)
            for reading, found in zip(plan.readings, where, strict=True)
        ]
        for position, reading in enumerate(plan.readings):
            if spans[position] is None:
                before = [place.inputs[position] for place in self.places if place.inputs[position] in place.staging]
                taken = [span for span in spans if span is not None]
                spans[position] = self._pool.find_room(max(reading.nbytes, reading.provided), taken, before).span
        inputs = tuple(span for span in spans if span is not None)
        apart = (span for span in inputs if sum(a < span[1] and span[0] < b for a, b in inputs) == 1)
        staging = frozenset(span for span in apart if span[0] >= 0 and span[1] <= self._pool.nbytes)
        static = set(self._static)
        addresses = [arg.data_ptr() if i in static else None for i, arg in enumerate(args)]
        return Place(addresses, inputs, staging, objects=tuple(args[i] for i in self._objects))

    def refused_capture(self, plan: Plan, where: Where, place: Place) -> Refusal | None:
        """Why no graph is captured for a call, though there is none for it.

        After many captures that no call made use of, addresses must be met twice to be captured. So must sizes that
        depend on data: most of them may never come again.
        """
        self._calls += 1
        if self._calls < self._captures_again:
            return _NO_MEMORY
        if self._region.sizes_from_data and plan.bucket.sizes not in self._met:
            if len(self._met) >= _SIZES_REMEMBERED:
                self._met.clear()
            self._met.add(plan.bucket.sizes)
            return _MET_ONCE
        if not self.has_room():
            return TOO_MANY_GRAPHS
        if place not in self.places and len(self.places) >= _PLACES and not self._drop_idle_place():
            return _ADDRESSES_MOVE
        if self._unused.get(plan.bucket.sizes, 0) < _UNUSED_CAPTURES:
            return None
        addresses = (where, (*place.static_addresses, *map(id, place.objects)))
        if addresses in self._put_off:
            return None
        if len(self._put_off) >= _PLACES:
            self._put_off.clear()
        self._put_off.add(addresses)
        return _ADDRESSES_MOVE

    def pause_captures(self) -> Refusal:
        """After one for which there was no memory: graphs are replayed, and nothing new is captured for a while."""
        self._captures_again = self._calls + _IDLE_CALLS
        return _NO_MEMORY

    def _drop_idle_place(self) -> bool:
        idle = min(self.places, key=lambda place: place.used, default=None)
        if idle is None or self._calls - idle.used < _IDLE_CALLS:
            return False
        self._drop(idle)
        return True

    def _drop(self, place: Place) -> None:
        self.places.remove(place)
        for key, routes in self._routes.items():
            self._routes[key] = [route for route in routes if route.place is not place]

    def provide(self, route: Route, range_nbytes: Sequence[int], provided: Sequence[int]) -> Route:
        """The same route, or one to a new place with the same inputs, where outputs of ``range_nbytes`` fit.

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
        known = [span for p in self.places for span in (*p.staging, *(r.span for r in p.outputs))]
        ranges: list[OutputRange] = []
        for need in needs:
            ranges.append(self._pool.find_room(need, taken, known))
            taken.append(ranges[-1].span)
        return tuple(ranges)

    def add(self, plan: Plan, where: Where, route: Route, graph: Graph) -> None:
        """Keep a new graph, and the route to it."""
        sizes, place = plan.bucket.sizes, route.place
        self._calls += 1
        place.used = self._calls
        place.graphs[sizes] = graph
        if place not in self.places:
            self.places.append(place)
        routes = self._routes.setdefault((plan.sizes, plan.bucket.sizes, where), [])
        if route not in routes:
            routes.append(route)
            routes.sort(key=lambda known: bool(known.place.copied))  # those that spare a copy first
        self._unused[sizes] = self._unused.get(sizes, 0) + 1

    def drop_graphs(self, sizes: Sizes) -> None:
        """Those of one bucket."""
        for place in self.places:
            place.graphs.pop(sizes, None)

    def has_room(self) -> bool:
        """Whether one more graph may be held; those of a place that is idle for long make room."""
        return not self.is_full() or self._drop_idle_place()

    def is_full(self) -> bool:
        return self.graph_count() >= self._options.max_graphs

    def graph_count(self) -> int:
        return sum(len(place.graphs) for place in self.places)


def no_memory(error: torch.OutOfMemoryError) -> Refusal:
    return Refusal(f"no memory for the output pool: {error}")


def bucket_inputs(region: Region, sizes: Sizes, buffers: Mapping[int, torch.Tensor]) -> list[Any]:
    """What a bucket runs with, by argument: its sizes and buffers, and ``None`` for what the call itself gives."""
    indices = [i.index for i in region.inputs] + [s.index for s in region.sizes]
    inputs: list[Any] = [None] * (1 + max(indices, default=-1))
    for source, size in zip(region.sizes, sizes, strict=True):
        if source.dim is None:
            inputs[source.index] = size
    for index, buffer in buffers.items():
        inputs[index] = buffer
    return inputs
