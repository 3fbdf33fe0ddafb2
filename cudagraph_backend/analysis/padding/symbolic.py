"""Sizes as sympy expressions in one symbol for the padded size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sympy
import torch

from .lattice import RefusePadding

#: Stands for every symbol that is padded together: ``n`` real rows, and the bucket once padded.
ROWS = sympy.Symbol("n", integer=True, positive=True)


def expr_of(number: object) -> sympy.Basic:
    """The sympy expression of a number: Python's own, or torch's symbolic ones."""
    if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return number.node.expr
    return sympy.sympify(number)


class Sizes:
    """Rewrites sizes so that all symbols padded together are the one symbol ``ROWS``."""

    def __init__(self, symbols: Iterable[sympy.Symbol]) -> None:
        self._symbols = {symbol: ROWS for symbol in symbols}
        self._seen: dict[sympy.Basic, sympy.Basic] = {}

    def expr(self, number: object) -> sympy.Basic:
        """``number`` in terms of ``ROWS``, expanded so that equal sizes are equal expressions."""
        raw = expr_of(number)
        if raw not in self._seen:
            renamed = raw.xreplace(self._symbols)
            self._seen[raw] = sympy.expand(renamed) if isinstance(renamed, sympy.Expr) else renamed
        return self._seen[raw]

    def shape(self, tensor: torch.Tensor) -> tuple[sympy.Expr, ...]:
        """The sizes of a (fake) tensor."""
        return tuple(self.expr(size) for size in tensor.shape)  # type: ignore[misc]


def row_dim(shape: Sequence[sympy.Expr]) -> tuple[int, sympy.Expr] | None:
    """Which dim of ``shape`` carries the rows, and how many entries each row has there; None without rows."""
    dims = [dim for dim, size in enumerate(shape) if size.has(ROWS)]
    if not dims:
        return None
    if len(dims) > 1:
        raise RefusePadding(f"two dims carry the rows: {shape_text(shape)}")
    per = sympy.expand(shape[dims[0]] / ROWS)
    if per.has(ROWS) or not per.is_integer:
        raise RefusePadding(f"a size is not a whole number of entries per row: {shape_text(shape)}")
    return dims[0], per


def shape_text(shape: Sequence[sympy.Expr]) -> str:
    """``shape`` for a message, with ``n`` for the padded size."""
    return f"[{', '.join(map(str, shape))}]"


def product(sizes: Iterable[sympy.Expr]) -> sympy.Expr:
    """The product of ``sizes``, comparable to other sizes."""
    return sympy.expand(sympy.Mul(*sizes))
