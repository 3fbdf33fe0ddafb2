"""The call of a region that runs in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cudagraph_backend.region import Wiring


@dataclass(frozen=True, slots=True)
class _Step:
    """One part: the values it takes and makes, and those that nobody reads after it."""

    call: Callable[[list[Any]], Sequence[Any]]
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    drops: tuple[int, ...]


class Composition:
    """Calls the parts of a region in turn: with one list of arguments, which it empties.

    A value is dropped when the last part that reads it is called, so that memory is held no longer than by the region
    as a whole.
    """

    def __init__(self, wiring: Wiring, calls: Sequence[Callable[[list[Any]], Sequence[Any]]]):
        self._sizes = wiring.sizes
        self._constants = wiring.constants
        self._results = wiring.results
        self._steps: list[_Step] = []
        kept = set(wiring.results)
        for call, reads, makes in reversed(list(zip(calls, wiring.reads, wiring.makes, strict=True))):
            drops = tuple(set(reads) - kept)
            kept.update(drops)
            self._steps.insert(0, _Step(call, reads, makes, drops))
        self._kept = frozenset(kept)

    def __call__(self, args: list[Any]) -> list[Any]:
        sizes = [size.read(args) for size in self._sizes]
        given = [*args, *sizes, *self._constants]
        values = {slot: given[slot] for slot in range(len(given)) if slot in self._kept}
        given.clear()
        args.clear()
        for step in self._steps:
            inputs = [values[slot] for slot in step.reads]
            for slot in step.drops:
                del values[slot]
            values.update(zip(step.makes, step.call(inputs), strict=True))
        return [values[slot] for slot in self._results]
