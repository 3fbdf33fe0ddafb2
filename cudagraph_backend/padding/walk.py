"""The walk of a proof: what is known of each node's rows, node by node, a rule per operator."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Graph, Node

from cudagraph_backend.errors import Refusal
from cudagraph_backend.graph.operators import wrapped, writes_in_place
from cudagraph_backend.graph.source import first_use, source_line
from cudagraph_backend.torch_internals import (
    SYMBOLIC,
    bound_arguments,
    expr,
    is_operator,
    operator_name,
    operator_schema,
    submodule_of,
    written_arguments,
)

from . import alignment, rules
from .call import RULES, Call, RegisteredRule, depends_on_size, leaves, rule_name
from .edits import Edits
from .lattice import Axes, Fact, Operand, RefusePadding, Results, Rows
from .lines import along, lines_of, together
from .symbolic import Sizes, row_dims, shape_text

_POINTWISE = RegisteredRule(rules.pointwise)

#: What is known of a node: rows by dim, or for several results a list of these.
Found: TypeAlias = "Axes | RefusePadding | list[Axes | RefusePadding]"


@dataclass(slots=True)
class Walk:
    """Finds every node's rows in order; stops at the first node that mixes real and padded rows."""

    sizes: Sizes
    holds: Mapping[str, Fact]
    edits: Edits | None = None
    values: dict[Node, Found] = field(default_factory=dict)
    given: Mapping[Node, Found] = field(default_factory=dict)
    wrote: bool = False
    node: Node | None = None

    def run(self, graph: Graph) -> tuple[Axes, ...]:
        """Return the rows of the outputs."""
        return tuple(self._output(item) for item in self._walk(graph))

    def _walk(self, graph: Graph) -> list[Any]:
        """Find the rows of all nodes; return the outputs."""
        for node in graph.nodes:
            self.node = node
            if node.op == "output":
                return list(leaves(node.args[0]))
            self.values[node] = self.given[node] if node in self.given else self._value_or_form(node)
        raise ValueError("a graph without output")

    def blame(self, refused: RefusePadding) -> Refusal:
        """Return the refusal, with the operator and source line that brought it about."""
        node = self.node
        if node is None or node.op != "call_function":
            return Refusal(refused.reason, source=first_use(node) if node is not None else None)
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            node = node.args[0]
        operator_of = next((str(target) for target in wrapped(node)), str(node.target))
        return Refusal(refused.reason, operator_of, source_line(node))

    def _output(self, item: object) -> Axes:
        if not isinstance(item, Node) or not _is_tensor(item):
            return ()  # a size: computed from the exact sizes, whatever the graph computes at the bucket
        self.node = item
        axes = self._operand(item).axes
        if not all(rows.together for rows in axes):
            raise RefusePadding("padded rows come between the real rows of an output")
        return axes

    # ---- nodes

    def _value_or_form(self, node: Node) -> Found:
        """Return what is known of a node; where it is refused and the graph may change, of another form of it."""
        before = self.edits.state() if self.edits is not None else 0
        try:
            found = self._value(node)
        except RefusePadding as refused:
            other = self._in_other_form(node, before)
            if isinstance(other, RefusePadding):
                raise RefusePadding(refused.reason, refused.link | other.link) from None
            return other
        is_refused = isinstance(found, RefusePadding) or self._joins_blocks(node, found)
        other = self._in_other_form(node, before) if is_refused else found
        return found if isinstance(other, RefusePadding) else other

    def _joins_blocks(self, node: Node, found: Found) -> bool:
        """Return whether rows are joined end to end that are to be in order."""
        if self.edits is None or node.target is not torch.ops.aten.cat.default or not isinstance(found, tuple):
            return False
        is_joined = not all(rows.together for rows in found)
        self.edits.found_joined |= is_joined
        return is_joined and self.edits.joins_in_order

    def _in_other_form(self, node: Node, before: int) -> Found:
        """Return what is known of another form of a node, or why there is none that is not refused."""
        if self.edits is None or node.op != "call_function":
            return RefusePadding("it must stay as it is")
        blamed = self.node
        self.edits.take_back(before)
        try:
            return self._formed(node, self.edits)
        except RefusePadding as refused:
            self.node = blamed
            self.edits.take_back(before)
            for made in self.edits.editor.made:  # what is at the front may be read by another form
                self.values.setdefault(made, RefusePadding("made for a form that is refused"))
            return RefusePadding(refused.reason, refused.link)

    def _formed(self, node: Node, edits: Edits) -> Found:
        made, results = edits.write_form(node)
        for one in made:
            self.values[one] = self._value_or_form(one)
        found = [() if one is None else self.values[one] for one in edits.put_in_place(node, results)]
        return found[0] if isinstance(node.meta["val"], torch.Tensor) else list(found)  # type: ignore[arg-type]

    def _value(self, node: Node) -> Found:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            return ()
        if node.op != "call_function":
            raise RefusePadding(f"a node of kind {node.op}")
        if node.target is operator.getitem:
            return self._item(node)
        if is_operator(node.target):
            return self._checked(node, self._call(node, node.target))
        if isinstance(node.meta.get("val"), (*SYMBOLIC, int, float, bool)):
            return ()  # arithmetic on sizes; what depends on the padded size is seen where it is used
        return self._checked(node, self._higher_order(node))

    def _input(self, node: Node) -> Axes:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            return ()
        try:
            found = row_dims(self.sizes.shape(val))
        except RefusePadding as refused:
            raise RefusePadding(f"input {node.name}: {refused.reason}") from None
        holds = self.holds.get(str(node.target), Fact.NOTHING)
        return tuple(Rows(dim, per, holds, extra=more) for dim, per, more in found)

    def _item(self, node: Node) -> Found:
        whole, index = self.values[node.args[0]], node.args[1]  # type: ignore[index]
        item = whole[index] if isinstance(whole, list) else whole  # type: ignore[index]
        if isinstance(item, RefusePadding) and not alignment.is_rounded(node):
            raise RefusePadding(item.reason, item.link)
        return self._checked(node, item)

    def _call(self, node: Node, target: Any) -> Found:
        schema = operator_schema(target)
        self._check_effects(node, schema)
        if target is torch.ops.aten.slice.Tensor and (found := self._cut_as_before(node)) is not None:
            return found
        if schema.name.startswith("aten::sym_"):
            return ()
        arguments = {argument.name: argument.default_value for argument in schema.arguments}
        roles = count()
        arguments.update(zip(arguments, self._argument(node.args, roles), strict=False))  # type: ignore[call-overload]
        arguments.update({name: self._argument(argument, roles) for name, argument in node.kwargs.items()})
        reaching = [name for name, argument in arguments.items() if depends_on_size(argument)]
        if not reaching and not any(isinstance(leaf, Operand) and leaf.axes for leaf in leaves(arguments)):
            return ()
        rule = _rule_for(target)
        for name in reaching:
            if name not in rule.sizes:
                raise RefusePadding(f"the padded size reaches values through argument {name!r}")
        return self._apply(rule, node, arguments, makes_rows=bool(reaching))

    def _higher_order(self, node: Node) -> Found:
        """Return what is known of the results of an operator that runs others, or a kernel of the user's."""
        target: Any = node.target
        if writes_in_place(node):
            raise RefusePadding("writes in place")
        if self.wrote:
            raise RefusePadding("computes after an input was written in place")
        roles = count()
        args, kwargs = (self._argument(argument, roles) for argument in (node.args, node.kwargs))
        reached = [leaf for leaf in leaves([args, kwargs]) if depends_on_size(leaf) or _has_rows(leaf)]
        if not reached:
            return ()
        if target.name() == "invoke_subgraph":
            return self._inside(node)
        if (written := self._written(node, kwargs)) is not None:  # type: ignore[arg-type]
            return written
        if (found := RULES.get(rule_name(target))) is None or node.meta.get("val") is None:
            changes = target.name().startswith("auto_functionalized")
            raise RefusePadding(f"no padding rule for {'an operator that changes its arguments' if changes else 'it'}")
        if any(map(depends_on_size, reached)):
            raise RefusePadding("the padded size reaches values through its arguments")
        return self._apply(found, node, bound_arguments(node, args, kwargs), makes_rows=False)  # type: ignore[arg-type]

    def _written(self, node: Node, kwargs: dict[str, Any]) -> Found | None:
        """Return what a user's rule says of an operator that changes its arguments; ``None`` where there is none.

        The wrapper gives the operator's results, then its bases, the memory that is changed, as they are afterwards. A
        rule is asked only where each of these is one whole argument.
        """
        op = node.args[0] if node.args else None
        found = RULES.get(operator_name(op)) if is_operator(op) else None
        arguments = written_arguments(node, kwargs)
        if found is None or not found.writes or arguments is None or node.meta.get("val") is None:
            return None
        if any(map(depends_on_size, arguments.values())):
            raise RefusePadding("the padded size reaches values through its arguments")
        results = node.meta["val"]
        is_silent = not operator_schema(op).returns  # type: ignore[arg-type]
        values = results[1:] if is_silent else results
        known = self._apply(found, node, arguments, makes_rows=False, written=tuple(values))
        listed: list[Any] = known if isinstance(known, list) else [known]
        return [(), *listed] if is_silent else listed

    def _inside(self, node: Node) -> Found:
        """Return the rows of what a graph inside this one returns, from those of its arguments; it gets no masks."""
        module = submodule_of(node.args[0])  # type: ignore[arg-type]
        if module is None:
            raise RefusePadding("what it runs can't be found")
        inputs, operands = module.graph.find_nodes(op="placeholder"), node.args[2:]
        if len(inputs) != len(operands) or not all(map(_is_like, inputs, operands)):
            raise RefusePadding("it was traced with arguments of other sizes")
        known = [self.values[one] if isinstance(one, Node) else () for one in operands]
        inner = Walk(self.sizes, {}, given=dict(zip(inputs, known, strict=True)))
        try:
            found: list[Axes | RefusePadding] = [
                inner._operand(item).axes if isinstance(item, Node) and _is_tensor(item) else ()
                for item in inner._walk(module.graph)
            ]
        except RefusePadding:
            self.node = inner.node
            raise
        return found

    def _cut_as_before(self, node: Node) -> Found | None:
        """Return the rows of what is cut back to where a kernel's alignment begins; ``None`` for other slices."""
        if (whole := alignment.as_before(node)) is not None:
            return self.values[whole]
        if (attention := alignment.attention_of(node)) is not None:
            results = self.values[attention]
            return results[0] if isinstance(results, list) else results
        return None

    def _check_effects(self, node: Node, schema: torch.FunctionSchema) -> None:
        if node.target is torch.ops.aten.copy_.default:
            if node.args[0].op != "placeholder":  # type: ignore[union-attr]
                raise RefusePadding("writes in place into a tensor that is not an input")
            self.wrote = True
        elif schema.is_mutable:
            raise RefusePadding("writes in place")
        elif self.wrote:
            raise RefusePadding("computes after an input was written in place")

    # ---- rules

    def _apply(
        self,
        rule: RegisteredRule,
        node: Node,
        arguments: dict[str, Any],
        makes_rows: bool,
        written: tuple[Any, ...] | None = None,
    ) -> Found:
        """Return what the rule says of each line of rows, put together."""
        edits = self.edits.operands if self.edits is not None else None
        before = len(edits or ())
        call = Call(node, arguments, self.sizes, edits=edits, written=written)
        lines = lines_of(rule, call)
        results = [
            rule.apply(replace(call, arguments=along(arguments, line), line=(i, len(lines))))
            for i, line in enumerate(lines)
        ]
        if makes_rows and not any(isinstance(result, RefusePadding) for result in results):
            claimed = {rows.dim for rows in results if isinstance(rows, Rows)}
            made: list[int | None] = [one.dim for one in row_dims(self._shape(node)) if one.dim not in claimed]
            if not made and not results:
                made = [None]
            hidden = along(arguments, {})
            results += [rule.apply(replace(call, arguments=hidden, made=dim)) for dim in made]
        if len(edits or ()) > before:  # what was known of padded rows is no longer so
            results = [_forget(result) for result in results]
        return together(results)

    def _shape(self, node: Node) -> tuple[sympy.Expr, ...]:
        val = node.meta.get("val")
        return self.sizes.shape(val) if isinstance(val, torch.Tensor) else ()

    # ---- arguments and results

    def _argument(self, argument: object, roles: Iterator[int]) -> object:
        """Return an argument with nodes replaced by what is known of them, and symbolic numbers by sympy's."""
        if isinstance(argument, (list, tuple)):
            return [self._argument(item, roles) for item in argument]
        if isinstance(argument, Mapping):
            return {key: self._argument(item, roles) for key, item in argument.items()}
        if isinstance(argument, Node):
            role = next(roles)
            is_graph = argument.op == "get_attr" and submodule_of(argument) is not None
            return argument if is_graph else self._argument_of(argument, role)
        return self._number(argument) if isinstance(argument, SYMBOLIC) else argument

    def _argument_of(self, node: Node, role: int) -> object:
        val = node.meta.get("val")
        if isinstance(val, SYMBOLIC):
            return self._number(val)
        if isinstance(val, (list, tuple)):
            raise RefusePadding(f"{node.name} is used as a whole")
        if isinstance(self.values[node], RefusePadding) and alignment.reads_rounded(self.node):
            whole = alignment.padded_behind(node)
            return replace(self._operand(whole or node, role), source=None)
        return self._operand(node, role) if _is_tensor(node) else val

    def _number(self, number: object) -> object:
        expr = self.sizes.expr(number)
        return int(expr) if expr.is_Integer else expr  # type: ignore[call-overload]

    def _operand(self, node: Any, role: int = 0) -> Operand:
        val, axes = node.meta.get("val"), self.values[node]
        if isinstance(axes, RefusePadding):
            raise RefusePadding(axes.reason, axes.link)
        if val is None and node.op != "get_attr":
            raise RefusePadding(f"nothing is known of {node.name}")
        if val is None:  # a constant of the graph
            val = getattr(node.graph.owning_module, node.target)
        return Operand(self.sizes.shape(val), val.dtype, None, axes, node, role)  # type: ignore[arg-type]

    def _checked(self, node: Node, value: Found) -> Found:
        """Return ``value``, checked against the shape of the node's result, so that no rule can be wrong there."""
        val = node.meta.get("val")
        if isinstance(value, (list, RefusePadding)) or isinstance(val, (list, tuple, dict)) or val is None:
            return value
        if not isinstance(val, torch.Tensor):
            if depends_on_size(self._number(val)) and not _is_symbolic_size(node):
                raise RefusePadding("a number computed from tensors changes with the padded size")
            return ()
        shape = self.sizes.shape(val)
        claimed = tuple((rows.dim, rows.count, rows.more) for rows in value) if isinstance(value, tuple) else None
        if row_dims(shape) != claimed:
            raise RefusePadding(f"the result's shape changes with the padded size: {shape_text(shape)}")
        return value


def _forget(result: Results) -> Results:
    if isinstance(result, tuple):
        return tuple(replace(rows, holds=Fact.NOTHING) if isinstance(rows, Rows) else rows for rows in result)
    return replace(result, holds=Fact.NOTHING) if isinstance(result, Rows) else result


def _rule_for(target: Any) -> RegisteredRule:
    if (name := operator_name(target)) in RULES:
        return RULES[name]
    if torch.Tag.nondeterministic_seeded in target.tags:
        raise RefusePadding("draws random numbers for the rows")
    if torch.Tag.pointwise in target.tags:
        return _POINTWISE
    raise RefusePadding("no padding rule for this operator")


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Operand) and bool(leaf.axes)


def _is_like(placeholder: Node, operand: Any) -> bool:
    """Return whether what a graph inside was traced with has the sizes of what it is called with."""
    traced = placeholder.meta.get("val")
    value = operand.meta.get("val") if isinstance(operand, Node) else operand
    if isinstance(traced, torch.Tensor):
        same_dtype = isinstance(value, torch.Tensor) and traced.dtype == value.dtype
        return same_dtype and [*map(expr, traced.shape)] == [*map(expr, value.shape)]
    if isinstance(traced, (int, *SYMBOLIC)):
        return isinstance(value, (int, *SYMBOLIC)) and expr(traced) == expr(value)
    return True


def _is_tensor(node: Node) -> bool:
    return node.op == "get_attr" or isinstance(node.meta.get("val"), torch.Tensor)


def _is_symbolic_size(node: Node) -> bool:
    return node.target is operator.getitem or str(node.target).startswith("aten.sym_")
