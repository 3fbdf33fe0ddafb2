"""Warm-up, without compiling: which dims change, which sizes are called, and what the arguments of such a call are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import mark_dynamic

import cudagraph_backend as sg
from cudagraph_backend import torch_internals
from cudagraph_backend.example import Axis, ExampleCall, with_lengths
from cudagraph_backend.runtime import buckets
from cudagraph_backend.warmup import _axis_sizes, _checked


def call_of(inputs: Any, **kwargs: Any) -> ExampleCall:
    return ExampleCall.of(lambda *args, **kwargs: None, inputs, kwargs or None, backward=False)


def arguments(call: ExampleCall, *size: int) -> tuple[Any, ...]:
    args, _ = call._at({axis.length: n for axis, n in zip(call.axes, size, strict=True)})
    return args


def marked(tensor: torch.Tensor, *dims: int, **bounds: int) -> torch.Tensor:
    for dim in dims:
        mark_dynamic(tensor, dim, **bounds)
    return tensor


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_rows_are_repeated_or_cut(n: int):
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(with_lengths(x, {0: n}), x[torch.arange(n) % 3])


@pytest.mark.parametrize(
    ("given", "lengths", "like"),
    [
        (torch.rand(3, 4, 5), {0: 7}, torch.rand(7, 4, 5)),
        (torch.rand(3, 4, 5), {1: 9}, torch.rand(3, 9, 5)),
        (torch.rand(3, 4, 5), {0: 7, 1: 2}, torch.rand(7, 2, 5)),
        (torch.rand(4, 3).t(), {0: 7}, torch.rand(4, 7).t()),
        (torch.rand(4, 3).t(), {1: 9}, torch.rand(9, 3).t()),
        (
            torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
            {0: 5, 2: 6},
            torch.rand(5, 3, 6, 5).to(memory_format=torch.channels_last),
        ),
        (torch.rand(1, 5).expand(3, 5), {0: 7}, torch.rand(1, 5).expand(7, 5)),
        (torch.rand(3, 1).expand(3, 5), {0: 7}, torch.rand(7, 1).expand(7, 5)),
        (torch.rand(5, 6)[:3, 1:4], {0: 7}, torch.rand(9, 6)[:7, 1:4]),
    ],
)
def test_strides_are_those_of_such_a_tensor(given: torch.Tensor, lengths: dict[int, int], like: torch.Tensor):
    copy = with_lengths(given, lengths)
    assert (copy.shape, copy.stride()) == (like.shape, like.stride())
    expected = given
    for dim, n in lengths.items():
        expected = expected.index_select(dim, torch.arange(n) % given.size(dim))
    assert torch.equal(copy, expected)


def test_rows_of_what_has_no_strides_are_repeated_too():
    sparse = torch.tensor([[0.0, 1], [2, 0], [3, 4]]).to_sparse()
    copy = with_lengths(sparse, {0: 5})
    assert copy.layout == torch.sparse_coo
    assert torch.equal(copy.to_dense(), sparse.to_dense()[[0, 1, 2, 0, 1]])
    assert with_lengths(sparse, {}) is not sparse


def test_arguments_are_copies_with_the_same_marks():
    x = marked(torch.rand(3, 4, requires_grad=True), 0, min=2, max=64)
    fixed = torch.rand(5)
    (copy, same, other), x_before = arguments(call_of((x, x, fixed)), 6), x.detach().clone()
    assert copy is same
    assert copy.requires_grad
    assert torch_internals.marked_dims(copy) == {0: (2, 64)}
    with torch.no_grad():
        copy.zero_()
        other.zero_()
    assert torch.equal(x, x_before)
    assert fixed.min() > 0
    assert torch_internals.marked_dims(x) == {0: (2, 64)}


def test_size_1_is_not_marked():
    x = marked(torch.rand(3, 4), 0, 1, min=2, max=64)
    (copy,) = arguments(call_of((x,)), 1, 7)
    assert copy.shape == (1, 7)
    assert torch_internals.marked_dims(copy) == {1: (2, 64)}


def test_one_bound_will_do():
    x = torch.rand(3, 4)
    torch_internals.mark_dim(x, 0, (None, 64))
    torch_internals.mark_dim(x, 1, (3, None))
    assert torch_internals.marked_dims(x)[0] == (2, 64)
    assert torch_internals.marked_dims(x)[1][0] == 3


def test_unmarked_inputs_change_along_the_first_tensors_rows():
    x, mask, table, scalar = torch.rand(3, 4), torch.rand(3), torch.rand(5, 3), torch.tensor(1.0)
    call = call_of((x, {"mask": mask}, [table, scalar], 7, "text"))
    assert call.axes == (Axis(3, None, None),)
    x, nested, (table, scalar), number, text = arguments(call, 6)
    assert [t.shape for t in (x, nested["mask"], table, scalar)] == [(6, 4), (6,), (5, 3), ()]
    assert (number, text) == (7, "text")
    assert torch_internals.marked_dims(x) == {0: (None, None)}


def test_parameters_and_static_addresses_are_passed_as_they_are():
    weight, cache = nn.Parameter(torch.rand(3, 4)), torch.rand(3, 4)
    torch._dynamo.mark_static_address(cache)
    passed = arguments(call_of((torch.rand(3, 4), weight, cache)), 6)
    assert passed[0].shape == (6, 4)
    assert passed[1] is weight
    assert passed[2] is cache


@pytest.mark.parametrize("inference", [True, False])
def test_inference_tensors_stay_what_they_are(inference: bool):
    with torch.inference_mode(inference):
        x = torch.rand(3, 4)
    for mode in (True, False):
        with torch.inference_mode(mode):
            assert arguments(call_of((x,)), 6)[0].is_inference() == inference


def test_dims_of_one_length_change_together():
    ids, mask = marked(torch.zeros(3, 8), 0, 1), marked(torch.zeros(3, 1, 8, 8), 0, 2, 3)
    call = call_of({"ids": ids, "mask": mask})
    assert [axis.length for axis in call.axes] == [3, 8]
    _, kwargs = call._at({3: 5, 8: 4})
    assert (kwargs["ids"].shape, kwargs["mask"].shape) == ((5, 4), (5, 1, 4, 4))


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("capture_sizes", ["auto", (1, 2, 4, 12, 40, 100)])
@pytest.mark.parametrize(("lower", "upper"), [(1, 8), (2, 64), (5, 40), (3, 100), (7, 7)])
def test_all_sizes_are_the_buckets_of_all_sizes(capture_sizes: buckets.CaptureSizes, lower: int, upper: int):
    chosen = {buckets.choose(n, capture_sizes, upper, lambda size: True) for n in range(lower, upper + 1)}
    assert set(buckets.all_sizes(capture_sizes, lower, upper)) == chosen


def test_sizes_by_default():
    assert _axis_sizes(Axis(3, 2, 20), "auto") == (2, 4, 8, 16, 20)
    assert _axis_sizes(Axis(3, None, None), (1, 2, 64)) == (1, 2, 64)
    assert _axis_sizes(Axis(3, 2, 20), (1, 2, 64)) == (2, 20)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([], "a non-empty list of ints"),
        (5, "a non-empty list of ints"),
        ("5", "a non-empty list of ints"),
        ({3: [1]}, "a non-empty list of ints"),
        ([2, 2.5], "got 2.5"),
        ([True], "got True"),
        ([(2, 3)], r"got \(2, 3\)"),
        ([0], "got 0 .* accepted is 1, or 2 to 64 as marked"),
        ([65], "got 65 .* accepted is 1, or 2 to 64 as marked"),
    ],
)
def test_bad_sizes(sizes: Any, said: str):
    with pytest.raises(sg.WarmupError, match=said):
        _checked(sizes, [Axis(3, 2, 64)])


@pytest.mark.parametrize("sizes", [[2, 3], [(2,)], [(2, 3, 4)], [(2, 300)]])
def test_bad_sizes_of_two_dims(sizes: Any):
    with pytest.raises(sg.WarmupError, match=r"warmup: sizes: got .*; accepted is"):
        _checked(sizes, [Axis(3, 2, 64), Axis(8, None, 100)])


@pytest.mark.parametrize("sizes", [[8, 1, 2, 2], (1, 2, 8), range(1, 10), {1, 2, 8}])
def test_good_sizes(sizes: Any):
    assert _checked(sizes, [Axis(3, 2, 64)]) == {(n,) for n in sizes}


def test_no_bound_and_no_sizes():
    with pytest.raises(sg.WarmupError, match=r"the dim of length 3 has no bound; .* capture_sizes, or a bound"):
        _axis_sizes(Axis(3, None, None), "auto")


def test_no_capture_size_within_the_bounds():
    with pytest.raises(sg.WarmupError, match=r"of capture_sizes \[1, 2\] none is within"):
        _axis_sizes(Axis(3, 8, 64), (1, 2))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (torch.rand(3, 4), r"got inputs of type Tensor .* warmup\(fn, \(x,\)\)"),
        ((), "no tensor among them"),
        ((3,), "no tensor among them"),
        ((torch.tensor(1.0),), "the first tensor has no dims"),
        ((torch.rand(0, 4),), "is empty; accepted is at least one row"),
    ],
)
def test_bad_inputs(inputs: Any, said: str):
    with pytest.raises(sg.WarmupError, match=said):
        call_of(inputs)


def test_two_dicts():
    with pytest.raises(sg.WarmupError, match="inputs of type dict and kwargs of type dict"):
        call_of({"x": torch.rand(3)}, y=torch.rand(3))


def test_no_function():
    with pytest.raises(sg.WarmupError, match="fn: got 3; accepted is a compiled function"):
        sg.warmup(3, (torch.rand(3, 4),), [2])  # type: ignore[arg-type]


def test_equal_lengths_with_different_bounds():
    x = marked(marked(torch.rand(3, 3), 0, min=2, max=64), 1, min=2, max=96)
    with pytest.raises(sg.WarmupError, match=r"length 3 have different bounds, 64 and 96; .* differ in length"):
        call_of((x,))
