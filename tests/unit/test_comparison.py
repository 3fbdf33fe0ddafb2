"""Comparing runs: what rounding does passes, what a padded size in a value does is seen."""

from __future__ import annotations

import pytest
import torch

from cudagraph_backend.runtime.comparison import is_close, is_equal

NAN, INF = float("nan"), float("inf")
HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64, *HALF)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.tensor([1, 2]), torch.tensor([[1, 2]]), False),
        (torch.tensor(True), torch.tensor(True), True),
        (torch.tensor([1j]), torch.tensor([1j]), True),
        (torch.tensor([1j]), torch.tensor([1.0 + 1j]), False),
        (torch.arange(6).view(2, 3).t(), torch.arange(6).view(2, 3).t().contiguous(), True),
        (torch.empty(0, 3), torch.empty(0, 3), True),
        (None, None, True),
        (3, 4, False),
        (None, torch.tensor(1), False),
    ],
)
def test_equal_is_bit_for_bit(found, expected, equal):
    assert is_equal(found, expected) is equal
    assert is_equal(expected, found) is equal


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [(), (1,), (7, 5), (1000,), (1000, 64), (64, 3, 5)])
def test_results_rounded_from_slightly_different_values_are_close(dtype, size):
    """As two tilings of a product of sums leave them."""
    exact = torch.randn(size, dtype=torch.float64)
    noise = 1 + torch.randn(size, dtype=torch.float64) * eps(dtype) / 2
    assert is_close((exact * noise).to(dtype), exact.to(dtype), eps(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_product_is_close_to_itself_in_other_tiles(dtype):
    a, b = (torch.randn(200, 200).to(dtype) for _ in range(2))
    tiled = torch.cat([a[:70] @ b, a[70:] @ b])
    halves = a[:, :100] @ b[:100] + a[:, 100:] @ b[100:]
    assert is_close(tiled, a @ b, eps(dtype))
    assert is_close(halves, a @ b, eps(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "bucket"), [(1, 2), (5, 8), (15, 16), (17, 24), (100, 104), (1000, 1008)])
@pytest.mark.parametrize("columns", [1, 64])
def test_a_division_by_the_padded_size_is_not_close(dtype, n, bucket, columns):
    x = torch.randn(n, columns)
    assert not is_close((x / bucket).to(dtype), (x / n).to(dtype), eps(dtype))
    assert not is_close((x.exp() / bucket).to(dtype), (x.exp() / n).to(dtype), eps(dtype))


@pytest.mark.parametrize(("n", "bucket"), [(1000, 1008), (1023, 1024), (8000, 8192)])
def test_a_mean_over_the_padded_size_is_not_close_in_float32(n, bucket):
    """Neither as a vector nor as one number."""
    total = torch.randn(n, 50).sum(0)
    assert not is_close(total / bucket, total / n, eps(torch.float32))
    assert not is_close(total[0] / bucket, total[0] / n, eps(torch.float32))


def test_one_wrong_row_among_many_is_seen():
    exact = torch.randn(1000, 100)
    found = exact.clone()
    found[-1] *= 1.001
    assert not is_close(found, exact, eps(torch.float32))
    found[-1] = exact[-1] * 1.1
    assert not is_close(found.bfloat16(), exact.bfloat16(), eps(torch.bfloat16))


def test_what_cancels_is_measured_by_the_typical_row():
    exact = torch.randn(100, 100)
    exact[3] = 1e-9
    found = exact.clone()
    found[3] = -1e-9
    assert is_close(found, exact, eps(torch.float32))
    found[3] = 1e-2
    assert not is_close(found, exact, eps(torch.float32))


def test_the_precision_is_that_of_the_computation():
    """A float32 result of bfloat16 products."""
    exact = torch.randn(100, 100)
    found = exact * (1 + torch.randn(100, 100) * eps(torch.bfloat16) / 2)
    assert is_close(found, exact, eps(torch.bfloat16))
    assert not is_close(found, exact, eps(torch.float32))


@pytest.mark.parametrize(
    ("found", "expected", "close"),
    [
        ([1.0, NAN, INF], [1.0, NAN, INF], True),
        ([1.0, NAN], [NAN, 1.0], False),
        ([1.0, NAN], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, NAN], False),
        ([1.0, INF], [1.0, -INF], False),
        ([1.0, 3e38], [1.0, INF], False),
        ([NAN], [INF], False),
        ([3e38, 3e38], [3e38, 3e38], True),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([0.0, 1e-30], [0.0, 0.0], False),
    ],
)
def test_special_values(found, expected, close):
    assert is_close(torch.tensor(found), torch.tensor(expected), eps(torch.float32)) is close


@pytest.mark.parametrize("expected", [torch.tensor([3, 1000000]), torch.tensor([True, False])])
def test_integers_and_booleans_are_close_if_equal(expected):
    assert is_close(expected.clone(), expected, 1.0)
    found = expected.clone()
    found[1] = found[0]
    assert not is_close(found, expected, 1.0)


def test_other_values_are_close_if_equal():
    assert is_close(None, None, 1.0)
    assert not is_close(3, 4, 1.0)
    assert not is_close(None, torch.zeros(1), 1.0)
    assert not is_close(torch.zeros(1), torch.zeros(2), 1.0)
    assert not is_close(torch.zeros(1), torch.zeros(1, dtype=torch.float64), 1.0)
    assert is_close(torch.zeros(0, 3), torch.zeros(0, 3), 0.1)


def test_complex_numbers():
    exact = torch.randn(50, 5, dtype=torch.complex64)
    assert is_close(exact * (1 + 1e-7), exact, eps(torch.complex64))
    assert not is_close(exact.conj(), exact, eps(torch.complex64))
