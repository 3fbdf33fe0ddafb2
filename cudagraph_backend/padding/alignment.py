"""Sizes that kernels round up: what is behind the entries that count is neither a real nor a padded row.

CUDA's attention reads masks whose rows are a multiple of so many entries long, padded behind and cut back. The
logarithms of its weights' sums, which forwards save, are as many as queries, rounded up to 32.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from cudagraph_backend.torch_internals import expr

aten = torch.ops.aten

#: What the number of logarithms is rounded up to: what is behind is infinite, so that it weighs nothing.
ROUNDED_TO = 32

_ATTENTION = aten._scaled_dot_product_efficient_attention.default
_ATTENTION_BACKWARD = aten._scaled_dot_product_efficient_attention_backward.default


def as_before(cut: Node) -> Node | None:
    """Return what was padded behind and is now cut back to what it was; ``None`` for other slices."""
    pad = cut.args[0]
    whole = padded_behind(pad) if _is_from_front(cut) else None
    return whole if whole is not None and _shape(cut) == _shape(whole) else None


def attention_of(cut: Node) -> Node | None:
    """Return the attention of which a slice takes the logarithms of its queries; ``None`` for other slices."""
    node = cut.args[0]
    if not isinstance(node, Node) or not is_rounded(node) or not _is_from_front(cut):
        return None
    attention: Any = node.args[0]
    return attention if _shape(cut) == _shape(attention.args[0])[:3] else None


def is_rounded(node: Node) -> bool:
    """Return whether a node is logarithms whose number is rounded up."""
    return node.target is operator.getitem and node.args[0].target is _ATTENTION and node.args[1] == 1  # type: ignore[union-attr]


def padded_behind(node: Any) -> Node | None:
    """Return what ``node`` pads, behind the entries of each dim and nowhere else; ``None`` if it does anything else."""
    if not isinstance(node, Node) or node.target is not aten.constant_pad_nd.default:
        return None
    whole, pads = node.args[:2]
    is_behind = all(isinstance(n, int) and n == 0 for n in pads[::2])  # type: ignore[index, union-attr]
    return whole if is_behind else None  # type: ignore[return-value]


def reads_rounded(user: Node) -> bool:
    """Return whether a node reads, of logarithms whose number is rounded up, those of its queries alone."""
    return user.target is _ATTENTION_BACKWARD


def _is_from_front(cut: Node) -> bool:
    _, _, start, _, step = [*cut.args, *(None, 0, 0, None, 1)[len(cut.args) :]]  # type: ignore[misc]
    return start in (0, None) and step == 1


def _shape(node: Node) -> list[Any]:
    traced = node.meta.get("val")
    return [*map(expr, traced.shape)] if isinstance(traced, torch.Tensor) else []
