"""Sizes as sympy expressions in one symbol for the padded size."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import sympy
import torch

from cudagraph_backend.torch_internals import expr

from .lattice import RefusePadding

#: Stands for every symbol that is padded together: ``n`` real rows, and the bucket once padded.
ROWS = sympy.Symbol("n", integer=True, positive=True)

#: Stands for the same number in dims whose rows are not looked at.
HIDDEN = sympy.Symbol("n'", integer=True, positive=True)


class Sizes:
    """Rewrites sizes so that all symbols padded together are the one symbol ``ROWS``."""

    def __init__(self, symbols: Iterable[sympy.Symbol]) -> None:
        self._symbols = dict.fromkeys(symbols, ROWS)
        self._seen: dict[sympy.Basic, sympy.Basic] = {}

    def expr(self, number: object) -> sympy.Basic:
        """Return ``number`` in terms of ``ROWS``, expanded so that equal sizes are equal expressions."""
        if type(number) is int:
            return sympy.Integer(number)
        raw = expr(number)
        if raw not in self._seen:
            renamed = raw.xreplace(self._symbols)
            self._seen[raw] = sympy.expand(renamed) if isinstance(renamed, sympy.Expr) else renamed
        return self._seen[raw]

    def shape(self, tensor: torch.Tensor) -> tuple[sympy.Expr, ...]:
        """Return the sizes of a (fake) tensor."""
        return tuple(self.expr(size) for size in tensor.shape)  # type: ignore[misc]


class RowDim(NamedTuple):
    """A dim of size ``count * n + more``."""

    dim: int
    count: sympy.Expr
    more: sympy.Expr


def row_dims(shape: Sequence[sympy.Expr]) -> tuple[RowDim, ...]:
    """Return the dims of ``shape`` that carry rows."""
    found = []
    for dim, size in enumerate(shape):
        if size.has(ROWS):
            parts = _affine(size)
            if parts is None:
                raise RefusePadding(f"a size is not a multiple of the rows: {shape_text(shape)}")
            found.append(RowDim(dim, *parts))
    return tuple(found)


@lru_cache(maxsize=4096)
def _affine(size: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
    """Return ``count`` and ``more`` of a size ``count * n + more``; ``None`` for others: ``n**2``, ``floor(n/2)``.

    A size that falls as rows are added (``9 - n``) has no place for padded ones.
    """
    if not size.is_polynomial(ROWS):
        return None
    more = size.xreplace({ROWS: sympy.S.Zero})
    count = _quotient(sympy.expand(size - more), ROWS)
    grows = count.is_nonnegative or more.is_nonpositive  # either way, as no size is negative
    return (count, more) if grows and count.is_integer and not count.has(ROWS) else None


def hide(shape: Sequence[sympy.Expr], dims: Container[int]) -> tuple[sympy.Expr, ...]:
    """Return ``shape`` with the padded size of ``dims`` taken for a size like any other."""
    return tuple(size.xreplace({ROWS: HIDDEN}) if dim in dims else size for dim, size in enumerate(shape))


def whole(size: sympy.Expr, by: sympy.Expr, otherwise: str) -> sympy.Expr:
    """Return ``size / by``, refused for the reason ``otherwise`` unless that is a whole number at every size."""
    quotient = _quotient(size, by)
    if quotient.has(ROWS) or not quotient.is_integer:
        raise RefusePadding(otherwise)
    return quotient


@lru_cache(maxsize=4096)
def _quotient(size: sympy.Expr, by: sympy.Expr) -> sympy.Expr:
    return sympy.expand(sympy.cancel(size / by))


def shape_text(shape: Sequence[sympy.Expr]) -> str:
    """Write ``shape`` for a message, with ``n`` for the padded size."""
    return f"[{', '.join(map(str, shape))}]"


def product(sizes: Iterable[sympy.Expr]) -> sympy.Expr:
    """Return the product of ``sizes``, comparable to other sizes."""
    return sympy.expand(sympy.Mul(*sizes))
