"""What padding cost is told by dim and region; a call takes a bucket that exists where that costs little more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import pytest
import torch

import cudagraph_backend as sg
from cudagraph_backend import sharedgraph
from cudagraph_backend.errors import Refusal
from cudagraph_backend.runtime.plan import Sizes
from cudagraph_backend.runtime.served import Padding, Rows, Served, padding_of
from tests.support.ungenerated import Compile


def call(function: Callable[..., torch.Tensor], sizes: Iterable[tuple[int, ...]]) -> None:
    for shape in sizes:
        x = torch.randn(*shape)
        torch.testing.assert_close(function(x), x.exp())


def buckets() -> list[Sizes]:
    (replayer,) = sharedgraph.regions()
    assert replayer.state is not None
    return list(replayer.state.planner.buckets)


def padding() -> Padding:
    (found,) = sg.stats().padding
    return found


# ---- the numbers


def test_rows_are_summed_up_by_dim_and_multiplied_call_by_call():
    served = [
        Served({"s0": (3, 1), "s1": (10, 6)}, takes_existing=False, calls=2),
        Served({"s0": (5, 3), "s1": (16, 0)}, takes_existing=True, calls=1),
        Served({"s0": (7, 1), "s1": (9, 7)}, takes_existing=False),  # planned, and not called
    ]
    found = padding_of("region 0 (inference)", served, 0.25)
    assert found.dims == {"s0": Rows(11, 5, 31.25), "s1": Rows(36, 12, 25.0)}
    assert (found.product.real, found.product.padded) == (2 * 30 + 80, 2 * (64 - 30) + (128 - 80))
    assert found.product.padded_percent == pytest.approx(100 * 116 / 256)
    assert (found.calls, found.calls_in_existing, found.existing_percent) == (3, 1, 25.0)


def test_no_rows_are_no_padding():
    assert padding_of("region 0 (inference)", [Served({"s0": (0, 0)}, False, calls=1)], None).product == Rows(0, 0, 0.0)


def test_two_dims_are_told_apart(compiles: Compile):
    call(compiles(torch.exp), [(5, 20), (5, 20), (7, 24), (8, 17)])
    found = padding()
    assert list(found.dims.values()) == [
        Rows(5 + 5 + 7 + 8, 3 + 3 + 1 + 0, pytest.approx(100 * 7 / 32)),
        Rows(20 + 20 + 24 + 17, 4 + 4 + 0 + 7, pytest.approx(100 * 15 / 96)),
    ]
    real = 100 + 100 + 7 * 24 + 8 * 17
    assert found.product == Rows(real, 4 * 8 * 24 - real, pytest.approx(100 - 100 * real / 768))
    assert (found.calls, found.calls_in_existing, found.existing_percent) == (4, 0, 25.0)
    stats = sg.stats()
    assert (stats.rows_real, stats.rows_padded) == (25 + 81, 7 + 15)
    assert stats.as_dict()["padding"][0]["product"]["padded"] == 768 - real


def test_explain_tells_them(compiles: Compile):
    call(compiles(torch.exp), [(5, 20), (5, 20), (7, 24), (8, 17)])
    text = re.sub(r"s\d+", "s", sg.explain())
    assert "padded: 7 of 32 rows of s (21.9 %), 15 of 96 rows of s (15.6 %)" in text
    assert "padded: 264 of 768 entries of s × s (34.4 %)" in text
    assert "0 of 4 calls took a bucket that existed and not their own: its inputs may have 25 % more bytes" in text, (
        text
    )


def test_of_one_dim_neither_a_product_nor_a_bound_is_told(compiles: Compile):
    def model(x: torch.Tensor) -> torch.Tensor:
        return x.exp()

    compiled = compiles(model, dynamic=None)
    for n in (5, 6, 7):
        x = torch.randn(n, 3)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), x.exp())
    assert list(padding().dims.values()) == [Rows(18, 6, 25.0)]
    assert padding().existing_percent is None
    text = sg.explain()
    assert "padded: 6 of 24 rows of s" in text
    assert "entries of" not in text
    assert "existed" not in text


def test_what_is_not_padded_is_not_told(compiles: Compile):
    compiled = compiles(torch.exp, pad="off")
    call(compiled, [(5, 20), (7, 24)])
    assert sg.stats().padding == []
    assert "padded: " not in sg.explain()


def test_a_call_without_a_graph_is_not_counted(compiles: Compile):
    call(compiles(torch.exp, capture_sizes=[8]), [(5, 6), (5, 9)])
    assert (padding().calls, padding().product) == (1, Rows(30, 34, pytest.approx(100 * 34 / 64)))
    assert padding().existing_percent is None


def test_a_reset_counts_anew(compiles: Compile):
    compiled = compiles(torch.exp)
    call(compiled, [(5, 20), (7, 24)])
    sg.reset()
    assert sg.stats().padding == []
    call(compiled, [(7, 24)])
    assert list(padding().dims.values()) == [Rows(7, 1, 12.5), Rows(24, 0, 0.0)]


# ---- buckets of several dims


@pytest.mark.parametrize(("dims", "step"), [(1, 16), (2, 32), (3, 64)])
def test_steps_are_coarser_the_more_dims_are_padded(compiles: Compile, dims: int, step: int):
    """From 256 to 512: sixteen steps for one dim, eight for each of two, four for each of three."""
    compiled = compiles(lambda x: x.exp(), dynamic=None)
    for n in (257, 290):
        x = torch.randn(*(n + dim for dim in range(dims)), *[3] * (3 - dims))
        for dim in range(dims):
            torch._dynamo.mark_dynamic(x, dim)
        torch.testing.assert_close(compiled(x), x.exp())
    up = [tuple(-(-(n + dim) // step) * step for dim in range(dims)) for n in (257, 290)]
    assert buckets() == list(dict.fromkeys(up))


def test_a_bucket_that_exists_serves_a_call_within_the_bound(compiles: Compile):
    """64×64 has 4096 entries; 64×80 has exactly a quarter more."""
    compiled = compiles(torch.exp)
    call(compiled, [(60, 78), (60, 60), (60, 60)])
    assert buckets() == [(64, 80)]
    assert (padding().calls, padding().calls_in_existing) == (3, 2)
    assert list(padding().dims.values()) == [Rows(180, 12, 6.25), Rows(198, 42, 17.5)]
    assert "2 of 3 calls took a bucket that existed" in sg.explain()


@pytest.mark.parametrize("larger", [(60, 88), (70, 71)])  # 64×88, 72×72
def test_a_bucket_above_the_bound_does_not(compiles: Compile, larger: tuple[int, int]):
    call(compiles(torch.exp), [larger, (60, 60)])
    assert buckets()[1:] == [(64, 64)]
    assert padding().calls_in_existing == 0


def test_a_bucket_that_is_too_small_along_a_dim_does_not(compiles: Compile):
    call(compiles(torch.exp), [(50, 78), (60, 60)])  # 56×80: large enough for 56×64 alone
    assert buckets()[1:] == [(64, 64)]


def test_its_own_bucket_comes_first(compiles: Compile):
    call(compiles(torch.exp), [(60, 61), (60, 78), (61, 60)])
    assert buckets() == [(64, 64), (64, 80)]
    assert padding().calls_in_existing == 0


@pytest.mark.parametrize(
    ("made", "taken"),
    [
        ([(60, 70), (70, 60)], (64, 72)),  # as large as each other: the one that was made first
        ([(70, 60), (60, 70)], (72, 64)),
        ([(60, 80), (70, 60)], (72, 64)),  # the smaller one
    ],
)
def test_of_several_the_smallest_and_then_the_first_is_taken(
    compiles: Compile, made: list[tuple[int, int]], taken: tuple[int, int]
):
    compiled = compiles(torch.exp)
    call(compiled, [*made, (60, 60)])
    assert len(buckets()) == 2
    assert padding().calls_in_existing == 1
    (replayer,) = sharedgraph.regions()
    assert replayer.state is not None
    assert replayer.state.planner._plans[(60, 60)].bucket.sizes == taken


def test_after_a_reset_no_bucket_exists(compiles: Compile):
    compiled = compiles(torch.exp)
    call(compiled, [(60, 78)])
    sg.reset()
    call(compiled, [(60, 60)])
    assert buckets() == [(64, 64)]
    assert padding().calls_in_existing == 0


def test_a_bucket_whose_graph_was_given_up_does_not_serve(compiles: Compile):
    compiled = compiles(torch.exp)
    call(compiled, [(60, 78)])
    (replayer,) = sharedgraph.regions()
    assert replayer.state is not None
    planner = replayer.state.planner
    planner.refuse_bucket(planner.buckets[(64, 80)], Refusal("its replay is slower"))
    call(compiled, [(60, 60)])
    assert buckets() == [(64, 80), (64, 64)]


def test_with_the_users_sizes_every_call_gets_its_own(compiles: Compile):
    call(compiles(torch.exp, capture_sizes=[64, 72]), [(60, 70), (60, 60)])
    assert buckets() == [(64, 72), (64, 64)]
