"""Masks: operators put into a graph so that padded rows hold what a rule needs of them.

A sum over rows is exact if the padded ones are zero, a maximum if they are minus infinity, a look-up if they are valid
indices. Where nothing shows that they are, the operand is replaced by ``where(row < n, operand, filling)``. ``n``, the
number of real rows, is an input of the graph (a tensor, as a captured graph can't take a number). Inductor fuses the
mask with what makes or reads the operand. At the exact size a mask changes nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from itertools import count
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from cudagraph_backend.torch_internals import expr, fake_mode_of

from .call import Mask
from .lattice import Filling, Rows, in_order

aten, prims = torch.ops.aten, torch.ops.prims


def insert(module: GraphModule, masks: Sequence[Mask], name: str) -> None:
    """Give the module's graph a last input ``name``, the number of real rows (int64, no dims), and the masks."""
    masking = _Masking(module.graph, masks[0].source.meta["val"].device, name)
    for mask in masks:
        masking.mask(mask)
    module.recompile()


def lacking(graph: Graph, masks: Sequence[Mask]) -> frozenset[sympy.Symbol]:
    """Return the symbols that the masks need and no input of the graph has as a size."""
    symbols: frozenset[sympy.Symbol] = frozenset()
    for mask in masks:
        symbols = symbols.union(expr(mask.source.meta["val"].shape[mask.rows.dim]).free_symbols)
    return symbols - _symbols(graph).keys()


class _Masking:
    """Puts masks into one graph, each right after the operand it masks."""

    def __init__(self, graph: Graph, device: torch.device, name: str):
        self._graph = graph
        self._device = device
        self._symbols = _symbols(graph)
        self._fake = fake_mode_of(graph)
        self._made: dict[tuple[Node, Rows, Filling], Node] = {}
        self._shared: dict[Hashable, Node] = {}
        last = graph.find_nodes(op="placeholder")[-1]
        self._first = last.next
        with graph.inserting_after(last):
            self._count = graph.placeholder(name)
        with self._fake:
            self._count.meta["val"] = torch.empty((), dtype=torch.int64, device=device)

    def mask(self, mask: Mask) -> None:
        """Let ``mask.user`` read the masked operand in that role; no other node does."""
        operand = _in_role(mask.user, mask.role)
        key = (operand, mask.rows, mask.filling)
        if key not in self._made:
            before = self._first if operand.op == "placeholder" else operand.next
            with self._graph.inserting_before(before):
                self._made[key] = self._masked(operand, in_order(mask.rows), mask.filling)
                self._made[key].meta["stack_trace"] = mask.user.meta.get("stack_trace")
        _put_in_role(mask.user, mask.role, self._made[key])

    def _masked(self, operand: Node, rows: Rows, filling: Filling) -> Node:
        val = operand.meta["val"]
        size = expr(val.shape[rows.dim])
        if filling == "last":
            index = self._once(("index", size, rows.extra), lambda: self._kept_real(size, rows))
            return self._add(aten.index.Tensor, operand, [*[None] * rows.dim, index])
        behind = val.ndim - 1 - rows.dim
        key = ("is real", size, rows.per, rows.blocks, rows.extra, behind)
        is_real = self._once(key, lambda: self._is_real(size, rows, behind))
        number = _number(filling, val.dtype)
        other = self._once(("filling", filling, val.dtype), lambda: self._scalar(number, val.dtype))
        return self._add(aten.where.self, is_real, operand, other)

    def _once(self, key: Hashable, make: Callable[[], Node]) -> Node:
        """Return a node at the front of the graph that several masks read."""
        if key not in self._shared:
            with self._graph.inserting_before(self._first):
                self._shared[key] = make()
        return self._shared[key]

    def _is_real(self, size: sympy.Expr, rows: Rows, behind: int) -> Node:
        """Return which entries of a dim of ``size`` are real, with ``behind`` more dims to be broadcast over."""
        entry = self._entries(size)
        if rows.blocks != 1:
            entry = self._add(aten.remainder.Scalar, entry, self._number((size / rows.blocks).cancel().expand()))
        is_real = self._add(aten.lt.Tensor, entry, self._end(rows))
        return self._add(aten.view.default, is_real, [-1] + [1] * behind)

    def _kept_real(self, size: sympy.Expr, rows: Rows) -> Node:
        """Compute for each entry of a dim its own number, and for padded ones that of the last real entry."""
        last = self._add(aten.sub.Tensor, self._end(rows), 1)
        return self._add(aten.minimum.default, self._entries(size), last)

    def _entries(self, size: sympy.Expr) -> Node:
        options = {"start": 0, "step": 1, "dtype": torch.int64, "device": self._device, "requires_grad": False}
        return self._add(prims.iota.default, self._number(size), **options)

    def _scalar(self, number: bool | int | float, dtype: torch.dtype) -> Node:
        return self._add(aten.full.default, [], number, dtype=dtype, device=self._device, pin_memory=False)

    def _end(self, rows: Rows) -> Node:
        """Return the number of real entries of a block."""
        end = self._count if rows.per == 1 else self._add(aten.mul.Tensor, self._count, self._number(rows.per))
        return end if rows.extra == 0 else self._add(aten.add.Tensor, end, self._number(rows.extra))

    def _number(self, size: sympy.Expr) -> Any:
        """Return a size, as a number or a node that computes it from the graph's sizes."""
        if size.is_Integer:
            return int(size)
        if size.is_Symbol:
            found = self._symbols[size]
            return found[0] if found[1] is None else self._add(aten.sym_size.int, *found)
        combine = operator.add if size.is_Add else operator.mul
        first, *rest = (size.args[0],) * int(size.args[1]) if size.is_Pow else size.args
        number = self._number(first)
        for part in rest:
            number = self._add(combine, number, self._number(part))
        return number

    def _add(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self._graph.call_function(target, args, kwargs)
        with self._fake:
            node.meta["val"] = target(*_values(args), **kwargs)
        return node


def _in_role(user: Node, role: int) -> Node:
    read: list[Node] = []
    map_arg((user.args, user.kwargs), read.append)
    return read[role]


def _put_in_role(user: Node, role: int, operand: Node) -> None:
    roles = count()
    user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda node: operand if next(roles) == role else node)


def _values(args: Any) -> Any:
    if isinstance(args, (list, tuple)):
        return type(args)(map(_values, args))
    return args.meta["val"] if isinstance(args, Node) else args


def _number(filling: Filling, dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return filling in (1, "highest")
    if filling not in ("lowest", "highest"):
        return filling  # type: ignore[return-value]
    if dtype.is_floating_point:
        return float("-inf" if filling == "lowest" else "inf")
    limits = torch.iinfo(dtype)
    return limits.min if filling == "lowest" else limits.max


def _symbols(graph: Graph) -> dict[sympy.Symbol, tuple[Node, int | None]]:
    """Return where a graph's sizes are found: in a number, or in a dim of a tensor, among its inputs."""
    found: dict[sympy.Symbol, tuple[Node, int | None]] = {}
    for node in graph.find_nodes(op="placeholder"):
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt):
            found[expr(val)] = (node, None)
        for dim, size in enumerate(val.shape if isinstance(val, torch.Tensor) else ()):
            found.setdefault(expr(size), (node, dim))
    return {size: place for size, place in found.items() if size.is_Symbol}
