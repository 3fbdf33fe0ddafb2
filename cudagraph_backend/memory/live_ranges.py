"""Live ranges: which bytes of the output pool hold outputs that somebody still uses."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from operator import attrgetter

from cudagraph_backend.memory.output_range import OutputRange
from cudagraph_backend.memory.spans import Span

_offset = attrgetter("offset")


class LiveRanges:
    """The ranges that may be live, by offset; no two of them overlap.

    A range whose output has died stays listed until it is in the way: most likely it is lent again at once.
    """

    def __init__(self) -> None:
        self._listed: list[OutputRange] = []
        self._members: set[OutputRange] = set()

    def are_free(self, spans: Iterable[Span]) -> bool:
        """Return whether nothing in the spans is live."""
        listed = self._listed
        for first, end in spans:
            position = bisect_left(listed, end, key=_offset) - 1
            while position >= 0 and listed[position].end > first:
                if listed[position].is_live():
                    return False
                position -= 1
        return True

    def within(self, span: Span) -> list[OutputRange]:
        """Return the live ranges that share a byte with a span."""
        first, end = span
        position = bisect_left(self._listed, end, key=_offset)
        meeting: list[OutputRange] = []
        while position and self._listed[position - 1].end > first:
            position -= 1
            meeting.append(self._listed[position])
        return [taken for taken in meeting if self._is_live(taken)]

    def all(self) -> list[OutputRange]:
        """Return the live ranges, by offset."""
        return [taken for taken in list(self._listed) if self._is_live(taken)]

    def _is_live(self, taken: OutputRange) -> bool:
        """Return whether a range is live; one that is not is listed no more."""
        if not taken.is_live():
            self.remove(taken)
            return False
        return True

    def add(self, taken: OutputRange) -> None:
        """List a range in place of those that it overlaps, which are dead."""
        if taken in self._members:
            return
        listed = self._listed
        first = position = bisect_left(listed, taken.offset, key=_offset)
        if first and listed[first - 1].end > taken.offset:
            first -= 1
        while position < len(listed) and listed[position].offset < taken.end:
            position += 1
        for other in listed[first:position]:
            assert not other.is_live()
            self._members.remove(other)
        listed[first:position] = [taken]
        self._members.add(taken)

    def remove(self, taken: OutputRange) -> None:
        """List a range no more."""
        self._listed.remove(taken)
        self._members.remove(taken)
