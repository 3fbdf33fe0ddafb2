"""Arithmetic of sizes and strides, against all addresses enumerated one by one."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cudagraph_backend.memory.strides import Shape, extent, overlaps_itself, reaching_once

shapes = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=4).map(
    lambda dims: (tuple(n for n, _ in dims), tuple(s for _, s in dims))
)


def addresses(shape: Shape) -> list[int]:
    """The address of every index, in order."""
    size, stride = shape
    return [sum(map(math.prod, zip(index, stride, strict=True))) for index in itertools.product(*map(range, size))]


def addresses_without_expanded_dims(shape: Shape) -> list[int]:
    size, stride = shape
    return addresses((tuple(1 if s == 0 and n > 0 else n for n, s in zip(size, stride, strict=True)), stride))


@st.composite
def packed(draw: st.DrawFn) -> Shape:
    """Any order of dims, with gaps between the entries of some: no two indices share an address."""
    order = draw(st.permutations(range(draw(st.integers(0, 4)))))
    size, stride, step = [0] * len(order), [0] * len(order), 1
    for dim in order:
        step *= draw(st.integers(1, 3))
        size[dim], stride[dim] = draw(st.integers(1, 4)), step
        step *= size[dim]
    return tuple(size), tuple(stride)


@given(shapes)
@example(((), ()))
@example(((3, 0), (5, 1)))
def test_extent_ends_behind_the_last_address(shape: Shape):
    assert extent(*shape) == max(addresses(shape), default=-1) + 1


@given(shapes)
@example(((2, 2), (1, 1)))
@example(((3, 4), (2, 1)))
@example(((4, 2), (1, 3)))
def test_no_overlap_goes_unseen(shape: Shape):
    reached = addresses_without_expanded_dims(shape)
    if len(set(reached)) < len(reached):
        assert overlaps_itself(*shape)


@given(packed())
def test_packed_tensors_do_not_overlap(shape: Shape):
    assert len(set(addresses(shape))) == len(addresses(shape))
    assert not overlaps_itself(*shape)


@given(packed(), st.integers(1, 5), st.integers(0, 4))
def test_expanding_a_dim_is_no_overlap(shape: Shape, length: int, position: int):
    size, stride = list(shape[0]), list(shape[1])
    size.insert(position, length)
    stride.insert(position, 0)
    assert not overlaps_itself(size, stride)


@pytest.mark.parametrize(
    ("size", "stride"), [((4, 3), (2, 1)), ((2, 2), (1, 1)), ((3, 5), (1, 2)), ((2, 3, 2), (3, 2, 6))]
)
def test_overlapping_windows_are_seen(size: tuple[int, ...], stride: tuple[int, ...]):
    assert overlaps_itself(size, stride)


@given(shapes)
def test_reaching_once_reaches_every_address_and_none_twice(shape: Shape):
    once = addresses(reaching_once(*shape))
    assert len(set(once)) == len(once)
    assert set(once) >= set(addresses(shape))


@given(shapes)
def test_reaching_once_reaches_no_address_outside_of_the_tensor(shape: Shape):
    assert set(addresses(reaching_once(*shape))) <= set(range(extent(*shape)))


@given(packed())
def test_reaching_once_leaves_a_packed_tensor_as_it_is(shape: Shape):
    assert reaching_once(*shape) == shape


def test_reaching_once_takes_one_entry_of_an_expanded_dim():
    assert reaching_once((3, 4), (0, 1)) == ((1, 4), (0, 1))
    assert reaching_once((3, 4), (2, 0)) == ((3, 1), (2, 0))


def test_reaching_once_spans_an_overlapping_window():
    assert reaching_once((3, 4), (2, 1)) == ((8,), (1,))


@pytest.mark.parametrize("function", [extent, overlaps_itself, reaching_once])
def test_size_and_stride_must_be_of_one_length(function):
    with pytest.raises(ValueError, match="zip"):
        function((2, 3), (1,))
