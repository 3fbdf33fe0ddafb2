"""Places in the step, the output ranges that belong to them, and the graphs captured there.

A *place* is where a region is called: the same Python frame, and the same kind of region (inference, forward,
backward). Recompilations of one frame (the size-1 region, the static first call, the dynamic region) never run at the
same time, so they share the place's ranges, as all buckets of a region do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cudagraph_backend.drivers import Graph
from cudagraph_backend.output_pool import OutputPool, OutputRange, can_move_out

Ranges = list[OutputRange]

# Without the means to move a live output (torch 2.11), that many sets of ranges keep up to so many outputs of a place
# alive before its region runs uncaptured. Each set has graphs of its own.
_SETS = 1 if can_move_out() else 4


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    """A graph, and the memory that it was captured with.

    ``static_addresses`` has the address of each static argument (``None`` for any other), ``ranges`` the output
    ranges. A range that grows where it stands stays the same one.
    """

    graph: Graph
    static_addresses: list[int | None]
    ranges: Ranges

    def fits(self, ranges: Ranges) -> bool:
        """Whether it writes to these ranges."""
        return len(ranges) >= len(self.ranges) and all(a is b for a, b in zip(self.ranges, ranges, strict=False))


class Place:
    """The output ranges of one place, grown to the need of the largest bucket captured there."""

    def __init__(self, pool: OutputPool):
        self._pool = pool
        self._sets: list[Ranges] = [[]]

    def free_ranges(self, count: int | None) -> Ranges | None:
        """A set of ranges of which the first ``count`` hold no live output (``None``: all of them).

        A live output is moved out first. Returns ``None`` if live outputs hold every set and this torch can't move
        them. The list is the place's own: ``reserve`` makes it longer.
        """
        for ranges in self._sets:
            if not any(r.is_live() for r in ranges[:count]):
                return ranges
        if can_move_out():
            for taken in self._sets[0][:count]:
                if taken.is_live():
                    taken.move_out()
                    self._pool.moved_out += 1
            return self._sets[0]
        if len(self._sets) < _SETS:
            self._sets.append([])
            return self._sets[-1]
        return None

    def reserve(self, ranges: Ranges, needs: Sequence[int]) -> None:
        """Make the first ranges at least ``needs`` bytes long. One that can't grow where it stands moves.

        Raises ``torch.OutOfMemoryError``, with the ranges as they were, or some of them longer.
        """
        for index, need in enumerate(needs):
            if index == len(ranges):
                ranges.append(self._pool.allocate(need))
            elif ranges[index].nbytes < need and not self._pool.extend(ranges[index], need):
                old, ranges[index] = ranges[index], self._pool.allocate(need)
                self._pool.free([old])

    def has(self, graph: CapturedGraph) -> bool:
        """Whether the ranges that a graph writes to are still the place's."""
        return any(graph.fits(ranges) for ranges in self._sets)

    def __del__(self) -> None:
        for ranges in self._sets:
            self._pool.free(ranges)
