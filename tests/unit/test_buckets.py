"""Buckets: every size has the smallest capture size that holds it and that the guards admit."""

from __future__ import annotations

import bisect

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cudagraph_backend.runtime import buckets

# Written out from the rule: 1, 2, 4, 8, then by 8 up to 256, by 16 up to 512, by 32 up to 1024, ...
LADDER = [
    *(1, 2, 4, 8),
    *range(16, 257, 8),
    *range(272, 513, 16),
    *range(544, 1025, 32),
    *range(1088, 2049, 64),
    *range(2176, 4097, 128),
]
small = st.integers(1, 4096)
size_lists = st.sets(st.integers(1, 300), min_size=1, max_size=12).map(lambda sizes: tuple(sorted(sizes)))


def anything(size: int) -> bool:
    return True


def test_automatic_sizes_are_those_of_the_rule():
    assert [buckets.next_auto_size(n) for n in range(1, 4097)] == [
        LADDER[bisect.bisect_left(LADDER, n)] for n in range(1, 4097)
    ]


@given(st.integers(129, 2**40))
def test_less_than_a_sixteenth_of_a_large_bucket_is_padding(n: int):
    size = buckets.next_auto_size(n)
    assert size >= n
    assert 16 * (size - n) < size


@given(st.integers(7, 40))
def test_a_doubling_holds_sixteen_sizes(exponent: int):
    size, count = 1 << exponent, 0
    while size < 2 << exponent:
        size = buckets.next_auto_size(size + 1)
        count += 1
    assert (size, count) == (2 << exponent, 16)


@given(st.integers(0, 2**40))
def test_an_automatic_size_serves_itself(n: int):
    size = buckets.next_auto_size(n)
    assert buckets.next_auto_size(size) == size


@given(small)
@example(1)
@example(8)
@example(255)
@example(257)
def test_every_size_up_to_the_bound_gets_the_smallest_of_the_automatic_sizes_and_the_bound(upper: int):
    sizes = [size for size in LADDER if size < upper] + [upper]
    chosen = [buckets.choose(n, "auto", upper, anything) for n in range(1, upper + 1)]
    assert chosen == [sizes[bisect.bisect_left(sizes, n)] for n in range(1, upper + 1)]
    assert sorted(set(chosen)) == sizes


@given(small)
def test_without_a_bound_every_size_gets_the_smallest_automatic_size(n: int):
    assert buckets.choose(n, "auto", None, anything) == LADDER[bisect.bisect_left(LADDER, n)]


@given(small, small, st.none() | st.just(4096), st.just("auto") | size_lists)
def test_a_larger_size_never_gets_a_smaller_bucket(n: int, m: int, upper: int | None, sizes: buckets.CaptureSizes):
    first, second = (buckets.choose(size, sizes, upper, anything) for size in sorted((n, m)))
    if sizes != "auto" and second is None:
        return
    assert first is not None
    assert second is not None
    assert first <= second


@given(st.integers(1, 310), size_lists, st.none() | st.integers(1, 310), st.sets(st.integers(1, 300)))
def test_of_the_users_sizes_the_smallest_admitted_serves(
    n: int, sizes: tuple[int, ...], upper: int | None, forbidden: set[int]
):
    assume(upper is None or n <= upper)
    admitted = [size for size in (min(s, upper or s) for s in sizes if n <= s) if size not in forbidden]
    exact = n if n <= max(sizes) else None  # guards admit none of them: the size gets a graph of its own
    chosen = buckets.choose(n, sizes, upper, lambda size: size not in forbidden)
    assert chosen == (min(admitted) if admitted else exact)


@pytest.mark.parametrize(
    ("n", "upper", "multiple", "chosen"),
    [
        (9, None, 3, 24),
        (10, None, 5, 40),
        (3, 20, 5, 20),  # the bound itself is the last to try
        (33, None, 64, 64),
        (18, 23, 4, 18),  # no size from the bound on comes after it
        (10, None, 7, 10),  # 16, 24, 32, 40: none; the exact size
        (129, None, 97, 129),
    ],
)
def test_guards_choose_among_the_next_automatic_sizes(n: int, upper: int | None, multiple: int, chosen: int):
    assert buckets.choose(n, "auto", upper, lambda size: size % multiple == 0) == chosen


@given(st.data(), st.just("auto") | size_lists, st.none() | st.integers(1, 300))
def test_memory_is_provided_for_every_bucket_that_may_come(
    data: st.DataObject, sizes: buckets.CaptureSizes, upper: int | None
):
    possible = [buckets.choose(n, sizes, upper, anything) for n in range(1, (upper or 300) + 1)]
    bucket = data.draw(st.sampled_from([size for size in possible if size is not None] or [1]))
    provided = buckets.largest(sizes, upper, bucket)
    assert provided >= bucket
    if sizes != "auto" or upper is not None:
        assert provided == max([size for size in possible if size is not None] + [bucket])


@given(st.integers(1, 2**40))
def test_without_a_bound_memory_is_provided_up_to_the_next_power_of_two(bucket: int):
    provided = buckets.largest("auto", None, bucket)
    assert provided.bit_count() == 1
    assert bucket <= provided < 2 * bucket
