"""Regions that must not be padded, or only with care, give eager's values at every size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cudagraph_backend as sg
from tests.support.regions import assert_as_eager, compiled

SIZES = (5, 11, 3, 64, 5, 17, 11, 2, 1, 40)


def check(function, batch, *, sizes=SIZES, **options):
    assert_as_eager(compiled(function, **options), function, batch, sizes, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x: x - x.median(0).values, "median"),
        (lambda x: x.kthvalue(1, 0).values, "kthvalue"),
        (lambda x: x[::2] * 2, "slice"),
    ],
)
def test_rows_that_meet_are_not_padded(function, op, device):
    check(function, lambda n: (torch.randn(n, 4, device=device),))
    assert sg.stats().rows_padded == 0
    assert sg.stats().captures > 0  # exact sizes are captured all the same
    explained = sg.explain()
    assert "not padded" in explained
    assert "test_values.py" in explained


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(0),
        lambda x: x / x.shape[0],
        lambda x: x.cumsum(0).flip(0),
        lambda x: x.var(0, correction=0),
        lambda x: x.topk(1, 0).values,
        lambda x: torch.roll(x, 1, 0),
        lambda x: x.sort(0).values,
        lambda x: x[-1] + x[:1],
        lambda x: (torch.arange(x.shape[0], device=x.device) == x.shape[0] - 1)[:, None] * x,
    ],
)
def test_rows_that_meet_by_number_are_padded(function, device):
    check(function, lambda n: (torch.randn(n, 4, device=device),))
    assert sg.stats().rows_padded > 0
    assert "not padded" not in sg.explain()


def test_batch_norm_in_training_mode(device):
    torch.manual_seed(0)
    ours, eager = (nn.BatchNorm1d(4).to(device) for _ in range(2))
    compiled = torch.compile(ours, backend="sharedgraph")
    with torch.no_grad():
        for n in SIZES[:-2]:
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours.running_var, eager.running_var)
            assert ours.num_batches_tracked == eager.num_batches_tracked
    assert sg.stats().rows_padded > 0
    assert "not padded" not in sg.explain()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.cumsum(0),
        lambda x: (x.relu(), x.sum(1), x.shape[0] * 2),
        lambda x: x.reshape(-1, 2) * 2,
        lambda x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1),
        lambda x: torch.cat([x, x * 2], 1).sin(),
        lambda x: (x.to(torch.bfloat16), torch.ones(4, device=x.device) + x),
        lambda x: x.double() * 3,
        lambda x: (x > 0, x.argmax(1), x.to(torch.complex64) * 1j),
    ],
)
def test_rows_that_stay_apart_are_padded(function, device):
    check(function, lambda n: (torch.randn(n, 4, device=device),))
    assert sg.stats().rows_padded > 0
    assert "not padded" not in sg.explain()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum(0),
        lambda x: x.softmax(0),
        lambda x: x.log_softmax(0).argmax(0),
        lambda x: x.T @ x,
        lambda x: (x @ x.T).softmax(-1) @ x,
        lambda x: x.cumsum(0).amax(0),
        lambda x: x.diff(dim=0).abs().amax(0),
        lambda x: (x[1:] - x[:-1], x.unfold(0, 2, 1).sum(-1)),
    ],
)
def test_rows_that_meet_under_a_mask_are_padded(function, device):
    check(function, lambda n: (torch.randn(n, 4, device=device),), sizes=SIZES[:7])
    assert sg.stats().rows_padded > 0
    assert sg.stats().fallbacks == {}
    assert "not padded" not in sg.explain()


def test_masks_hide_nothing_from_calls_without_padding(device):
    """Where no graph answers, the compiled region runs with its masks, at the exact sizes."""
    check(lambda x: x.softmax(0), lambda n: (torch.randn(n, 4, device=device),), capture_sizes=[4])
    assert sum(sg.stats().fallbacks.values()) > 3


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x * 2).relu(),
        lambda x: (x.T * 2, x.T.contiguous(), x.T[:1] + 1),
        lambda x: (x * 2).expand(3, *x.shape),
    ],
)
def test_rows_that_are_not_outermost_in_memory(make, device):
    """Padded rows lie between real ones: such outputs are copied from the pool, with eager's strides."""
    compiled = torch.compile(make, backend="sharedgraph")
    kept = []
    for n in (5, 11, 3, 16, 11):
        x = torch.randn(4, n, device=device)
        got, expected = compiled(x), make(x)
        torch.testing.assert_close(got, expected, check_stride=True)
        kept.append((got, expected))
    for got, expected in kept:
        torch.testing.assert_close(got, expected)
    assert sg.stats().rows_padded > 0
    assert "not padded" not in sg.explain()


def test_two_dims(device):
    """The batch is padded, and so is the length, with a mask before the softmax over it."""
    compiled = torch.compile(lambda x: x.softmax(1), backend="sharedgraph", dynamic=True)
    with torch.no_grad():
        for n, length in [(5, 7), (9, 7), (11, 20), (6, 20), (30, 7), (29, 6)]:
            x = torch.randn(n, length, device=device)
            torch.testing.assert_close(compiled(x), x.softmax(1), check_stride=True)
    padded = (8 - 5) + (16 - 9) + (16 - 11) + (8 - 6) + (32 - 30) + (32 - 29)
    assert sg.stats().rows_padded == padded + (8 - 7) + (8 - 7) + (24 - 20) + (24 - 20) + (8 - 7) + (8 - 6)
    assert sg.stats().graphs == 5


def test_a_dim_that_is_refused_beside_one_that_is_padded(device):
    compiled = torch.compile(lambda x: x.kthvalue(2, 1).values, backend="sharedgraph", dynamic=True)
    with torch.no_grad():
        for n, length in [(5, 7), (9, 7), (11, 20), (6, 20), (30, 7)]:
            x = torch.randn(n, length, device=device)
            torch.testing.assert_close(compiled(x), x.kthvalue(2, 1).values)
    assert sg.stats().rows_padded == (8 - 5) + (16 - 9) + (16 - 11) + (8 - 6) + (32 - 30)
    assert sg.stats().graphs == 5


def test_guards_exclude_a_bucket(device):
    """A graph traced for n % 8 != 0 must not run at 16."""

    def function(x):
        return x * 7 if x.shape[0] % 8 else x * 9  # no other test's: a cached graph brings its guards along

    check(function, lambda n: (torch.randn(n, 4, device=device),), sizes=(10, 11, 16, 13, 24, 7, 8))


def test_upper_guard_excludes_a_bucket(device):
    def function(x):
        return x * 11 if x.shape[0] <= 20 else x * 13

    check(function, lambda n: (torch.randn(n, 4, device=device),), sizes=(10, 18, 20, 21, 30, 19))


def test_sizes_above_the_largest_run_the_compiled_region(device):
    check(
        lambda x: x * 2, lambda n: (torch.randn(n, 4, device=device),), sizes=(5, 7, 30, 31, 9), capture_sizes=[8, 16]
    )
    fallbacks = sg.stats().fallbacks
    assert sum(fallbacks.values()) == 2
    assert "larger than the largest of capture_sizes" in next(iter(fallbacks))


def test_max_graphs(device):
    sizes = (5, 7, 12, 20, 30, 40, 12)
    check(lambda x: x * 2, lambda n: (torch.randn(n, 4, device=device),), sizes=sizes, max_graphs=2)
    assert sg.stats().graphs == 1 + 2  # the first, static region has one
    assert sg.stats().fallbacks == {"the region holds max_graphs graphs": 3}


@pytest.mark.parametrize("fill", ["replica", "zero"])
def test_reductions_over_rows_that_the_fill_keeps_exact(fill, device):
    function = (lambda x: x.amax(0)) if fill == "replica" else (lambda x: x.sum(0))
    check(function, lambda n: (torch.randn(n, 4, device=device),), fill=fill)
    assert sg.stats().rows_padded > 0
