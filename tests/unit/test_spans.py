"""Spans of bytes: merging keeps the bytes, and a span meets those that share one with it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cudagraph_backend.memory.spans import Span, meets, merged

span = st.tuples(st.integers(-8, 20), st.integers(0, 6)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def bytes_of(spans: list[Span]) -> set[int]:
    return {byte for first, end in spans for byte in range(first, end)}


@given(st.lists(span))
def test_merged_spans_have_the_same_bytes_and_do_not_touch(spans: list[Span]):
    result = merged(spans)
    assert bytes_of(result) == bytes_of(spans)
    assert all(first < end for first, end in result)
    assert all(end < first for (_, end), (first, _) in pairwise(result))


@given(span, st.lists(span))
def test_spans_meet_if_they_share_a_byte(one: Span, others: list[Span]):
    assert meets(one, merged(others)) == bool(bytes_of([one]) & bytes_of(others))
