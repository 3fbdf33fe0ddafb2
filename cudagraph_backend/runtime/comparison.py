"""Comparing the results of two runs: bit for bit, or as close as computing the same in other tiles leaves them."""

from __future__ import annotations

from typing import Any

import torch

_FEWEST_ROWS_WITH_A_TREND = 16
_TREND_IN_DEVIATIONS = 8


def is_equal(found: Any, expected: Any) -> bool:
    """Return whether two results are equal bit for bit; a NaN equals the same NaN, and 0.0 is not -0.0."""
    if not _is_alike(found, expected):
        return bool(found == expected) if not isinstance(found, torch.Tensor) else False
    return torch.equal(_bytes(found), _bytes(expected))


def is_close(found: Any, expected: Any, precision: float) -> bool:
    """Return whether two results may come from the same computation, done in another order or in other tiles.

    It must tell rounding from a padded size that got into a value: a sum divided by 1008 instead of 1000. Elementwise
    tolerances don't: sums that cancel need wide ones. So floats are compared by row (entries along the first dim; a
    vector's entries are its rows), in two ways:

    - No row may differ, by norm, by more than sqrt(precision) / 4 (3 % at most) of its own norm, or of the typical
      row's if that is larger. That is 9e-5 in float32, 0.8 % in float16 and 2 % in bfloat16: some ten roundings in the
      half types, several hundred in float32.
    - Rounding has no direction. If there are 16 rows or more, their scales (the projection on what is expected) may
      not all be off in one: not by more than 1/32 of that tolerance and eight standard deviations of their mean.

    Up to 16 rows a wrong size is off by 6 % at least, which the first way sees in any type; with more rows the second
    way is the finer the more there are: in bfloat16 it tells 1008 from 1000.

    Integers and booleans must be equal, and NaN and infinities be in the same places.

    Args:
        precision: the largest machine epsilon of the types that were computed in.
    """
    if not _is_alike(found, expected):
        return bool(found == expected) if not isinstance(found, torch.Tensor) else False
    if not (found.is_floating_point() or found.is_complex()):
        return torch.equal(found, expected)
    (found, expected), same_specials = _finite_rows(found, expected)
    tolerance = min(1 / 32, precision**0.5 / 4)
    return same_specials and not _is_apart(found, expected, tolerance) and not _has_trend(found, expected, tolerance)


def _is_alike(found: Any, expected: Any) -> bool:
    """Return whether both are tensors, of the same type and size."""
    if not isinstance(found, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return False
    return found.dtype == expected.dtype and found.shape == expected.shape


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _finite_rows(found: torch.Tensor, expected: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], bool]:
    """Return both as float64 matrices ``[rows, entries]``, and whether NaN and infinities are in the same places.

    The matrices have 0 in place of these, and are scaled so that no square overflows.
    """
    found, expected = _matrix(found), _matrix(expected)
    is_finite = expected.isfinite()
    same = torch.equal(found.nan_to_num(0, 1, -1)[~is_finite], expected.nan_to_num(0, 1, -1)[~is_finite])
    same = same and torch.equal(found.isnan(), expected.isnan()) and bool(found.isfinite()[is_finite].all())
    found, expected = found.where(is_finite, 0), expected.where(is_finite, 0)
    largest = expected.abs().amax() if expected.numel() else expected.new_ones(())
    scale = torch.where(largest > 0, largest, 1)
    return (found / scale, expected / scale), same


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.to(torch.complex128).resolve_conj())
    tensor = tensor.to(torch.float64)
    return tensor.reshape(tensor.size(0) if tensor.ndim else 1, -1) if tensor.numel() else tensor.reshape(0, 1)


def _is_apart(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    norms = expected.norm(dim=1)
    typical = norms.square().mean().sqrt()
    return bool(((found - expected).norm(dim=1) > tolerance * norms.maximum(typical)).any())


def _has_trend(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    squares = expected.square().sum(1)
    telling = squares > squares.mean() / 100  # a row of almost nothing says nothing about its scale
    off = (((found - expected) * expected).sum(1) / squares)[telling]
    if off.numel() < _FEWEST_ROWS_WITH_A_TREND:
        return False
    deviation = off.std() / off.numel() ** 0.5
    return bool(off.mean().abs() > torch.clamp(_TREND_IN_DEVIATIONS * deviation, min=tolerance / 32))
