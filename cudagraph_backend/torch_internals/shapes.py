"""Symbolic sizes: expressions over them, and the guards that a compiled region takes for granted."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis, TensorReferenceAnalysis

from cudagraph_backend.torch_internals.fx import fake_mode_of

#: Functions of sizes, by sympy's names, as the text of an expression has them.
_FUNCTIONS = {
    "FloorDiv": operator.floordiv,
    "Max": lambda *sizes: functools.reduce(torch.sym_max, sizes),
    "Min": lambda *sizes: functools.reduce(torch.sym_min, sizes),
    "Mod": operator.mod,
    "PythonMod": operator.mod,
}

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Shapes:
    """What torch's ``ShapeEnv`` knows of one region's symbols; a thin, read-only face of it."""

    def __init__(self, symints: Sequence[torch.SymInt]):
        self._env = symints[0].node.shape_env if symints else None
        self._symints = list(symints)
        self._symbols = _by_name(symints)  # what Inductor compiles may replace one by another
        self._guards: str | None = None
        self._asserts: list[Any] = []

    def freeze_guards(self) -> bool:
        """Take the guards as they stand; call it after Inductor compiled the region, which adds some.

        Returns false if they can't be told: they name a size of the frame that this region does not receive.
        """
        if self._env is None:
            return True
        asserts = [each.expr for some in self._env.deferred_runtime_asserts.values() for each in some]
        own = frozenset().union(*(expr(size).free_symbols for size in self._symints))
        self._asserts = [each for each in asserts if each.free_symbols & own]
        try:
            self._guards = self._env.produce_guards_expression(placeholders=self._symints)
        except (
            AssertionError,
            IndexError,
        ):  # "sources must not be empty for symbol", or torch 2.11 reads the first one
            return False
        return True

    def upper_bound(self, symbol: sympy.Symbol) -> int | None:
        """Return the largest size of ``symbol``; ``None`` if it has no bound.

        The lengths of a jagged dim are one symbol, which stands for no number and has no range.
        """
        known = self._env.var_to_range.get(symbol)  # type: ignore[union-attr]
        upper = None if known is None else known.upper
        return int(upper) if isinstance(upper, sympy.Integer) and int(upper) < 2**31 else None

    def is_at_least(self, lower: int, symbol: sympy.Symbol) -> bool:
        """Return whether guards hold that ``symbol`` is no smaller than ``lower``; than 0 where it is a size."""
        known = self._env.var_to_range.get(symbol)  # type: ignore[union-attr]
        return known is not None and bool(known.lower >= lower)

    def admits(self, sizes: Sequence[int]) -> bool:
        """Return whether the compiled region is valid for these values of its SymInt inputs, in their order.

        What the code checks while running, of sizes that depend on data, must hold for them, too.
        """
        values = {expr(s): sympy.Integer(n) for s, n in zip(self._symints, sizes, strict=True)}
        return all(each.xreplace(values) == sympy.true for each in self._asserts) and self.are_guarded(sizes)

    def are_guarded(self, sizes: Sequence[int]) -> bool:
        """Return whether these values pass the guards that compiling the region took for granted."""
        if self._guards is None:
            return True
        return bool(self._env.evaluate_guards_expression(self._guards, list(sizes)))  # type: ignore[union-attr]

    def parse(self, expression: str) -> sympy.Expr:
        """Return the expression behind Inductor's text form of it, e.g. ``"8*s77"``."""
        # Not the environment's own deserialize_symexpr, which can't tell the number of a jagged dim's lengths.
        return expr(eval(expression, {**SYMPY_INTERP, **_FUNCTIONS}, self._symbols | _by_name(self._symints)))


def has_lost_guards(graph: torch.fx.Graph) -> bool:
    """Return whether something compiled after Dynamo's guards holds for certain sizes only, which nothing checks.

    A guard is lost once: what is compiled later may rely on it, and loses none. Of backwards, which are always compiled
    after Dynamo's guards, PyTorch takes the risk.
    """
    shape_env = getattr(fake_mode_of(graph), "shape_env", None)
    return shape_env is not None and shape_env.counter["ignored_backward_guard"] > 0


def _by_name(symints: Sequence[torch.SymInt]) -> dict[str, torch.SymInt]:
    return {str(expr(symint)): symint for symint in symints}


def is_jagged_size(value: Any) -> bool:
    """Return whether an int argument stands for the lengths of a jagged dim: it names them, and is no number."""
    # What it was made for is a number where it is one, and another such name where it is not.
    return isinstance(value, torch.SymInt) and isinstance(value.node.hint, torch.SymInt)


def expr(value: Any) -> Any:
    """Return a size, or a number computed from sizes, as a sympy expression over the region's symbols."""
    return value.node.expr if isinstance(value, SYMBOLIC) else sympy.sympify(value)


class _OnTensors(TensorReferenceAnalysis):
    """Operators of size expressions, on tensors of no dims; with those that torch leaves out."""

    def __init__(self, constant: Callable[[bool | int | float], Any]) -> None:
        self._constant = constant

    def constant(self, c: Any, dtype: torch.dtype) -> Any:  # type: ignore[override]
        return self._constant(bool(c) if dtype == torch.bool else int(c) if dtype == torch.int64 else float(c))

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        convert = torch.ops.prims.convert_element_type.default
        return torch.ops.aten.div.Tensor(convert(a, torch.float64), convert(b, torch.float64))

    @staticmethod
    def truediv(a: Any, b: Any) -> Any:
        return torch.ops.aten.div.Tensor(a, b)

    @staticmethod
    def mod(a: Any, b: Any) -> Any:
        return torch.ops.aten.remainder.Tensor(a, b)

    python_mod = mod


def marked_sizes(gm: torch.fx.GraphModule) -> frozenset[sympy.Symbol]:
    """Return the symbols that ``torch._dynamo.mark_dynamic`` has made: they don't depend on the sizes of earlier calls.

    Others are there because calls differed, or may be one symbol for dims that were equal in the first call.
    """
    sizes = _sizes_given(gm)
    inputs = (sizes[0].node.shape_env.tracked_fakes or ()) if sizes else ()
    marked = [
        expr(size)
        for each in inputs
        if isinstance(each.fake, torch.Tensor) and each.symbolic_context is not None
        for size, constraint in zip(each.fake.shape, each.symbolic_context.constraint_sizes, strict=True)
        if constraint is not None and not constraint.warn_only  # with a warning only, it is Dynamo's own
    ]
    return frozenset().union(*(size.free_symbols for size in marked))


def _sizes_given(gm: torch.fx.GraphModule) -> list[torch.SymInt]:
    """Return the symbolic numbers among the inputs of a Dynamo graph, and among their sizes."""
    values = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.layout == torch.strided]
    numbers = [*values, *(size for tensor in tensors for size in tensor.shape)]
    return [number for number in numbers if isinstance(number, torch.SymInt)]


def unify_factors(gm: torch.fx.GraphModule) -> None:
    """Let sizes be one whose products are guarded to be equal, as those of ``[B*S, V]`` logits and ``[B*S]`` labels.

    A product tells nothing of its factors, and they need not be equal. Where they are, one by one, in the call that is
    compiled, a guard says so from now on: other calls are compiled for themselves. Sizes that the user has bounded are
    left alone, as torch raises where a guard narrows what was promised.
    """
    sizes = {expr(n): n for n in _sizes_given(gm) if expr(n).is_Symbol}
    if not sizes:
        return
    env = next(iter(sizes.values())).node.shape_env
    for guard in [guard.expr for guard in env.guards if isinstance(guard.expr, sympy.Eq)]:
        sides = [env.replace(side) for side in guard.args]
        left, right = (_factors(side, sizes) for side in (*_without_common(*sides),))
        for one in left if len(left) == len(right) > 0 else ():
            other = next((each for each in right if sizes[each].node.hint == sizes[one].node.hint), None)
            if other is not None and not _is_bounded(env, one) and env.var_to_range[one] == env.var_to_range[other]:
                right.remove(other)
                bool(sizes[one] == sizes[other])


def _is_bounded(env: Any, symbol: sympy.Symbol) -> bool:
    """Return whether the user has said how large a size may be, for which compiled code must hold."""
    upper = env.var_to_range[symbol].upper
    return isinstance(upper, sympy.Integer) and int(upper) < 2**31


def _without_common(left: sympy.Expr, right: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Return the sides of an equation without what they share: of ``a + b == 2*a``, ``b`` and ``a``."""
    if not left.free_symbols & right.free_symbols:
        return left, right
    terms = sympy.Add.make_args(sympy.expand(left - right))
    negative = [term for term in terms if term.could_extract_minus_sign()]
    return sympy.Add(*(term for term in terms if term not in negative)), -sympy.Add(*negative)


def _factors(side: sympy.Expr, sizes: Mapping[sympy.Symbol, Any]) -> list[sympy.Symbol]:
    """Return the sizes of which ``side`` consists, in the order in which they are read."""
    return [symbol for symbol in sizes if symbol in side.free_symbols]


def tensor_of_sizes(
    expression: sympy.Expr, sizes: Mapping[sympy.Symbol, Any], constant: Callable[[bool | int | float], Any]
) -> Any:
    """Compute ``expression`` from tensors of no dims: int64, or float64 where it is a fraction.

    Raises:
        NotImplementedError: torch has no operator on tensors for it.
    """
    return sympy_interp(_OnTensors(constant), dict(sizes), expression)


def number_of_sizes(expression: sympy.Expr, sizes: Mapping[sympy.Symbol, Any]) -> Any:
    """Compute ``expression`` from numbers, or what stands for them.

    Raises:
        NotImplementedError: there is no operator for it.
    """
    try:
        return sympy_interp(PythonReferenceAnalysis, dict(sizes), expression)
    except TypeError as error:  # math.ceil of a proxy
        raise NotImplementedError(str(error)) from None


def symbols_of(value: Any) -> frozenset[sympy.Symbol]:
    """Return the symbols in a number, or in the layout of a tensor."""
    numbers: list[Any] = [value] if isinstance(value, SYMBOLIC) else []
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        numbers = [*value.shape, *value.stride(), value.storage_offset()]
    return frozenset().union(*(expr(n).free_symbols for n in numbers))


def is_backed(expression: sympy.Expr) -> bool:
    """Return whether every symbol is an input's size; others (``u0``) depend on data, known only while running."""
    from torch.fx.experimental.symbolic_shapes import symbol_is_type
    from torch.utils._sympy.symbol import SymT

    return not any(symbol_is_type(s, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)) for s in expression.free_symbols)
