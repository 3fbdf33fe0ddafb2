"""Limits: how much of anything a region may have, and whether one more graph is captured.

Every number is a guess of what programs do; beside it stands the program that it was made for.
"""

from __future__ import annotations

from dataclasses import dataclass

from cudagraph_backend.errors import Refusal
from cudagraph_backend.runtime.plan import Sizes

TOO_MANY_GRAPHS = Refusal("the region holds max_graphs graphs")
NO_MEMORY = Refusal("no memory to capture a graph")
MET_ONCE = Refusal("a size that depends on data is met for the first time")
ADDRESSES_MOVE = Refusal("arguments keep moving to new addresses")


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one region; its graphs are limited by the option ``max_graphs``.

    Attributes:
        unused_captures: captures of a bucket in a row of which no call made use. A loop over layers calls one region
            with as many sets of parameters before it meets any of them again.
        places: sets of addresses at which graphs are held.
        idle_calls: after so many calls a place that none of them used may make room, or memory may be had again.
        found_per_input: offsets in the pool at which an input is read, before one must be met often to be read there.
        caches_per_input: addresses outside of it; a cache has one, or two that alternate.
        found_often: meetings after which an address is read where it is, however many others there are.
        found_remembered: offsets that are counted per input, before counting starts anew.
        sizes_remembered: sizes that depend on data and were met once, before forgetting them all.
        sightings: remembered per plan. ``x = f(x)`` alternates between two.
        held_places: blocked by kept outputs, before calls get copies. ``out = f(x)`` alternates between two.
        places_per_step: whose outputs are all alive; with the next place calls get copies, too.
        copies_watched: a caller who keeps no more outputs than this would do with as many places.
        copies_died: copies in a row that died young, before their range is lent after all; twice as many each time.
        most_doublings: of that number.
        blocked_calls: after so many, a place that was of no use is dropped when another one takes its role.
    """

    unused_captures: int = 32
    places: int = 128
    idle_calls: int = 1000
    found_per_input: int = 8
    caches_per_input: int = 2
    found_often: int = 8
    found_remembered: int = 256
    sizes_remembered: int = 1024
    sightings: int = 4
    held_places: int = 2
    places_per_step: int = 16
    copies_watched: int = 4
    copies_died: int = 8
    most_doublings: int = 12
    blocked_calls: int = 64


LIMITS = Limits()


class Admission:
    """Decides whether a graph is captured, by what became of those that were captured before.

    ``calls`` are those of the region that met a place, by which idleness is told; ``unused`` are, by bucket, the
    captures since one of its graphs was replayed.
    """

    def __init__(self, limits: Limits, sizes_from_data: bool):
        self._limits = limits
        self._sizes_from_data = sizes_from_data
        self.calls = 0
        self._paused_until = -1
        self.unused: dict[Sizes, int] = {}
        self._met: set[Sizes] = set()  # buckets, where sizes depend on data
        self._put_off: set[object] = set()

    @property
    def is_paused(self) -> bool:
        """Whether memory was short not long ago."""
        return self.calls <= self._paused_until

    def pause(self) -> Refusal:
        """Capture nothing for a while, after a capture for which there was no memory; graphs are replayed."""
        self._paused_until = self.calls + self._limits.idle_calls
        return NO_MEMORY

    def is_met_once(self, sizes: Sizes) -> bool:
        """Return whether a bucket is met for the first time where that counts: most such sizes may never come again."""
        if not self._sizes_from_data or sizes in self._met:
            return False
        if len(self._met) >= self._limits.sizes_remembered:
            self._met.clear()
        self._met.add(sizes)
        return True

    def is_put_off(self, sizes: Sizes, addresses: object) -> bool:
        """Return whether addresses are met for the first time after many captures that no call made use of."""
        if self.unused.get(sizes, 0) < self._limits.unused_captures or addresses in self._put_off:
            return False
        if len(self._put_off) >= self._limits.places:
            self._put_off.clear()
        self._put_off.add(addresses)
        return True
