"""Staging: real rows arrive, padded rows hold the fill, and nothing else is written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cudagraph_backend.region import TensorInput
from cudagraph_backend.staging import StagingBuffers, shape_at, stage, staged_copy
from cudagraph_backend.strides import Shape, extent

SENTINEL = -7.0
FILLS = ["replica", "zero", math.nan]


@dataclass(frozen=True)
class Padded:
    """A tensor as a call brings it, the shape that its bucket has, and entries per row of every dim."""

    argument: torch.Tensor
    bucket: Shape
    entries: tuple[int, ...]

    @property
    def real(self) -> Shape:
        return tuple(self.argument.shape), self.argument.stride()


def tensor_in_memory(shape: Shape, offset: int) -> torch.Tensor:
    """A tensor whose entries are all different, in a storage that begins before it and ends behind it."""
    return torch.arange(1.0, 4.0 + offset + extent(*shape)).as_strided(*shape, offset)


def strides(sizes: list[int], order: list[int], gaps: list[int], expanded: list[bool]) -> tuple[int, ...]:
    """Dims packed in ``order`` (innermost first) with gaps; expanded ones take no memory."""
    stride, step = [0] * len(sizes), 1
    for dim in order:
        if not expanded[dim]:
            stride[dim] = step * gaps[dim]
            step = stride[dim] * sizes[dim]
    return tuple(stride)


@st.composite
def padded(draw: st.DrawFn) -> Padded:
    """Up to two padded dims among up to three; transposed, with gaps, expanded, at any offset."""
    count = draw(st.integers(1, 3))
    entries = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    rows = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    more = draw(st.lists(st.integers(0, 3), min_size=min(count, 2), max_size=min(count, 2))) + [0]
    gaps = draw(st.lists(st.integers(1, 2), min_size=count, max_size=count))
    expanded = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    order = draw(st.permutations(range(count)))
    size = [k * n for k, n in zip(entries, rows, strict=True)]
    bucket = [k * (n + m) for k, n, m in zip(entries, rows, more, strict=False)]
    real = tuple(size), strides(size, order, gaps, expanded)
    argument = tensor_in_memory(real, draw(st.integers(0, 3)))
    return Padded(argument, (tuple(bucket), strides(bucket, order, gaps, expanded)), tuple(entries))


def filled_by_index(case: Padded, fill: str | float) -> torch.Tensor:
    """What the bucket must hold, entry by entry: a padded entry is like the one at its place in the last real row."""
    result, is_padded = case.argument, torch.zeros(case.bucket[0], dtype=torch.bool)
    for dim, (length, bucket, k) in enumerate(zip(case.argument.shape, case.bucket[0], case.entries, strict=True)):
        index = torch.tensor([i if i < length else length - k + i % k for i in range(bucket)])
        result = result.index_select(dim, index)
        if case.bucket[1][dim] != 0:  # an expanded dim's padded entries are its real entry
            outside = torch.arange(bucket) >= length
            is_padded |= outside.view([-1 if d == dim else 1 for d in range(len(case.bucket[0]))])
    if fill == "replica":
        return result
    return result.masked_fill(is_padded, 0.0 if fill == "zero" else float(fill))


def buffer_for(bucket: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """A bucket's buffer, and the memory that it lies in, which is larger."""
    memory = torch.full((extent(*bucket) + 5,), SENTINEL)
    return memory, memory.as_strided(*bucket)


def untouched(memory: torch.Tensor, bucket: Shape) -> torch.Tensor:
    """The entries of ``memory`` which the bucket does not reach."""
    reached = torch.zeros(memory.shape, dtype=torch.bool)
    reached.as_strided(*bucket).fill_(True)
    return memory[~reached]


@settings(max_examples=300, deadline=None)
@given(padded(), st.sampled_from(FILLS))
def test_bucket_holds_real_rows_then_the_fill(case: Padded, fill: str | float):
    memory, buffer = buffer_for(case.bucket)
    before = case.argument.clone()
    stage([staged_copy(0, buffer, case.real, case.entries, fill)], [case.argument])
    torch.testing.assert_close(buffer, filled_by_index(case, fill), rtol=0, atol=0, equal_nan=True)
    assert (untouched(memory, case.bucket) == SENTINEL).all()
    assert torch.equal(case.argument, before)


@settings(max_examples=100, deadline=None)
@given(padded())
def test_copying_back_gives_the_caller_the_real_rows(case: Padded):
    assume(0 not in case.bucket[1])  # analysis refuses expanded inputs that are written to
    _, buffer = buffer_for(case.bucket)
    copy = staged_copy(0, buffer, case.real, case.entries, "replica")
    stage([copy], [case.argument])
    buffer.copy_(buffer.clone() + 100)  # the region writes in place, padded rows too
    expected = case.argument + 100
    copy.argument(case.argument).copy_(copy.real)
    assert torch.equal(case.argument, expected)


@pytest.mark.parametrize(
    "real", [((4, 3), (2, 1)), ((3, 3), (1, 1)), ((2, 3, 4), (0, 2, 1)), ((5, 2), (1, 3)), ((3, 2, 2), (2, 2, 2))]
)
def test_overlapping_window_arrives_whole(real: Shape):
    argument = tensor_in_memory(real, offset=1)
    memory, buffer = buffer_for(real)
    stage([staged_copy(0, buffer, real, (1,) * len(real[0]), "replica")], [argument])
    assert torch.equal(buffer, argument)
    assert (memory[extent(*real) :] == SENTINEL).all()


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0,)])
@pytest.mark.parametrize("expanded", [False, True])
def test_empty_argument_is_staged(size: tuple[int, ...], expanded: bool):
    argument = torch.ones([1] * len(size)).expand(size) if expanded else torch.ones(size)
    real = tuple(argument.shape), argument.stride()
    buffers = StagingBuffers(torch.device("cpu"))
    tensor = tensor_input(tuple(map(sympy.Integer, size)), tuple(map(sympy.Integer, real[1])))
    buffer = buffers.at(tensor, real, real)
    stage([staged_copy(0, buffer, real, (1,) * len(size), "replica")], [argument])
    assert buffer.shape == argument.shape


@pytest.mark.parametrize("fill", FILLS)
def test_a_smaller_call_after_a_larger_one_leaves_no_stale_row(fill: str | float):
    bucket = (8, 2), (2, 1)
    _, buffer = buffer_for(bucket)
    for rows in (8, 7, 3):
        case = Padded(torch.randn(rows, 2), bucket, (1, 1))
        stage([staged_copy(0, buffer, case.real, case.entries, fill)], [case.argument])
    torch.testing.assert_close(buffer, filled_by_index(case, fill), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("fill", ["replica", "zero"])
def test_any_dtype_is_staged_and_filled(dtype: torch.dtype, fill: str):
    argument = torch.tensor([[1, 0], [0, 1], [1, 1]]).to(dtype)
    buffer = torch.ones(5, 2).to(dtype)
    stage([staged_copy(0, buffer, ((3, 2), (2, 1)), (1, 1), fill)], [argument])
    last = [1, 1] if fill == "replica" else [0, 0]
    assert torch.equal(
        buffer.to(torch.complex64), torch.tensor([[1, 0], [0, 1], [1, 1], last, last]).to(torch.complex64)
    )


def test_every_argument_goes_to_its_own_buffer():
    arguments = [torch.randn(2, 3), 2, torch.randn(3, 2).t()]
    buffers = {0: torch.zeros(2, 3), 2: torch.zeros(3, 2).t()}
    copies = [
        staged_copy(i, b, (tuple(arguments[i].shape), arguments[i].stride()), (1, 1), "zero")
        for i, b in buffers.items()
    ]
    stage(copies, arguments)
    assert torch.equal(buffers[0], arguments[0])
    assert torch.equal(buffers[2], arguments[2])


# ------------------------------------------------------------------------------------------------ buffers


def tensor_input(size: tuple[sympy.Expr, ...], stride: tuple[sympy.Expr, ...], index: int = 0) -> TensorInput:
    return TensorInput(index, f"arg{index}_1", "staged", False, torch.float32, size, stride)


ROWS = sympy.Symbol("s0", integer=True)
MATRIX = tensor_input((ROWS, sympy.Integer(3)), (sympy.Integer(3), sympy.Integer(1)))


def matrix_of(rows: int) -> Shape:
    return shape_at(MATRIX, {ROWS: rows})


def test_shape_at_puts_values_for_symbols():
    tensor = tensor_input((2 * ROWS, sympy.Integer(3)), (sympy.Integer(3), ROWS))
    assert shape_at(tensor, {ROWS: 5}) == ((10, 3), (3, 5))


def test_buckets_are_views_of_one_buffer_which_is_made_once():
    buffers = StagingBuffers(torch.device("cpu"))
    seen = [buffers.at(MATRIX, matrix_of(rows), matrix_of(8)) for rows in (2, 8, 5)]
    assert [tuple(view.shape) for view in seen] == [(2, 3), (8, 3), (5, 3)]
    assert len({view.data_ptr() for view in seen}) == 1
    assert [buffer.numel() for buffer in buffers.buffers()] == [8 * 3]


def test_inputs_have_a_buffer_each():
    buffers = StagingBuffers(torch.device("cpu"))
    first = buffers.at(MATRIX, matrix_of(2), matrix_of(2))
    second = buffers.at(tensor_input(MATRIX.size, MATRIX.stride, index=1), matrix_of(2), matrix_of(2))
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    assert [buffer.numel() for buffer in buffers.buffers()] == [6, 6]


def test_a_buffer_that_is_replaced_stays_for_those_who_read_it():
    buffers = StagingBuffers(torch.device("cpu"))
    small = buffers.at(MATRIX, matrix_of(2), matrix_of(2)).fill_(1)
    large = buffers.at(MATRIX, matrix_of(4), matrix_of(4)).fill_(2)
    assert (small == 1).all()
    assert (large == 2).all()
    assert buffers.at(MATRIX, matrix_of(2), matrix_of(2)).data_ptr() == large.data_ptr()


def test_a_new_buffer_holds_zeros_never_garbage():
    assert torch.equal(StagingBuffers(torch.device("cpu")).at(MATRIX, matrix_of(2), matrix_of(8)), torch.zeros(2, 3))


def test_a_buffer_has_the_dtype_of_its_input():
    half = TensorInput(0, "x", "staged", False, torch.float16, MATRIX.size, MATRIX.stride)
    assert StagingBuffers(torch.device("cpu")).at(half, matrix_of(2), matrix_of(2)).dtype == torch.float16


def test_a_buffer_made_in_inference_mode_can_be_written_outside_of_it():
    with torch.inference_mode():
        buffer = StagingBuffers(torch.device("cpu")).at(MATRIX, matrix_of(2), matrix_of(2))
    argument = torch.randn(2, 3, requires_grad=True)
    with torch.no_grad():
        stage([staged_copy(0, buffer, matrix_of(2), (1, 1), "replica")], [argument])
    assert torch.equal(buffer, argument)
    assert not buffer.is_inference()
