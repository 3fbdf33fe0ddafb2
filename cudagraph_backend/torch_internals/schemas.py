"""Operators: of what kind they are, and what their schemas tell of their arguments and results."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch

MAKE_TOKEN = torch.ops.prims._make_token.default
"""Makes what orders operators with effects."""

SINK_TOKENS = torch.ops.prims._sink_tokens.default
"""Keeps, at the end of a graph, operators whose effects its tokens stand for."""


def is_registered_operator(name: str) -> bool:
    """Return whether there is an operator of that name, given with or without its overload."""
    packet, _, overload = name.partition(".")
    namespace, _, short = packet.partition("::")
    if namespace == "higher_order":
        return hasattr(torch.ops.higher_order, short)
    schemas = torch._C._jit_get_schemas_for_operator(packet)
    return any(overload in ("", schema.overload_name or "default") for schema in schemas)


def is_operator(target: Any) -> TypeGuard[torch._ops.OpOverload]:
    """Return whether an FX node's target is an overload of an operator (ATen, prims or custom)."""
    return isinstance(target, torch._ops.OpOverload)


def is_higher_order(target: Any) -> bool:
    """Return whether an FX node's target takes graphs as arguments (``torch.cond``, ``scan``, …)."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def bound_arguments(node: torch.fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a higher-order operator by the names that its call gives them."""
    bound = inspect.signature(type(node.target).__call__).bind(None, *args, **kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "self"}


def written_arguments(node: torch.fx.Node, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the operator behind ``auto_functionalized_v2`` is called with, by name.

    That is taken from ``kwargs``, the wrapper's. Returns ``None`` for another wrapper, and where what is changed is
    not, in this order, one whole argument each: a view, two views of one tensor, a list, or an argument that is left
    out.
    """
    if node.target is not torch.ops.higher_order.auto_functionalized_v2 or not is_operator(node.args[0]):
        return None
    arguments: dict[str, Any] = {}
    bases = list(kwargs["_all_bases"])
    for argument in operator_schema(node.args[0]).arguments:
        name = argument.name
        if argument.alias_info is None or not argument.alias_info.is_write:
            arguments[name] = kwargs.get(name, argument.default_value)
            continue
        said = {key: value for key, value in kwargs.items() if key.startswith(f"_{name}_") and value is not None}
        said.pop(f"_{name}_alias", None)
        index = sum(1 for other in operator_schema(node.args[0]).arguments[: len(arguments)] if _is_written(other))
        if said != {f"_{name}_base_index": index} or index >= len(bases):
            return None
        arguments[name] = bases[index]
    return arguments if sum(map(_is_written, operator_schema(node.args[0]).arguments)) == len(bases) else None


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def calls_its_graph(target: torch._ops.HigherOrderOperator) -> bool:
    """Return whether a higher-order operator is of those that do no more than call the graph they are given."""
    return any(base.__name__ == "BaseHOP" for base in type(target).__mro__)


def operator_name(target: torch._ops.OpOverload) -> str:
    """Return the name with namespace and overload: ``aten::sum.dim_IntList``."""
    return target.name()


def operator_schema(target: torch._ops.OpOverload) -> torch.FunctionSchema:
    return target._schema


def returns_view(target: torch._ops.OpOverload) -> bool:
    """Return whether an operator returns views of an argument, and writes to none."""
    returns = target._schema.returns
    return not target._schema.is_mutable and any(r.alias_info is not None for r in returns)
