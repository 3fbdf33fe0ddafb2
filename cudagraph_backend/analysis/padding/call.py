"""How a rule sees one operator call, and the registry of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from cudagraph_backend.torch_internals import is_operator, operator_schema

from .lattice import Fact, Operand, RefusePadding, Results, Rows, blocks_of, common
from .symbolic import ROWS, Sizes, row_dim, whole


@dataclass(frozen=True, slots=True)
class Call:
    """One operator call: its arguments by their schema names, tensors as :class:`Operand`, symbolic numbers as sympy.

    At least one operand has rows, or an argument declared by the rule as a size depends on the padded size: all
    other calls are free of rows without asking any rule.
    """

    node: Node
    arguments: Mapping[str, Any]
    sizes: Sizes

    @property
    def operator(self) -> str:
        """The operator's name without its overload: ``aten::sum``."""
        assert is_operator(self.node.target)
        return operator_schema(self.node.target).name

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def operands(self) -> list[Operand]:
        """Every tensor among the arguments."""
        return [leaf for leaf in leaves(self.arguments) if isinstance(leaf, Operand)]

    def only(self, *names: str) -> Operand:
        """The first of ``names``, after checking that no tensor besides ``names`` has rows."""
        for name, argument in self.arguments.items():
            if name not in names and any(isinstance(leaf, Operand) and leaf.rows for leaf in leaves(argument)):
                raise RefusePadding(f"rows in argument {name!r}")
        return self[names[0]]

    def keep(self, facts: Fact, *operands: Operand | None) -> Rows:
        """The result has rows, at the dim its shape tells; of ``facts``, those hold that hold for all ``operands``.

        Without ``operands``, all operands of the call are meant.
        """
        return self._rows(self.node.meta["val"], facts, operands or self.operands)

    def each(self, facts: Fact, *operands: Operand | None) -> tuple[Rows | RefusePadding | None, ...]:
        """As :meth:`keep`, for an operator with several results; a result without a row dim is free of rows."""
        results: list[Rows | RefusePadding | None] = []
        for val in self.node.meta["val"]:
            try:
                is_rows = isinstance(val, torch.Tensor) and row_dim(self.sizes.shape(val)) is not None
                results.append(self._rows(val, facts, operands or self.operands) if is_rows else None)
            except RefusePadding as refusal:
                results.append(refusal)
        return tuple(results)

    def result_shape(self) -> tuple[sympy.Expr, ...]:
        """The shape of the call's one result."""
        return self.sizes.shape(self.node.meta["val"])

    def _rows(self, val: torch.Tensor, facts: Fact, operands: Sequence[Operand | None]) -> Rows:
        found = row_dim(self.sizes.shape(val))
        if found is None:
            raise RefusePadding("the result of an operation on rows has no row dim")
        (dim, count), blocks = found, blocks_of(*operands)
        per = count if blocks is None else whole(count, blocks, "rows in different places meet")
        facts &= common(*operands)
        if is_exact(val.dtype) and any(operand.rows and not is_exact(operand.dtype) for operand in self.operands):
            facts &= ~Fact.REPLICA  # equal up to rounding before, another number after
        return Rows(dim, per, facts, blocks)


def leaves(argument: Any) -> Iterator[Any]:
    """Everything in nested lists, tuples and dicts."""
    if isinstance(argument, (list, tuple)):
        for item in argument:
            yield from leaves(item)
    elif isinstance(argument, Mapping):
        yield from leaves(list(argument.values()))
    else:
        yield argument


Rule = Callable[[Call], Results]


@dataclass(frozen=True, slots=True)
class RegisteredRule:
    """A rule, and the arguments that are sizes: only through these may the padded size reach the operator."""

    apply: Rule
    sizes: frozenset[str]


#: Rules by the operator's full name, ``aten::sum.dim_IntList``.
RULES: dict[str, RegisteredRule] = {}


def rule(*operators: str, sizes: tuple[str, ...] = ()) -> Callable[[Rule], Rule]:
    """Registers a rule for ``operators``, named as ``aten::view`` or with the overload as ``aten::sum.dim_IntList``.

    The rule answers: if real rows of the operands are right, are real rows of the result? It returns ``FREE``,
    ``Rows`` (see :meth:`Call.keep`) or a tuple of these for several results, or raises :class:`RefusePadding`.
    ``sizes`` names the arguments that hold sizes, which may depend on the padded size; in any other argument such a
    number is refused before the rule is asked. Whatever a rule returns is checked against the result's shape.
    """

    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = RegisteredRule(function, frozenset(sizes))
        return function

    return register


def is_exact(dtype: torch.dtype) -> bool:
    """Whether numbers of ``dtype`` are never rounded: integers and booleans."""
    return not (dtype.is_floating_point or dtype.is_complex)


def depends_on_size(argument: Any) -> bool:
    """Whether a number in ``argument`` changes with the padded size."""
    return any(isinstance(leaf, sympy.Basic) and leaf.has(ROWS) for leaf in leaves(argument))
