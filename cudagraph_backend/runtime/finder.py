"""Finding arguments: where the staged inputs of a call are read, in place or copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any
from weakref import ref

from cudagraph_backend.memory.copies import compact, is_aligned
from cudagraph_backend.memory.output_pool import OutputPool
from cudagraph_backend.memory.output_range import OutputRange, RangeStorage
from cudagraph_backend.runtime.limits import Limits
from cudagraph_backend.runtime.plan import Plan, Sizes
from cudagraph_backend.runtime.readings import Sighting, Where


class Finder:
    """Finds the arguments of one region's calls. To look costs more than to see that nothing has moved."""

    def __init__(self, pool: OutputPool, limits: Limits):
        self._pool = pool
        self._limits = limits
        self._found: dict[tuple[Sizes, int], Counter[int]] = {}

    def where(self, plan: Plan, args: list[Any]) -> Where:
        """Return where the call's arguments are read. Saved ones that are to be copied get the strides expected."""
        for sighting in plan.sightings:
            if sighting.holds(self._pool, args):
                break
        else:
            sighting = self._look(plan, args)
        for index, stride in sighting.strided:
            args[index] = compact(args[index], stride)
        return sighting.where

    def _look(self, plan: Plan, args: Sequence[Any]) -> Sighting:
        where: list[int | None] = []
        strided: list[tuple[int, tuple[int, ...]]] = []
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
                found = self._few((), reading.index, offset, self._limits.caches_per_input) if may_stay else None
            # Of two arguments on one range, one might overwrite the padded rows of the other.
            elif not reading.is_padded or taken not in padded:
                may_stay = True
                padded += [taken] if reading.is_padded else []
                found = self._few(plan.bucket.sizes, reading.index, offset, self._limits.found_per_input)
            where.append(found)
            if found is None and not reading.is_as_compiled(tensor):
                strided.append((reading.index, reading.real[1]))
            is_settled &= not may_stay or found is not None
            if is_inside:
                lent = self._pool.lent(tensor.untyped_storage())
                is_settled &= lent is not None
                inside.append((reading.index, address, ref(lent) if lent is not None else None))
            elif reading.is_cache:
                inside.append((reading.index, address, None))
        known = {index for index, _, _ in inside}
        outside = tuple(reading.index for reading in plan.readings if reading.index not in known)
        strides = tuple((reading.index, args[reading.index].stride()) for reading in plan.readings if reading.is_saved)
        sighting = Sighting(tuple(where), tuple(inside), outside, strides, tuple(strided))
        if is_settled:
            plan.sightings = [sighting, *plan.sightings[: self._limits.sightings - 1]]
        return sighting

    def _few(self, sizes: Sizes, index: int, offset: int, most: int) -> int | None:
        """Return the offset, unless graphs read this input at many others: then it must be met often, or is copied."""
        found = self._found.setdefault((sizes, index), Counter())
        if len(found) > self._limits.found_remembered:
            found.clear()
        if offset not in found and len(found) < most:
            found[offset] = self._limits.found_often
        found[offset] += 1
        return offset if found[offset] > self._limits.found_often else None
