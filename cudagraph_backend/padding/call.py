"""How a rule sees one operator call, and the registry of rules."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node

from cudagraph_backend.torch_internals import expr, is_operator, operator_name, operator_schema

from .lattice import FREE, Fact, Filling, Operand, RefusePadding, Results, Rows, blocks_of, common, in_blocks
from .symbolic import HIDDEN, ROWS, RowDim, Sizes, hide, row_dims, whole


@dataclass(frozen=True, slots=True)
class Mask:
    """Padded rows that must hold something before ``user`` reads them: the graph gets an operator that sees to it.

    Attributes:
        role: which of the user's arguments must, as a number among all nodes that they hold. Where it reads ``source``
            in another role, too, its rule may count on the rows as they are.
    """

    user: Node
    role: int
    source: Node
    rows: Rows
    filling: Filling

    @property
    def key(self) -> Hashable:
        """The same in masks that do the same to an operand."""
        return self.rows, self.filling


@dataclass(frozen=True, slots=True)
class RowNumbers:
    """Numbers by which ``user`` picks rows of ``picked`` along ``dim``: they are to be those of real rows.

    Attributes:
        role: which of the user's arguments they are, as in :class:`Mask`.
        wraps: whether negative numbers count from the last row.
    """

    user: Node
    role: int
    picked: Node
    dim: int
    wraps: bool

    @property
    def key(self) -> Hashable:
        """The same in edits that do the same to numbers."""
        return expr(self.picked.meta["val"].shape[self.dim]), self.wraps


#: What the graph must be given at one operator's argument.
Edit: TypeAlias = Mask | RowNumbers


@dataclass(frozen=True, slots=True)
class Call:
    """One operator call: its arguments by their schema names, tensors as :class:`Operand`, symbolic numbers as sympy.

    A rule is asked once per *line* of rows (the queries and the keys of attention are two), and sees the rows of that
    line alone. At least one operand has rows, or an argument declared by the rule as a size depends on the padded
    size: all other calls are free of rows without asking any rule.

    Attributes:
        line: which line this is, and of how many.
        made: the result's row dim that comes from no operand's rows but from a size.
        edits: where :meth:`fill` and :meth:`pick` note what the graph must be given; None if it must stay as it is.
        written: the new values of the arguments that the operator changes, after its results; None if it changes none.
    """

    node: Node
    arguments: Mapping[str, Any]
    sizes: Sizes
    line: tuple[int, int] = (0, 1)
    made: int | None = None
    edits: list[Edit] | None = None
    written: tuple[Any, ...] | None = None

    @property
    def val(self) -> Any:
        """What tracing knows of the result, or of several: changed arguments come last."""
        if self.written is None:
            return self.node.meta["val"]
        return self.written[0] if len(self.written) == 1 else self.written

    @property
    def operator(self) -> str:
        """The operator's name without its overload: ``aten::sum``."""
        target = self.node.target
        return operator_schema(target).name if is_operator(target) else rule_name(target)

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def operands(self) -> list[Operand]:
        """Every tensor among the arguments."""
        return [leaf for leaf in leaves(self.arguments) if isinstance(leaf, Operand)]

    def only(self, *names: str) -> Operand:
        """Return the first of ``names``, after checking that no tensor besides ``names`` has rows."""
        for name, argument in self.arguments.items():
            if name not in names and any(isinstance(leaf, Operand) and leaf.rows for leaf in leaves(argument)):
                raise RefusePadding(f"rows in argument {name!r}")
        return self[names[0]]

    def fill(self, operand: Operand, filling: Filling, otherwise: str) -> None:
        """Make sure that the padded rows of ``operand`` hold ``filling``: by a mask, or else padding is refused.

        Raises:
            RefusePadding: ``otherwise``, where the graph must stay as it is.
        """
        rows = operand.rows
        if rows is FREE:
            return
        if self.edits is None or operand.source is None or not _can_be_masked(rows, filling, operand.dtype):
            raise RefusePadding(otherwise)
        mask = Mask(self.node, operand.role, operand.source, rows, filling)
        if mask not in self.edits:
            self.edits.append(mask)

    def pick(self, index: Operand, operand: Operand, otherwise: str, wraps: bool = True) -> None:
        """Make sure that ``index`` numbers real rows of ``operand``, negative ones from the last one if it ``wraps``.

        What padded rows of ``index`` hold is another question (:meth:`fill`). Numbers outside stay outside.

        Raises:
            RefusePadding: ``otherwise``, where the graph must stay as it is, or real rows are not together.
        """
        rows = operand.rows
        is_known = index.source is not None and rows is not FREE and rows.together
        if self.edits is None or operand.source is None or rows is FREE or not is_known:
            raise RefusePadding(otherwise, frozenset().union(*(size.free_symbols for size in index.shape)))
        self.edits.append(RowNumbers(self.node, index.role, operand.source, rows.dim, wraps))

    def aligned(self, operands: Sequence[Operand]) -> list[Operand]:
        """Divide rows alike in operands whose entries meet: real ones with real ones, padded with padded ones."""
        blocks = blocks_of(*operands)
        return [replace(one, rows=one.rows and in_blocks(one.rows, blocks)) for one in operands]

    def keep(self, facts: Fact, *operands: Operand | None, dim: int | None = None) -> Rows:
        """Return the result's rows, at ``dim`` or where its shape tells; of ``facts``, those that all operands hold.

        Without ``operands``, all operands of the call are meant.
        """
        return self._rows(self.val, facts, operands or self.operands, dim)

    def each(self, facts: Fact, *operands: Operand | None) -> tuple[Rows | RefusePadding | None, ...]:
        """Return the rows of several results, as :meth:`keep` of one; a result without a row dim is free of rows."""
        results: list[Rows | RefusePadding | None] = []
        for val in self.val:
            try:
                is_rows = isinstance(val, torch.Tensor) and bool(row_dims(self.sizes.shape(val)))
                results.append(self._rows(val, facts, operands or self.operands) if is_rows else None)
            except RefusePadding as refusal:
                results.append(refusal.with_traceback(None))  # its frames hold tensors of the user
        return tuple(results)

    def result_dim(self) -> RowDim | None:
        """Return the dim of the call's one result that carries this line's rows."""
        return self._row_dim(self.val)

    def result_shape(self) -> tuple[sympy.Expr, ...]:
        """Return the shape of the call's one result."""
        shape, found = self.sizes.shape(self.val), self.result_dim()
        return hide(shape, [dim for dim in range(len(shape)) if found is None or dim != found.dim])

    def _row_dim(self, val: torch.Tensor, dim: int | None = None) -> RowDim | None:
        found = row_dims(self.sizes.shape(val))
        dim = self.made if dim is None else dim
        if dim is not None:
            return next((one for one in found if one.dim == dim), None)
        if len(found) <= 1:
            return found[0] if found else None
        number, count = self.line
        if len(found) != count:
            raise RefusePadding("several dims carry the rows, and which is which can't be told")
        return found[number]  # operators keep the order of dims, unless their rule says otherwise

    def _rows(self, val: torch.Tensor, facts: Fact, operands: Sequence[Operand | None], dim: int | None = None) -> Rows:
        found = self._row_dim(val, dim)
        if found is None:
            raise RefusePadding("the result of an operation on rows has no row dim")
        blocks = blocks_of(*operands)
        per, extra = (
            each if blocks is None else whole(each, blocks, "rows in different places meet") for each in found[1:]
        )
        facts &= common(*operands)
        if is_exact(val.dtype) and any(operand.rows and not is_exact(operand.dtype) for operand in self.operands):
            facts &= ~Fact.REPLICA  # equal up to rounding before, another number after
        return Rows(found.dim, per, facts, blocks, extra)


def _can_be_masked(rows: Rows, filling: Filling, dtype: torch.dtype) -> bool:
    if (
        isinstance(filling, str)
        and filling != "last"
        and (dtype.is_complex or (dtype.is_floating_point and dtype.itemsize < 2))
    ):
        return False  # complex numbers have no order, and some floats of one byte no infinity
    if filling == "last":
        is_whole = rows.extra == 0 or (rows.per == 1 and (rows.per + rows.extra).is_positive)  # there is a last row
        if not is_whole:
            return False
    blocks = sympy.S.One if rows.blocks is None else rows.blocks
    return all(size.is_polynomial() and not size.has(HIDDEN) for size in (rows.per, blocks, rows.extra))


def leaves(argument: Any) -> Iterator[Any]:
    """Yield everything in nested lists, tuples and dicts."""
    if isinstance(argument, (list, tuple)):
        for item in argument:
            yield from leaves(item)
    elif isinstance(argument, Mapping):
        yield from leaves(list(argument.values()))
    else:
        yield argument


Rule = Callable[[Call], Results]

#: Tells lines apart, given the call and one operand's name and rows: the same for rows that meet.
LineKey = Callable[[Call, str, Operand, Rows], Hashable]


def by_place(call: Call, name: str, operand: Operand, rows: Rows) -> Hashable:
    """Return the row dim counted from the end: rows meet at the same one, as broadcasting aligns dims."""
    return rows.dim - len(operand.shape)


def one_line(call: Call, name: str, operand: Operand, rows: Rows) -> Hashable:
    """Return the rows of several operands all meet; those of one operand along several dims don't."""
    others = any(leaf is not operand and leaf.axes for leaf in call.operands)
    return 0 if others else by_place(call, name, operand, rows)


@dataclass(frozen=True, slots=True)
class RegisteredRule:
    """A rule, the arguments that are sizes (only through these may the padded size reach the operator), and lines.

    ``writes``: the rule also answers for an operator that changes its arguments.
    """

    apply: Rule
    sizes: frozenset[str] = frozenset()
    line: LineKey = by_place
    writes: bool = False


#: Rules by the operator's full name, ``aten::sum.dim_IntList``.
RULES: dict[str, RegisteredRule] = {}


def rule(
    *operators: str, sizes: tuple[str, ...] = (), line: LineKey = by_place, writes: bool = False
) -> Callable[[Rule], Rule]:
    """Register a rule for ``operators``, named as ``aten::view`` or with the overload as ``aten::sum.dim_IntList``.

    The rule answers: if real rows of the operands are right, are real rows of the result? It returns ``FREE``,
    ``Rows`` (see :meth:`Call.keep`) or a tuple of these for several results, or raises :class:`RefusePadding`.
    ``sizes`` names the arguments that hold sizes, which may depend on the padded size; in any other argument such a
    number is refused before the rule is asked. ``line`` tells which rows of the operands meet; the rule is asked once
    for each line. Whatever a rule returns is checked against the result's shape.
    """

    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = RegisteredRule(function, frozenset(sizes), line, writes)
        return function

    return register


def rule_name(target: Any) -> str:
    """Return the full name by which an operator's rule is registered."""
    return operator_name(target) if is_operator(target) else f"higher_order::{target.name()}"


def is_exact(dtype: torch.dtype) -> bool:
    """Return whether numbers of ``dtype`` are never rounded: integers and booleans."""
    return not (dtype.is_floating_point or dtype.is_complex)


def depends_on_size(argument: Any) -> bool:
    """Return whether a number in ``argument`` changes with the padded size."""
    return any(isinstance(leaf, sympy.Basic) and leaf.has(ROWS) for leaf in leaves(argument))
