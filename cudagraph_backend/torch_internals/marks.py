"""What the user has told Dynamo of a tensor: dims that change, an address that does not."""

from __future__ import annotations

import torch
from torch._dynamo.utils import get_static_address_type
from torch.utils._sympy.numbers import int_oo

Bounds = tuple[int | None, int | None]
"""The least and the largest size of a dim, as far as they are given."""


def marked_dims(tensor: torch.Tensor) -> dict[int, Bounds]:
    """Return the dims that ``torch._dynamo.mark_dynamic`` has marked, ascending, with the bounds given there."""
    bounds = {mark.dim: (mark.min, mark.max) for mark in getattr(tensor, "_dynamo_dynamic_range", ())}
    return {dim: bounds.get(dim, (None, None)) for dim in sorted(getattr(tensor, "_dynamo_dynamic_indices", ()))}


def mark_dim(tensor: torch.Tensor, dim: int, bounds: Bounds) -> None:
    """Mark a dim as ``mark_dynamic`` does, which takes two bounds or none; here one will do."""
    lower, upper = bounds
    if (lower is None) != (upper is None):
        lower, upper = 2 if lower is None else lower, int_oo if upper is None else upper
    torch._dynamo.mark_dynamic(tensor, dim, min=lower, max=upper)


def has_static_address(tensor: torch.Tensor) -> bool:
    """Return whether Dynamo takes an argument's address as fixed: a parameter's, or after ``mark_static_address``."""
    return isinstance(tensor, torch.nn.Parameter) or get_static_address_type(tensor) is not None
