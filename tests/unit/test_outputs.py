"""Outputs: the observed layout, the layout of a call's real rows, and results returned as views of the pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import sympy
import torch

from cudagraph_backend.drivers.host import HostMemory
from cudagraph_backend.errors import Refusal
from cudagraph_backend.memory.output_pool import OutputPool
from cudagraph_backend.memory.output_range import OutputRange
from cudagraph_backend.region import Region, TensorInput, TensorOutput
from cudagraph_backend.runtime.layout import (
    Layout,
    Number,
    Pooled,
    Returned,
    copy_out,
    detached,
    layout_at,
    make_outputs,
    observed_layout,
    range_nbytes_at,
    stride_refusal,
)
from cudagraph_backend.torch_internals import Shapes, expr

N = sympy.Symbol("s0", integer=True, positive=True)


def region(outputs: Sequence[Any], static: Sequence[int] = (), staged: Sequence[int] = ()) -> Region:
    """A region that returns ``outputs``: records, or tensors of fixed size."""
    inputs = [(i, "static") for i in static] + [(i, "staged") for i in staged]
    return Region(
        number=3,
        kind="inference",
        device=torch.device("cpu"),
        inputs=tuple(TensorInput(i, f"arg{i}", role, False, torch.float32, (), ()) for i, role in inputs),
        sizes=(),
        dims=(),
        counts=(),
        outputs=tuple(fixed(o) if isinstance(o, torch.Tensor) else o for o in outputs),
        shapes=Shapes([]),
        refusal=None,
        has_effects=False,
        source_lines=(),
    )


def fixed(tensor: torch.Tensor) -> TensorOutput:
    return TensorOutput(tensor.dtype, tuple(map(expr, tensor.shape)), tuple(map(expr, tensor.stride())), None)


def returned(tensor: torch.Tensor, argument: int) -> TensorOutput:
    return replace(fixed(tensor), argument=argument)


def rows_of(width: int, dtype: torch.dtype = torch.float32) -> TensorOutput:
    return TensorOutput(dtype, (N, sympy.Integer(width)), (sympy.Integer(width), sympy.Integer(1)), None)


def layout_of(known: Region, outputs: Sequence[Any], args: Sequence[Any] = (), rows: int = 0) -> Layout:
    layout = observed_layout(known, outputs, args, {N: rows})
    assert isinstance(layout, Layout)
    return layout


def ranges_for(pool: OutputPool, layout: Layout) -> list[OutputRange]:
    """Ranges full of 0xFF, and room before them so that none begins where the pool does."""
    taken, ranges = [(0, 1)], []
    for nbytes in layout.range_nbytes:
        ranges.append(pool.find_room(nbytes, taken))
        taken.append(ranges[-1].span)
    pool.tensor.fill_(0xFF)
    return ranges


def copied(pool: OutputPool, layout: Layout, outputs: Sequence[Any]) -> list[OutputRange]:
    """The layout's ranges, with the outputs copied to them."""
    ranges = ranges_for(pool, layout)
    memory = [pool.bytes(r.offset, n).untyped_storage() for r, n in zip(ranges, layout.range_nbytes, strict=True)]
    count = sum(isinstance(e, Pooled) and o.numel() > 0 for e, o in zip(layout.entries, outputs, strict=True))
    assert copy_out(layout, outputs, memory) == count
    return ranges


def round_trip(outputs: Sequence[Any]) -> list[Any]:
    pool, layout = OutputPool(HostMemory()), layout_of(region(outputs), outputs)
    return make_outputs(layout, pool, copied(pool, layout, outputs), [], (1, 0), {})


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    assert (got.shape, got.stride(), got.storage_offset()) == (
        expected.shape,
        expected.stride(),
        expected.storage_offset(),
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------ round trip

RESULTS: dict[str, Callable[[], list[torch.Tensor]]] = {
    "contiguous": lambda: [torch.randn(5, 3)],
    "transposed": lambda: [torch.randn(5, 3).t()],
    "channels last": lambda: [torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)],
    "scalar": lambda: [torch.tensor(2.5)],
    "empty": lambda: [torch.empty(0, 4), torch.ones(2)],
    "a slice with gaps": lambda: [torch.randn(6, 8)[1::2, 2:7:3]],
    "at an offset": lambda: [torch.randn(10)[3:8]],
    "expanded": lambda: [torch.randn(1, 4).expand(3, 4)],
    "expanded to nothing": lambda: [torch.randn(1, 4).expand(0, 4)],
    "overlapping windows": lambda: [torch.randn(12).unfold(0, 4, 2)],
    "overlapping at an offset": lambda: [torch.randn(16)[2:].unfold(0, 4, 2)],
    "padded stride": lambda: [torch.empty_strided((4, 3), (8, 1)).normal_()],
    "several": lambda: [torch.randn(4), torch.arange(3), torch.randn(2, 2)],
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_come_back_with_equal_values_size_stride_and_offset(name: str):
    results = RESULTS[name]()
    for got, expected in zip(round_trip(results), results, strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn],
    ids=str,
)
def test_any_dtype_comes_back(dtype: torch.dtype):
    expected = torch.tensor([[0, 1, 2], [1, 0, 3]]).to(dtype)
    (got,) = round_trip([expected])
    assert got.dtype == dtype
    assert torch.equal(got.to(torch.complex128), expected.to(torch.complex128))


def test_numbers_and_none_come_back():
    outputs = [7, torch.ones(2), None]
    known = region([sympy.Integer(7), outputs[1], None])
    layout = layout_of(known, outputs)
    assert layout.entries[0] == Number(7)
    assert layout.entries[2] == Number(None)
    pool = OutputPool(HostMemory())
    ranges = copied(pool, layout, outputs)
    got = make_outputs(layout, pool, ranges, [], (1, 0), {})
    assert (got[0], got[2]) == (7, None)
    assert torch.equal(got[1], outputs[1])


def test_outputs_are_no_autograd_views_and_lie_in_the_pool():
    result = torch.randn(4, 4)
    layout = layout_of(region([result]), [result])
    pool = OutputPool(HostMemory())
    ranges = copied(pool, layout, [result])
    (got,) = make_outputs(layout, pool, ranges, [], (1, 0), {})
    assert not got._is_view()
    assert got.data_ptr() == pool.address + ranges[0].offset
    assert ranges[0].is_live()


def test_copying_out_writes_no_byte_beyond_the_output():
    result = torch.randn(3)
    layout = layout_of(region([result]), [result])
    pool = OutputPool(HostMemory())
    ranges = copied(pool, layout, [result])
    assert (pool.bytes(ranges[0].offset, 512)[12:] == 0xFF).all()


def test_copying_an_output_with_gaps_leaves_the_gaps():
    result = torch.empty_strided((2, 2), (4, 1)).fill_(1.0)
    layout = layout_of(region([result]), [result])
    pool = OutputPool(HostMemory())
    ranges = copied(pool, layout, [result])
    assert (pool.bytes(ranges[0].offset, 512)[8:16] == 0xFF).all()


def test_results_that_are_there_already_are_not_copied():
    pool, result = OutputPool(HostMemory()), torch.randn(3)
    layout = layout_of(region([result]), [result])
    taken = copied(pool, layout, [result])[0]
    memory = pool.bytes(taken.offset, 12).untyped_storage()
    there = torch.empty(0).set_(memory, 0, (3,), (1,))
    assert copy_out(layout, [there], [memory]) == 0
    assert torch.equal(there, result)


def test_loans_say_which_output_lies_where():
    base = torch.randn(10)
    outputs = [torch.randn(3), base[2:4], base[4:10]]
    layout = layout_of(region(outputs), outputs)
    pool = OutputPool(HostMemory())
    ranges = ranges_for(pool, layout)
    kept = make_outputs(layout, pool, ranges, [], (5, -1), {})
    loans = [r.loan for r in ranges]
    assert [loan.outputs for loan in loans if loan] == [((0, 0, 12),), ((1, 8, 16), (2, 16, 40))]
    assert {loan.region for loan in loans if loan} == {"region 3 (inference)"}
    assert {taken.step for taken in ranges} == {(5, -1)}
    assert len(kept) == 3


# ------------------------------------------------------------------------------------------------ observed layout


def test_outputs_that_share_a_storage_share_a_range():
    base = torch.randn(4, 6)
    outputs = [base, base[1:], base.view(torch.int32)[:, 2], torch.randn(2)]
    layout = layout_of(region(outputs), outputs)
    assert [e.range for e in layout.entries if isinstance(e, Pooled)] == [0, 0, 0, 1]
    assert layout.range_nbytes == (96, 8)
    got = round_trip(outputs)
    for result, expected in zip(got, outputs, strict=True):
        assert_same(result, expected)
    got[0].zero_()
    assert (got[1] == 0).all()
    assert (got[2] == 0).all()
    assert torch.equal(got[3], outputs[3])


def test_bytes_needed_are_those_up_to_the_last_entry():
    outputs = [torch.empty_strided((3, 2), (10, 1)), torch.empty(1, 4).expand(5, 4), torch.empty(0)]
    assert layout_of(region(outputs), outputs).range_nbytes == (22 * 4, 16, 0)


def test_an_argument_that_is_returned_is_the_callers_own_tensor():
    staged, weight = torch.randn(3), torch.randn(2)
    outputs = [weight, staged]
    known = region([returned(weight, 1), returned(staged, 0)], static=[1], staged=[0])
    layout = layout_of(known, outputs, [staged, weight])
    assert layout.entries == (Returned(1, None), Returned(0, None))
    callers = [torch.randn(3), weight]
    got = make_outputs(layout, OutputPool(HostMemory()), [], callers, (0, 0), {})
    assert got[0] is weight
    assert got[1] is callers[0]


def test_an_output_in_the_memory_of_an_argument_is_not_that_argument():
    """What a backward gets from its forward is its own, and Inductor's code may return it with its results in it."""
    buffer = torch.randn(3)
    layout = layout_of(region([buffer], staged=[0]), [buffer], [buffer])
    pool = OutputPool(HostMemory())
    (got,) = make_outputs(layout, pool, copied(pool, layout, [buffer]), [torch.zeros(3)], (0, 0), {})
    assert torch.equal(got, buffer)


def test_an_argument_that_is_written_in_place_may_come_back():
    buffer = torch.randn(3)
    known = region([buffer], staged=[0])
    known = replace(known, inputs=(replace(known.inputs[0], mutated=True),))
    assert layout_of(known, [buffer], [buffer]).entries == (Returned(0, None),)


def test_a_view_of_a_static_input_is_a_view_of_it_and_takes_no_range():
    flat = torch.randn(20)
    weight = flat[4:16].view(3, 4)
    outputs = [weight.t()[1:]]
    layout = layout_of(region(outputs, static=[0]), outputs, [weight])
    assert layout.range_nbytes == ()
    (got,) = make_outputs(layout, OutputPool(HostMemory()), [], [weight], (0, 0), {})
    assert_same(got, outputs[0])
    assert got.data_ptr() == outputs[0].data_ptr()


def test_a_view_beyond_one_static_input_is_of_the_one_that_holds_it():
    """Parameters of a model may lie side by side in one storage."""
    flat = torch.randn(20)
    first, second = flat[:8], flat[8:]
    outputs = [second[2:6], flat[4:12].clone(), flat[4:12]]
    layout = layout_of(region(outputs, static=[0, 1]), outputs, [first, second])
    assert [type(entry) for entry in layout.entries] == [Returned, Pooled, Pooled]
    entry = layout.entries[0]
    assert isinstance(entry, Returned)
    assert entry.index == 1
    assert_same(entry.of(second), outputs[0])


def test_a_view_of_a_static_input_as_another_dtype_keeps_that_dtype():
    weight = torch.randn(4)
    outputs = [weight.view(torch.int16)[2:]]
    layout = layout_of(region(outputs, static=[0]), outputs, [weight])
    (got,) = make_outputs(layout, OutputPool(HostMemory()), [], [weight], (0, 0), {})
    assert_same(got, outputs[0])


def test_a_view_of_a_staged_input_is_copied_to_the_pool():
    """The buffer will be overwritten by the next call."""
    buffer = torch.randn(4)
    outputs = [buffer[1:]]
    layout = layout_of(region(outputs, staged=[0]), outputs, [buffer])
    assert isinstance(layout.entries[0], Pooled)
    pool = OutputPool(HostMemory())
    ranges = copied(pool, layout, outputs)
    expected = outputs[0].clone()
    buffer.fill_(0)
    (got,) = make_outputs(layout, pool, ranges, [torch.zeros(4)], (0, 0), {})
    assert torch.equal(got, expected)


def test_a_size_that_the_graph_does_not_state_is_refused():
    refusal = observed_layout(region([rows_of(3)]), [torch.randn(5, 3)], [], {N: 4})
    assert isinstance(refusal, Refusal)
    assert "output 0 has size (5, 3)" in refusal.reason
    refusal = observed_layout(region([sympy.Integer(3)]), [torch.randn(5, 3)], [], {N: 4})
    assert isinstance(refusal, Refusal)


# ------------------------------------------------------------------------------------------------ real rows


def test_real_rows_are_the_first_of_the_bucket():
    result = torch.randn(8, 3)
    known = region([rows_of(3), N, 2 * N + 1, None])
    bucket = layout_of(known, [result, 8, 17, None], rows=8)
    pool = OutputPool(HostMemory())
    ranges = copied(pool, bucket, [result, 8, 17, None])
    real = layout_at(known, bucket, {N: 5})
    got = make_outputs(real, pool, ranges, [], (0, 0), {})
    assert_same(got[0], result[:5])
    assert got[1:] == [5, 11, None]
    assert (bucket.range_nbytes, real.range_nbytes) == ((96,), (60,))
    assert got[0].untyped_storage().nbytes() == 60


def test_real_rows_of_a_view_at_an_offset_stay_where_they_are():
    base = torch.randn(8, 4)
    known = region([TensorOutput(torch.float32, (N, sympy.Integer(2)), (sympy.Integer(4), sympy.Integer(1)), None)])
    bucket = layout_of(known, [base[:, 1:3]], rows=8)
    pool = OutputPool(HostMemory())
    ranges = copied(pool, bucket, [base[:, 1:3]])
    (got,) = make_outputs(layout_at(known, bucket, {N: 3}), pool, ranges, [], (0, 0), {})
    assert_same(got, base[:3, 1:3])


@pytest.mark.parametrize("stated", [(sympy.S.One, N), None])
def test_real_rows_that_are_not_outermost_in_memory_are_copied_to_memory_of_their_own(stated):
    """Of a bucket of 8 columns in memory, 5; they get the strides they have without a bucket."""
    known = region([TensorOutput(torch.float32, (N, sympy.Integer(3)), stated, None)])
    result = torch.randn(3, 8).t()
    bucket = layout_of(known, [result], rows=8)
    pool = OutputPool(HostMemory())
    ranges = copied(pool, bucket, [result])
    (got,) = make_outputs(layout_at(known, bucket, {N: 5}), pool, ranges, [], (0, 0), {})
    assert_same(got, result[:5].t().contiguous().t())
    assert not ranges[0].is_live()
    (whole,) = make_outputs(layout_at(known, bucket, {N: 8}), pool, ranges, [], (0, 0), {})
    assert_same(whole, result)
    assert ranges[0].is_live()


def test_a_compact_copy_of_an_expanded_result_is_expanded():
    """Its entries that share an address are copied once, as torch refuses to write to one address twice."""
    stated = (sympy.S.Zero, N, sympy.S.One)
    known = region([TensorOutput(torch.float32, (sympy.Integer(2), sympy.Integer(3), N), stated, None)])
    result = torch.randn(3, 8).expand(2, 3, 8)
    bucket = layout_of(known, [result], rows=8)
    pool = OutputPool(HostMemory())
    ranges = copied(pool, bucket, [result])
    (got,) = make_outputs(layout_at(known, bucket, {N: 5}), pool, ranges, [], (0, 0), {})
    assert_same(got, result[0, :, :5].contiguous().expand(2, 3, 5))


def test_one_real_row_needs_no_copy():
    known = region([TensorOutput(torch.float32, (sympy.Integer(1), N), (N, sympy.S.One), None)])
    bucket = layout_of(known, [torch.randn(1, 8)], rows=8)
    assert isinstance(layout_at(known, bucket, {N: 5}).entries[0], Pooled)


def test_the_layout_of_a_larger_bucket_needs_more_bytes():
    known = region([rows_of(3), rows_of(2, torch.float64)])
    bucket = layout_of(known, [torch.randn(8, 3), torch.randn(8, 2, dtype=torch.float64)], rows=8)
    assert range_nbytes_at(known, bucket, {N: 64}) == (64 * 12, 64 * 16)


def test_real_rows_of_a_returned_argument_are_the_argument():
    buffer = torch.randn(8, 3)
    known = region([replace(rows_of(3), argument=0)], staged=[0])
    bucket = layout_of(known, [buffer], [buffer], rows=8)
    argument = torch.randn(5, 3)
    assert (
        make_outputs(layout_at(known, bucket, {N: 5}), OutputPool(HostMemory()), [], [argument], (0, 0), {})[0]
        is argument
    )


def test_real_rows_of_a_view_of_a_static_input():
    """``table[:n]``: a table of positions, cut to the call's rows."""
    table = torch.randn(64, 3)
    known = region([rows_of(3)], static=[0])
    bucket = layout_of(known, [table[:8]], [table], rows=8)
    (got,) = make_outputs(layout_at(known, bucket, {N: 5}), OutputPool(HostMemory()), [], [table], (0, 0), {})
    assert_same(got, table[:5])
    assert got.data_ptr() == table.data_ptr()


def test_real_rows_of_a_view_of_a_static_input_keep_offset_and_dtype():
    flat = torch.randn(2, 64, 3)
    halves = flat.view(torch.int16)[1, :, :3]
    stride = (sympy.Integer(6), sympy.Integer(1))
    known = region([TensorOutput(torch.int16, (N, sympy.Integer(3)), stride, None)], static=[0])
    bucket = layout_of(known, [halves[:8]], [flat], rows=8)
    (got,) = make_outputs(layout_at(known, bucket, {N: 5}), OutputPool(HostMemory()), [], [flat], (0, 0), {})
    assert_same(got, halves[:5])


def test_strides_that_inductor_did_not_state_are_refused():
    known = region([rows_of(3)])
    as_stated = layout_of(known, [torch.randn(8, 3)], rows=8)
    transposed = layout_of(known, [torch.randn(3, 8).t()], rows=8)
    assert stride_refusal(known, as_stated, {N: 8}) is None
    refusal = stride_refusal(known, transposed, {N: 8})
    assert refusal is not None
    assert "output 0 has strides (1, 8) where Inductor states (3, 1)" in refusal.reason


def test_strides_of_a_view_of_a_static_input_are_compared_and_those_of_an_argument_are_not():
    table = torch.randn(3, 64)
    known = region([rows_of(3)], static=[0])
    refusal = stride_refusal(known, layout_of(known, [table.t()[:8]], [table], rows=8), {N: 8})
    assert refusal is not None
    assert "output 0 has strides (1, 64) where Inductor states (3, 1)" in refusal.reason
    argument = torch.randn(3, 8).t()
    known = region([replace(rows_of(3), argument=0)], staged=[0])
    assert stride_refusal(known, layout_of(known, [argument], [argument], rows=8), {N: 8}) is None


def test_strides_that_inductor_does_not_state_are_not_compared():
    known = region([replace(rows_of(3), stride=None)])
    assert stride_refusal(known, layout_of(known, [torch.randn(3, 8).t()], rows=8), {N: 8}) is None


def test_the_stride_of_a_dim_of_size_one_is_not_compared():
    known = region([TensorOutput(torch.float32, (N, sympy.Integer(1)), (sympy.Integer(1), sympy.Integer(1)), None)])
    layout = layout_of(known, [torch.empty_strided((8, 1), (1, 99))], rows=8)
    assert stride_refusal(known, layout, {N: 8}) is None


@dataclass(frozen=True)
class Cut:
    result: torch.Tensor
    size: tuple[int, ...]


@pytest.mark.parametrize(
    "cut",
    [Cut(torch.randn(8, 3), (5, 3)), Cut(torch.randn(3, 8).t(), (5, 3)), Cut(torch.tensor(1.0), ())],
    ids=["rows", "transposed", "scalar"],
)
def test_detached_rows_have_their_own_memory(cut: Cut):
    got = detached(cut.result, cut.size)
    expected = cut.result[: cut.size[0]] if cut.size else cut.result
    assert torch.equal(got, expected)
    assert got.untyped_storage().nbytes() == expected.numel() * 4
    assert got.data_ptr() != cut.result.data_ptr()
