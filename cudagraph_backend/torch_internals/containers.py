"""Tensors in nested containers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Return the tensors in nested containers (those that pytree knows), in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """Return new containers like ``tree``, with ``function`` of each tensor."""
    return tree_map_only(torch.Tensor, function, tree)
