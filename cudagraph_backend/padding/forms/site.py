"""How a form sees the operator that it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx import Node, Proxy, map_arg

from cudagraph_backend.torch_internals import expr, operator_schema

from ..editor import Editor, value


@dataclass(frozen=True, slots=True)
class Site:
    """The operator that is to be written anew: its arguments by their schema names, nodes as proxies."""

    node: Node
    editor: Editor
    arguments: Mapping[str, Any]

    @staticmethod
    def of(node: Node, editor: Editor) -> Site:
        """Read the arguments of ``node``; those that it leaves out have their defaults."""
        schema = operator_schema(node.target)  # type: ignore[arg-type]
        arguments = {argument.name: argument.default_value for argument in schema.arguments}
        args, kwargs = map_arg((node.args, node.kwargs), lambda read: Proxy(read, editor))
        arguments.update(zip(arguments, args, strict=False))
        return Site(node, editor, {**arguments, **kwargs})

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def target(self) -> Any:
        """The operator."""
        return self.node.target

    @property
    def val(self) -> Any:
        """What tracing knows of the result, or of several."""
        return self.node.meta["val"]

    def size(self, tensor: Proxy, dim: int) -> sympy.Expr:
        """Return a size of ``tensor``, over the symbols of the region."""
        return expr(value(tensor).shape[dim])

    def number(self, name: str) -> sympy.Expr:
        """Return an argument that is a size, over the symbols of the region."""
        given = self[name]
        return expr(value(given)) if isinstance(given, Proxy) else sympy.Integer(given)

    def dims(self, tensor: Proxy, dims: Sequence[int] | int | None) -> list[int]:
        """Return ``dims`` counted from the front: all of them if none is named."""
        ndim = value(tensor).ndim
        named = [dims] if isinstance(dims, int) else list(dims or range(ndim))
        return [dim % ndim for dim in named] if ndim else []
