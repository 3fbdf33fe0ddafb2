"""The registry of forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from cudagraph_backend.torch_internals import is_operator, operator_name

from .numbers import tensors_for_numbers
from .site import Site

Form = Callable[[Site], Any]

_FORMS: dict[str, Form] = {}


def form(*operators: str) -> Callable[[Form], Form]:
    """Register a form of ``operators``, named with their overload; it answers with a proxy, or a tuple of them."""

    def register(function: Form) -> Form:
        _FORMS.update(dict.fromkeys(operators, function))
        return function

    return register


def form_of(node: Node) -> Form | None:
    """Return the form of an operator; of one that computes entry by entry, tensors take the place of numbers."""
    if not is_operator(node.target):
        return None
    found = _FORMS.get(operator_name(node.target))
    is_pointwise = torch.Tag.pointwise in node.target.tags or operator_name(node.target).startswith("aten::where")
    return found or (tensors_for_numbers if is_pointwise else None)
