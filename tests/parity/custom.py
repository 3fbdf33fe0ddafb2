"""Custom operators for the programs, of the kinds that engines register."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UNSAFE: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)}


class Metadata:
    """What an engine's operator reads from Python at each call."""

    factor = 1.0


@torch.library.custom_op("parity::affine", mutates_args=())
def affine(x: Tensor) -> Tensor:
    """One that knows nothing of graphs, and can be captured."""
    return x * 2 + 1


@torch.library.custom_op("parity::affine_backward", mutates_args=())
def affine_backward(grad: Tensor) -> Tensor:
    return grad * 2


@torch.library.custom_op("parity::both", mutates_args=())
def both(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sin(), x.cos()


@torch.library.custom_op("parity::joined", mutates_args=())
def joined(xs: list[Tensor], weight: float) -> Tensor:
    return torch.stack(xs).sum(0) * weight


@torch.library.custom_op("parity::rows32", mutates_args=())
def rows32(x: Tensor) -> Tensor:
    """Its result has one shape, whatever that of its argument."""
    out = x.new_zeros(32, x.shape[1])
    out[: x.shape[0]] = x
    return out


@torch.library.custom_op("parity::accumulate", mutates_args=("total",))
def accumulate(x: Tensor, total: Tensor) -> Tensor:
    total.add_(x)
    return total * 2


@torch.library.custom_op("parity::fill", mutates_args=("out",))
def fill(x: Tensor, out: Tensor) -> None:
    out.copy_(x.tanh())


@torch.library.custom_op("parity::unsafe", mutates_args=(), **UNSAFE)
def unsafe(x: Tensor) -> Tensor:
    """It waits for the device, which no capture can."""
    return x.cpu().mul(2).to(x.device) + 1


@torch.library.custom_op("parity::unsafe_sum", mutates_args=(), **UNSAFE)
def unsafe_sum(a: Tensor, b: Tensor) -> Tensor:
    return a + b


@torch.library.custom_op("parity::unsafe_copy", mutates_args=(), **UNSAFE)
def unsafe_copy(x: Tensor) -> Tensor:
    return x.clone()


@torch.library.custom_op("parity::unsafe_sin", mutates_args=("outs",), **UNSAFE)
def unsafe_sin(x: Tensor, outs: list[Tensor]) -> Tensor:
    result = x.sin()
    for out in outs:
        out.copy_(result)
    return result


@torch.library.custom_op("parity::unsafe_attention", mutates_args=("out",), **UNSAFE)
def unsafe_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    out.copy_((q @ k.T).softmax(-1) @ v)


@torch.library.custom_op("parity::unsafe_mask", mutates_args=(), **UNSAFE)
def unsafe_mask(like: Tensor, real: int) -> Tensor:
    """True for entries from ``real`` on."""
    mask = torch.zeros(like.shape[0], dtype=torch.bool, device=like.device)
    mask[real:] = True
    return mask


@torch.library.custom_op("parity::scaled", mutates_args=())
def scaled(x: Tensor) -> Tensor:
    """It looks as if it could be captured, but a graph would keep the factor of its capture."""
    return x * Metadata.factor


@torch.library.custom_op("parity::ordered", mutates_args=())
def ordered(x: Tensor) -> Tensor:
    return x + 1


@torch.library.custom_op("parity::count", mutates_args=())
def count(x: Tensor) -> int:
    """A size that only the operator knows."""
    return x.shape[0] - 1


affine.register_fake(torch.empty_like)
affine_backward.register_fake(torch.empty_like)
affine.register_autograd(lambda ctx, grad: affine_backward(grad))
both.register_fake(lambda x: (torch.empty_like(x), torch.empty_like(x)))
joined.register_fake(lambda xs, weight: torch.empty_like(xs[0]))
rows32.register_fake(lambda x: x.new_empty(32, x.shape[1]))
accumulate.register_fake(lambda x, total: torch.empty_like(total))
fill.register_fake(lambda x, out: None)
unsafe.register_fake(torch.empty_like)
unsafe_sum.register_fake(lambda a, b: torch.empty_like(a))
unsafe_copy.register_fake(torch.empty_like)
unsafe_sin.register_fake(lambda x, outs: torch.empty_like(x))
unsafe_attention.register_fake(lambda q, k, v, out: None)
unsafe_mask.register_fake(lambda like, real: like.new_empty(like.shape[0], dtype=torch.bool))
scaled.register_fake(torch.empty_like)
ordered.register_fake(torch.empty_like)
count.register_fake(lambda x: torch.library.get_ctx().new_dynamic_size())


def _make_ordered() -> None:
    """Effects of ``ordered`` keep their order; torch 2.11 has another name for that."""
    from torch._higher_order_ops import effects

    kind = getattr(effects, "_EffectType", None) or effects.EffectType
    effects._register_effectful_op(torch.ops.parity.ordered.default, kind.ORDERED)


_make_ordered()
