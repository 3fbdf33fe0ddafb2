"""The proof that padding a dim can't change a real row: one walk over the graph, a rule per operator."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch
from torch.fx import Graph, Node

from cudagraph_backend.analysis.source import first_use, source_line
from cudagraph_backend.errors import Refusal
from cudagraph_backend.torch_internals import SYMBOLIC, is_operator, operator_name, operator_schema

from . import rules
from .call import RULES, Call, RegisteredRule, depends_on_size, leaves
from .lattice import FREE, Fact, Operand, RefusePadding, Results, Rows, Value, meet
from .symbolic import ROWS, Sizes, row_dim, shape_text

_FILLS = {"replica": Fact.REPLICA, "zero": Fact.ZERO}
_POINTWISE = RegisteredRule(rules.pointwise, frozenset())


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a region may run at a bucket with padded rows after the real ones.

    Attributes:
        symbols: the shape symbols padded together.
        refusal: None if no real row of an output or mutated input can change; otherwise why that is not proven.
        needs_fill: the padded rows of the inputs must hold the fill; otherwise they may hold anything.
        link: with a refusal, symbols that may belong to the same dim: padded together with them, and with equal sizes
            in the call, the region may be proven.
        outputs: for each output its row structure, None if free of rows.
    """

    symbols: frozenset[sympy.Symbol]
    refusal: Refusal | None
    needs_fill: bool
    link: frozenset[sympy.Symbol]
    outputs: tuple[Rows | None, ...]


def prove(graph: Graph, symbols: frozenset[sympy.Symbol], fill: Literal["replica", "zero"]) -> Verdict:
    """Tries to prove that running ``graph`` with the dim of ``symbols`` padded leaves every real row as it is.

    First with padded rows that hold anything, then with padded rows that hold ``fill``.
    """
    sizes = Sizes(symbols)
    for holds in (Fact.NOTHING, _FILLS[fill]):
        walk = _Walk(sizes, holds)
        try:
            outputs = walk.run(graph)
        except RefusePadding as refused:
            refusal, link = walk.blame(refused), frozenset(refused.link) - symbols - {ROWS}
        else:
            return Verdict(symbols, None, holds is not Fact.NOTHING, frozenset(), outputs)
    return Verdict(symbols, refusal, False, link, ())


@dataclass(slots=True)
class _Walk:
    """Finds every node's value in order; stops at the first node that mixes real and padded rows."""

    sizes: Sizes
    fill: Fact
    values: dict[Node, Results] = field(default_factory=dict)
    wrote: bool = False
    node: Node | None = None

    def run(self, graph: Graph) -> tuple[Rows | None, ...]:
        """The outputs' row structures."""
        for node in graph.nodes:
            self.node = node
            if node.op == "output":
                return tuple(self._output(item) for item in leaves(node.args[0]))
            self.values[node] = self._value(node)
        raise ValueError("a graph without output")

    def blame(self, refused: RefusePadding) -> Refusal:
        """The refusal, with the operator and source line that brought it about."""
        node = self.node
        if node is None or node.op != "call_function":
            return Refusal(refused.reason, source=first_use(node) if node is not None else None)
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            node = node.args[0]
        return Refusal(refused.reason, str(node.target), source_line(node))

    def _output(self, item: object) -> Value:
        if not isinstance(item, Node) or not _is_tensor(item):
            return FREE  # a size: computed from the exact sizes, whatever the graph computes at the bucket
        self.node, rows = item, self._operand(item).rows
        if rows is not FREE and not rows.together:
            raise RefusePadding("padded rows come between the real rows of an output")
        return rows

    def _value(self, node: Node) -> Results:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            return FREE
        if node.op != "call_function":
            raise RefusePadding(f"a node of kind {node.op}")
        if node.target is operator.getitem:
            return self._item(node)
        if is_operator(node.target):
            return self._checked(node, self._call(node, node.target))
        if isinstance(node.meta.get("val"), (*SYMBOLIC, int, float, bool)):
            return FREE  # arithmetic on sizes; what depends on the padded size is seen where it is used
        raise RefusePadding("no padding rule for a higher-order operator")

    def _input(self, node: Node) -> Value:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            return FREE
        try:
            found = row_dim(self.sizes.shape(val))
        except RefusePadding as refused:
            raise RefusePadding(f"input {node.name}: {refused.reason}") from None
        return Rows(*found, self.fill) if found else FREE

    def _item(self, node: Node) -> Results:
        whole, index = self.values[node.args[0]], node.args[1]  # type: ignore[index]
        item = whole[index] if isinstance(whole, tuple) else whole  # type: ignore[index]
        if isinstance(item, RefusePadding):
            raise item
        return self._checked(node, item)

    def _call(self, node: Node, target: Any) -> Results:
        schema = operator_schema(target)
        if target is torch.ops.aten.copy_.default:
            return self._write(node)
        if schema.is_mutable:
            raise RefusePadding("writes in place")
        if self.wrote:
            raise RefusePadding("computes after an input was written in place")
        if schema.name.startswith("aten::sym_"):
            return FREE
        arguments = {argument.name: argument.default_value for argument in schema.arguments}
        arguments.update(zip(arguments, map(self._argument, node.args), strict=False))
        arguments.update({name: self._argument(argument) for name, argument in node.kwargs.items()})
        reaching = [name for name, argument in arguments.items() if depends_on_size(argument)]
        call = Call(node, arguments, self.sizes)
        if not reaching and not any(operand.rows for operand in call.operands):
            return FREE
        found = _rule_for(target)
        for name in reaching:
            if name not in found.sizes:
                raise RefusePadding(f"the padded size reaches values through argument {name!r}")
        return found.apply(call)

    def _write(self, node: Node) -> Value:
        target, source = (self._operand(argument) for argument in node.args[:2])
        if node.args[0].op != "placeholder":  # type: ignore[union-attr]
            raise RefusePadding("writes in place into a tensor that is not an input")
        self.wrote = True
        if target.rows is FREE and source.rows is not FREE:
            raise RefusePadding("padded rows would be written into an input free of rows")
        meet(target, source)
        if source.rows is FREE or target.rows is FREE:
            return target.rows and Rows(target.rows.dim, target.rows.per)
        if (source.rows.count, source.rows.together) != (target.rows.count, True):
            raise RefusePadding("rows from other places are written into an input's rows")
        return Rows(target.rows.dim, target.rows.per)

    def _argument(self, argument: object) -> object:
        """An argument with nodes replaced by what is known of them, and symbolic numbers by sympy's."""
        if isinstance(argument, (list, tuple)):
            return [self._argument(item) for item in argument]
        if isinstance(argument, Node):
            return self._argument_of(argument)
        return self._number(argument) if isinstance(argument, SYMBOLIC) else argument

    def _argument_of(self, node: Node) -> object:
        val = node.meta.get("val")
        if isinstance(val, SYMBOLIC):
            return self._number(val)
        if isinstance(val, (list, tuple)):
            raise RefusePadding(f"{node.name} is used as a whole")
        return self._operand(node) if _is_tensor(node) else val

    def _number(self, number: object) -> object:
        expr = self.sizes.expr(number)
        return int(expr) if expr.is_Integer else expr  # type: ignore[call-overload]

    def _operand(self, node: Any) -> Operand:
        val, value = node.meta.get("val"), self.values[node]
        if val is None:  # a constant of the graph
            val = getattr(node.graph.owning_module, node.target)
        return Operand(self.sizes.shape(val), val.dtype, value)  # type: ignore[arg-type]

    def _checked(self, node: Node, value: Results) -> Results:
        """``value``, after checking it against the shape of the node's result, so that no rule can be wrong there."""
        val = node.meta.get("val")
        if isinstance(value, tuple) or isinstance(val, (list, tuple)) or val is None:
            return value
        if not isinstance(val, torch.Tensor):
            if depends_on_size(self._number(val)) and not _is_symbolic_size(node):
                raise RefusePadding("a number computed from tensors changes with the padded size")
            return FREE
        found, shape = row_dim(self.sizes.shape(val)), self.sizes.shape(val)
        claimed = (value.dim, value.count) if isinstance(value, Rows) else None
        if found != claimed:
            raise RefusePadding(f"the result's shape changes with the padded size: {shape_text(shape)}")
        return value


def _rule_for(target: Any) -> RegisteredRule:
    if (name := operator_name(target)) in RULES:
        return RULES[name]
    if torch.Tag.nondeterministic_seeded in target.tags:
        raise RefusePadding("draws random numbers for the rows")
    if torch.Tag.pointwise in target.tags:
        return _POINTWISE
    raise RefusePadding("no padding rule for this operator")


def _is_tensor(node: Node) -> bool:
    return node.op == "get_attr" or isinstance(node.meta.get("val"), torch.Tensor)


def _is_symbolic_size(node: Node) -> bool:
    return node.target is operator.getitem or str(node.target).startswith("aten.sym_")
