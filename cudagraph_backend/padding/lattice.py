"""What the pass knows of one value: free of rows, or rows along dims whose padded part holds something.

A value is *free of rows* (``FREE``) if it is the same at the exact size ``n`` and at the bucket ``b``. It has *rows*
(:class:`Rows`) along a dim if that dim consists of blocks, in each of which the first ``per * n`` entries are real and
padded rows follow. Mostly that is one block; ``reshape`` of ``[4, n]`` to ``[4 * n]`` makes four. A value may have rows
along several dims, as the scores of self-attention have: an entry is real if it is real along each of them, and real
entries are the same at both sizes. A value that is neither (*mixed*: real and padded rows met) is never built: its
rule raises :class:`RefusePadding`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import sympy
import torch
from torch.fx import Node


class RefusePadding(Exception):
    """Real rows may depend on padded rows, or on the padded size.

    Attributes:
        link: symbols that may be the same dim as the padded ones: with them padded together a proof may succeed.
    """

    def __init__(self, reason: str, link: frozenset[sympy.Symbol] = frozenset()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.link = link


class Fact(enum.Flag):
    """What the padded rows hold, where the value's other dims are real. No fact: anything, NaN included."""

    NOTHING = 0
    REPLICA = enum.auto()
    """Each padded row equals the last real row of its block: floats up to rounding (it may be computed in another
    tile), integers and booleans exactly."""
    ZERO = enum.auto()
    """Each padded entry is zero."""
    OWN_INDEX = enum.auto()
    """Each entry of each row, real or padded, is the row's own number."""
    ALL = REPLICA | ZERO | OWN_INDEX


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows along a dim.

    Attributes:
        dim: the dim, of size ``blocks * (per * n + extra)``.
        per: consecutive entries of one row.
        holds: what the padded rows hold.
        blocks: how many times real rows and then padded rows follow each other along the dim; None if all entries
            along it are equal, so that any division into rows is right.
        extra: entries of a block more than rows, or less (``x[:-1]``). The first ``per * n + extra`` are real.
    """

    dim: int
    per: sympy.Expr
    holds: Fact = Fact.NOTHING
    blocks: sympy.Expr | None = sympy.S.One
    extra: sympy.Expr = sympy.S.Zero

    @property
    def together(self) -> bool:
        """Whether all real rows come before all padded rows."""
        return self.blocks is None or self.blocks == 1

    @property
    def count(self) -> sympy.Expr:
        """Entries along the dim per padded row."""
        return sympy.expand(self.per * (1 if self.blocks is None else self.blocks))

    @property
    def more(self) -> sympy.Expr:
        """Extra entries of all blocks: the dim's size is ``count * n + more``."""
        return sympy.expand(self.extra * (1 if self.blocks is None else self.blocks))


#: A value without rows: the same at every padded size.
FREE: Final = None

#: Along one line of dims; all that a rule sees.
Value: TypeAlias = "Rows | None"

#: Along all dims of a value, in their order; empty if it is free of rows.
Axes: TypeAlias = "tuple[Rows, ...]"

#: What a mask puts in place of padded rows: a number, the lowest or highest of the dtype, what a sort puts last (NaN,
#: where the dtype has it), or the last real row.
Filling: TypeAlias = "int | Literal['lowest', 'highest', 'greatest', 'last']"

#: What a rule returns: a value, or for an operator with several results one each. A ``RefusePadding`` in their place
#: stands for a result that is mixed: the refusal comes about only if that result is used.
Results: TypeAlias = "Rows | RefusePadding | tuple[Rows | RefusePadding | None, ...] | None"


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor that an operator reads, seen along one line of rows.

    Attributes:
        shape: sizes; where other lines have their rows, the padded size is ``HIDDEN``.
        rows: the rows along this line.
        axes: the rows along every line.
        source: the node that made it.
        role: its number among all nodes that the operator's arguments hold: one value may be read twice.
    """

    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    rows: Value
    axes: Axes = ()
    source: Node | None = field(default=None, compare=False)
    role: int = field(default=0, compare=False)

    @property
    def row_dim(self) -> int | None:
        """The dim that carries the rows, if there are any."""
        return None if self.rows is None else self.rows.dim

    @property
    def place(self) -> int | None:
        """The row dim counted from the end, as broadcasting aligns dims: ``-1`` is the last."""
        return None if self.rows is None else self.rows.dim - len(self.shape)

    @property
    def together(self) -> bool:
        """Whether all real rows come before all padded rows, if there are any."""
        return self.rows is None or self.rows.together

    def check_place(self, place: int) -> None:
        """Refuse unless rows are at ``place``, or the value, free of rows, is broadcast there.

        A value of as many entries as there happen to be rows fits no bucket. (Shape checks while tracing see to most
        of this, but not every operator has them.)
        """
        size = self.shape[place] if len(self.shape) >= -place else sympy.S.One
        if self.place not in (place, None):
            raise RefusePadding("rows along different dims meet")
        if self.rows is FREE and size != 1:
            raise RefusePadding("rows meet a dim of another size", frozenset(size.free_symbols))

    def holds(self, fact: Fact) -> bool:
        """Return whether the padded rows hold ``fact``; without rows there are none that could break it."""
        return self.rows is None or bool(self.rows.holds & fact)

    def dim(self, dim: int) -> int:
        """Return ``dim`` counted from the front."""
        return dim % len(self.shape) if self.shape else 0


def meet(*operands: Operand | None) -> int | None:
    """Return where the rows of operands that are broadcast meet, counted from the end; ``None`` without rows."""
    given = [operand for operand in operands if operand is not None]
    places = {operand.place for operand in given if operand.place is not None}
    if len(places) > 1:
        raise RefusePadding("rows along different dims meet")
    for place in places:
        for operand in given:
            operand.check_place(place)
    return places.pop() if places else None


def in_order(rows: Rows) -> Rows:
    """Return ``rows`` in one block: for operators whose results differ from row to row though the operands' don't."""
    return Rows(rows.dim, rows.count, rows.holds, extra=rows.extra) if rows.blocks is None else rows


def in_blocks(rows: Rows, blocks: sympy.Expr | None) -> Rows:
    """Return ``rows`` divided as other operands are: possible if all its entries are equal."""
    if rows.blocks is not None or blocks is None:
        return rows
    per, extra = sympy.expand(rows.count / blocks), sympy.expand(rows.more / blocks)
    if not (per.is_integer and extra.is_integer):
        raise RefusePadding("rows in different places meet")
    return Rows(rows.dim, per, rows.holds, blocks, extra)


def blocks_of(*operands: Operand | None) -> sympy.Expr | None:
    """Return the blocks that all ``operands`` with rows are divided into."""
    blocks = {o.rows.blocks for o in operands if o is not None and o.rows is not None} - {None}
    if len(blocks) > 1:
        raise RefusePadding("rows in different places meet")
    return blocks.pop() if blocks else None


def common(*operands: Operand | None) -> Fact:
    """Return the facts that hold in the padded rows of all ``operands`` that have rows."""
    facts = Fact.ALL
    for operand in operands:
        if operand is not None and operand.rows is not None:
            facts &= operand.rows.holds
    return facts
