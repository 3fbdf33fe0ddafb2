"""Sizes as sympy expressions in one symbol for the padded size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import sympy
import torch

from cudagraph_backend.torch_internals import expr

from .lattice import RefusePadding

#: Stands for every symbol that is padded together: ``n`` real rows, and the bucket once padded.
ROWS = sympy.Symbol("n", integer=True, positive=True)


class Sizes:
    """Rewrites sizes so that all symbols padded together are the one symbol ``ROWS``."""

    def __init__(self, symbols: Iterable[sympy.Symbol]) -> None:
        self._symbols = dict.fromkeys(symbols, ROWS)
        self._seen: dict[sympy.Basic, sympy.Basic] = {}

    def expr(self, number: object) -> sympy.Basic:
        """``number`` in terms of ``ROWS``, expanded so that equal sizes are equal expressions."""
        raw = expr(number)
        if raw not in self._seen:
            renamed = raw.xreplace(self._symbols)
            self._seen[raw] = sympy.expand(renamed) if isinstance(renamed, sympy.Expr) else renamed
        return self._seen[raw]

    def shape(self, tensor: torch.Tensor) -> tuple[sympy.Expr, ...]:
        """The sizes of a (fake) tensor."""
        return tuple(self.expr(size) for size in tensor.shape)  # type: ignore[misc]


def row_dim(shape: Sequence[sympy.Expr]) -> tuple[int, sympy.Expr] | None:
    """Which dim of ``shape`` carries the rows, and how many entries it has per row; None without rows."""
    dims = [dim for dim, size in enumerate(shape) if size.has(ROWS)]
    if not dims:
        return None
    if len(dims) > 1:
        raise RefusePadding(f"two dims carry the rows: {shape_text(shape)}")
    return dims[0], whole(shape[dims[0]], ROWS, f"a size is not a multiple of the rows: {shape_text(shape)}")


def whole(size: sympy.Expr, by: sympy.Expr, otherwise: str) -> sympy.Expr:
    """``size / by``, refused for the reason ``otherwise`` unless that is a whole number at every size."""
    quotient = _quotient(size, by)
    if quotient.has(ROWS) or not quotient.is_integer:
        raise RefusePadding(otherwise)
    return quotient


@lru_cache(maxsize=4096)
def _quotient(size: sympy.Expr, by: sympy.Expr) -> sympy.Expr:
    return sympy.expand(sympy.cancel(size / by))


def shape_text(shape: Sequence[sympy.Expr]) -> str:
    """``shape`` for a message, with ``n`` for the padded size."""
    return f"[{', '.join(map(str, shape))}]"


def product(sizes: Iterable[sympy.Expr]) -> sympy.Expr:
    """The product of ``sizes``, comparable to other sizes."""
    return sympy.expand(sympy.Mul(*sizes))
