"""Staging: real rows arrive, padded rows hold the fill, and nothing else is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cudagraph_backend.drivers.host import HostMemory
from cudagraph_backend.memory.copies import stage, staged_copy, write_back
from cudagraph_backend.memory.output_pool import OutputPool
from cudagraph_backend.memory.output_range import Loan
from cudagraph_backend.memory.strides import Shape, extent
from cudagraph_backend.region import TensorInput
from cudagraph_backend.runtime.readings import Reading, shape_at

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
    stage([staged_copy(0, buffer, case.real, case.entries, fill)], (), [case.argument])
    torch.testing.assert_close(buffer, filled_by_index(case, fill), rtol=0, atol=0, equal_nan=True)
    assert (untouched(memory, case.bucket) == SENTINEL).all()
    assert torch.equal(case.argument, before)


@settings(max_examples=100, deadline=None)
@given(padded())
def test_copying_back_gives_the_caller_the_real_rows(case: Padded):
    assume(0 not in case.bucket[1])  # analysis refuses expanded inputs that are written to
    _, buffer = buffer_for(case.bucket)
    copy = staged_copy(0, buffer, case.real, case.entries, "replica")
    stage([copy], (), [case.argument])
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
    stage([staged_copy(0, buffer, real, (1,) * len(real[0]), "replica")], (), [argument])
    assert torch.equal(buffer, argument)
    assert (memory[extent(*real) :] == SENTINEL).all()


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0,)])
@pytest.mark.parametrize("expanded", [False, True])
def test_empty_argument_is_staged(size: tuple[int, ...], expanded: bool):
    argument = torch.ones([1] * len(size)).expand(size) if expanded else torch.ones(size)
    real = tuple(argument.shape), argument.stride()
    _, buffer = buffer_for(real)
    stage([staged_copy(0, buffer, real, (1,) * len(size), "replica")], (), [argument])
    assert buffer.shape == argument.shape


@pytest.mark.parametrize("fill", FILLS)
def test_a_smaller_call_after_a_larger_one_leaves_no_stale_row(fill: str | float):
    bucket = (8, 2), (2, 1)
    _, buffer = buffer_for(bucket)
    for rows in (8, 7, 3):
        case = Padded(torch.randn(rows, 2), bucket, (1, 1))
        stage([staged_copy(0, buffer, case.real, case.entries, fill)], (), [case.argument])
    torch.testing.assert_close(buffer, filled_by_index(case, fill), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("fill", ["replica", "zero"])
def test_any_dtype_is_staged_and_filled(dtype: torch.dtype, fill: str):
    argument = torch.tensor([[1, 0], [0, 1], [1, 1]]).to(dtype)
    buffer = torch.ones(5, 2).to(dtype)
    stage([staged_copy(0, buffer, ((3, 2), (2, 1)), (1, 1), fill)], (), [argument])
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
    stage(copies, (), arguments)
    assert torch.equal(buffers[0], arguments[0])
    assert torch.equal(buffers[2], arguments[2])


def test_padded_rows_of_arguments_read_in_place_are_filled_too():
    memory = torch.arange(12.0).view(6, 2)
    copy = staged_copy(0, memory, ((4, 2), (2, 1)), (1, 1), "replica")
    stage((), [copy], [torch.zeros(4, 2)])
    assert torch.equal(memory, torch.tensor([[0.0, 1], [2, 3], [4, 5], [6, 7], [6, 7], [6, 7]]))


def test_only_written_arguments_are_copied_back():
    buffer, argument = torch.ones(3, 2), torch.zeros(2, 2)
    write_back([staged_copy(0, buffer, ((2, 2), (2, 1)), (1, 1), "replica")], [argument])
    assert torch.equal(argument, torch.ones(2, 2))


# ------------------------------------------------------------------------------------------------ reading in place

ROWS = sympy.Symbol("s0", integer=True)


def test_shape_at_puts_values_for_symbols():
    size, stride = (2 * ROWS, sympy.Integer(3)), (sympy.Integer(3), ROWS)
    tensor = TensorInput(0, "arg0_1", "staged", False, torch.float32, size, stride)
    assert shape_at(tensor, {ROWS: 5}) == ((10, 3), (3, 5))


def reading(real: Shape, bucket: Shape, dtype: torch.dtype = torch.float32) -> Reading:
    return Reading(0, dtype, real, bucket, (1,) * len(real[0]), "replica")


MAY_STAY = {
    "all rows are real": (((4, 3), (3, 1)), ((4, 3), (3, 1)), True),
    "padded rows behind": (((4, 3), (3, 1)), ((8, 3), (3, 1)), True),
    "columns of a larger tensor": (((4, 3), (8, 1)), ((8, 3), (8, 1)), True),
    "other strides in the bucket": (((3, 4), (4, 1)), ((3, 8), (8, 1)), False),
    "padded entries between real ones": (((3, 4), (10, 1)), ((3, 8), (10, 1)), False),
    "one real row of columns": (((1, 4), (10, 1)), ((1, 8), (10, 1)), True),
    "transposed": (((3, 4), (1, 3)), ((3, 8), (1, 3)), True),
    "expanded": (((4, 3), (0, 1)), ((8, 3), (0, 1)), False),
    "no row": (((0, 3), (3, 1)), ((8, 3), (3, 1)), False),
    "overlapping windows": (((4, 3), (1, 1)), ((4, 3), (1, 1)), False),
    "two dims padded": (((4, 3), (3, 1)), ((8, 6), (6, 1)), False),
}


@pytest.mark.parametrize("name", MAY_STAY)
def test_rows_may_stay_where_they_are_if_padding_comes_behind_them(name: str):
    real, bucket, expected = MAY_STAY[name]
    assert reading(real, bucket).may_stay == expected


@pytest.fixture
def pool() -> OutputPool:
    return OutputPool(HostMemory())


def lent(pool: OutputPool, rows: int, capacity: int) -> torch.Tensor:
    """An output of ``rows`` × 4 floats, in a range with room for ``capacity`` rows."""
    taken = pool.find_room(capacity * 16, [(0, 1)])
    storage = pool.lend(taken, rows * 16, Loan("region 0", ((0, 0, rows * 16),)), (1, 0)).storage
    return torch.empty(0).set_(storage, 0, (rows, 4), (4, 1)).normal_()


def shape_of(rows: int, width: int = 4) -> Shape:
    return (rows, width), (4, 1)


FOUND: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Reading, bool]] = {
    "an output": (lambda y: y, reading(shape_of(40), shape_of(64)), True),
    "an output, nothing padded": (lambda y: y, reading(shape_of(40), shape_of(40)), True),
    "an output's last rows": (lambda y: y[8:], reading(shape_of(32), shape_of(56)), True),
    "an output's last columns": (lambda y: y[::, 0:4], reading(shape_of(40), shape_of(64)), True),
    "more rows than there is room": (lambda y: y, reading(shape_of(40), shape_of(65)), False),
    "last rows, and no room behind": (lambda y: y[8:], reading(shape_of(32), shape_of(57)), False),
    "rows with real ones behind": (lambda y: y[:30], reading(shape_of(30), shape_of(32)), False),
    "rows with real ones behind, nothing padded": (lambda y: y[:30], reading(shape_of(30), shape_of(30)), True),
    "columns with real ones behind": (lambda y: y[:, :2], reading(shape_of(40, 2), shape_of(64, 2)), False),
    "not aligned": (lambda y: y.view(-1)[1:157].view(39, 4), reading(shape_of(39), shape_of(39)), False),
    "memory of its own": (lambda y: y.clone(), reading(shape_of(40), shape_of(64)), False),
}


@pytest.mark.parametrize("name", FOUND)
def test_pooled_outputs_are_found_where_padding_harms_nothing(pool: OutputPool, name: str):
    of, reads, expected = FOUND[name]
    output = lent(pool, rows=40, capacity=64)
    found = reads.found_in(pool, of(output))
    assert (found is not None) == expected
    assert found is None or pool.holder(output.untyped_storage()) is found


SAVED: dict[str, tuple[Shape, bool, bool]] = {
    "in the bucket's strides": (((3, 5), (8, 1)), True, True),
    "in the bucket's strides, where callers have parts of it": (((3, 5), (8, 1)), False, False),
    "in those of a larger bucket": (((3, 5), (16, 1)), True, False),
    "compact": (((3, 5), (5, 1)), True, False),
    "of one row": (((1, 5), (5, 1)), False, True),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_is_read_between_padded_rows_that_are_nobodys(pool: OutputPool, name: str):
    shape, is_hidden, expected = SAVED[name]
    taken = pool.find_room(1024, [(0, 1)])
    nbytes = extent(*shape) * 4
    storage = pool.lend(taken, nbytes, Loan("region 0", ((0, 0, nbytes),), is_hidden=is_hidden), (1, 0)).storage
    tensor = torch.empty(0).set_(storage, 0, *shape)
    reads = replace(reading((shape[0], (5, 1)), ((4, 8), (8, 1))), is_saved=True)
    assert (reads.found_in(pool, tensor) is taken) == expected
    assert reads.is_as_compiled(tensor) == (name in ("compact", "of one row"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.complex64])
def test_a_buffer_is_a_view_of_the_pool(pool: OutputPool, dtype: torch.dtype):
    pool.find_room(4096, [])
    with torch.inference_mode():
        buffer = reading(shape_of(3), shape_of(8), dtype).buffer(pool, 512)
    assert (buffer.dtype, buffer.shape, buffer.stride()) == (dtype, (8, 4), (4, 1))
    assert buffer.data_ptr() == pool.address + 512
    assert not buffer.is_inference()
