"""Tensors filled with a number that changes with the padded size."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Proxy

from ..editor import convert
from .form import form
from .numbers import tensor_of_number
from .site import Site


@form("aten::full", "aten::scalar_tensor")
def full(site: Site) -> Proxy:
    """Expand a tensor without dims."""
    number: Any = site["fill_value"] if site["fill_value"] is not None else site["s"]
    filled = convert(tensor_of_number(site.editor, number, None), site.val.dtype)
    # A tensor of its own, as it may be handed out: the one that is filled with serves others, too.
    return torch.ops.aten.clone.default(torch.ops.aten.expand.default(filled, site["size"] or []))
