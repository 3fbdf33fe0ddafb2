"""Adds operators to a copy of a graph, and one input, the number of real rows, from which sizes reach values.

A captured graph can't be given a number, so what is computed from a padded size is computed from a tensor without dims.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import sympy
import torch
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from cudagraph_backend.torch_internals import expr, fake_mode_of, number_of_sizes, tensor_of_sizes

from .lattice import RefusePadding

aten, prims = torch.ops.aten, torch.ops.prims
T = TypeVar("T")


def copied(graph: Graph) -> GraphModule:
    """Return a copy of ``graph`` that may be changed; values are shared."""
    copy = Graph()
    copy.output(copy.graph_copy(graph, {}))
    last, output = (next(iter(reversed(one.nodes))) for one in (graph, copy))
    output.meta = dict(last.meta)
    return GraphModule(graph.owning_module or torch.nn.Module(), copy)


class Editor(GraphAppendingTracer):
    """Adds operators to ``graph``, in which the dim of ``symbols`` is to be padded.

    Operators are called on proxies, as when tracing, and every node that is made gets its value.

    Attributes:
        counts: the number of real rows by symbol, int64 without dims; they become the graph's last inputs. Symbols
            that are padded together may differ in calls that are not padded.
        made: the nodes that were made, in order.
    """

    def __init__(self, graph: Graph, symbols: frozenset[sympy.Symbol]) -> None:
        super().__init__(graph)
        self.made: list[Node] = []
        self.fake = fake_mode_of(graph)
        self._found = _sizes_of_inputs(graph)
        self._shared: dict[Hashable, Any] = {}
        last = graph.find_nodes(op="placeholder")[-1]
        self.counts: dict[sympy.Symbol, Proxy] = {}
        for symbol in sorted(symbols, key=str):
            with graph.inserting_after(last):
                last = graph.placeholder(f"rows_{symbol}_{len(graph.find_nodes(op='placeholder'))}")
            with self.fake:
                last.meta["val"] = torch.empty((), dtype=torch.int64, device=self.device)
            self.counts[symbol] = Proxy(last, self)
        with graph.inserting_after(last):
            self._front_end = graph.call_function(operator.pos, (0,))  # taken out when all is done
        self._front_end.meta["val"] = 0

    @functools.cached_property
    def device(self) -> torch.device:
        """Where constants and counts are made; found when the first one is."""
        return _device(self.graph)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *names: Any, **options: Any) -> Node:
        """Make a node at the place where the graph is edited, with its value."""
        node = super().create_node(kind, target, args, kwargs, *names, **options)
        with self.fake:
            node.meta["val"] = target(*values(args), **values(kwargs))
        self.made.append(node)
        return node

    def __call__(self, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Add an operator of which no argument need be a proxy."""
        return self.create_proxy("call_function", target, args, kwargs)

    @contextmanager
    def before(self, node: Node) -> Iterator[None]:
        """Add in front of ``node``; what is made belongs to the user's line that made ``node``."""
        start = len(self.made)
        with self.graph.inserting_before(node):
            yield
        for made in self.made[start:]:
            made.meta.setdefault("stack_trace", node.meta.get("stack_trace"))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what several edits read, made at the front of the graph."""
        if key not in self._shared:
            with self.graph.inserting_before(self._front_end):
                self._shared[key] = make()
        found: T = self._shared[key]
        return found

    def finish(self) -> None:
        """End editing: nothing can be made at the front any more, and counts that nothing reads are no inputs."""
        self.graph.erase_node(self._front_end)
        for symbol in [symbol for symbol, count in self.counts.items() if not count.node.users]:
            self.graph.erase_node(self.counts.pop(symbol).node)

    def plain(self, size: sympy.Expr) -> Any:
        """Return a size as the graph has it, padded or not: a number, or what computes it from the inputs' sizes.

        Raises:
            RefusePadding: no input has it.
        """
        if size.is_Integer:
            return int(size)
        if any(not number.is_Integer for number in size.atoms(sympy.Number)):
            raise RefusePadding(f"a mask needs the size {size}")
        try:
            return number_of_sizes(size, {symbol: self._plain(symbol) for symbol in size.free_symbols})
        except NotImplementedError:
            raise RefusePadding(f"a mask needs the size {size}") from None

    def _plain(self, symbol: sympy.Symbol) -> Any:
        if symbol not in self._found:
            raise RefusePadding(f"no input has the size {symbol}, which a mask needs")
        node, dim = self._found[symbol]
        return Proxy(node, self) if dim is None else self(aten.sym_size.int, Proxy(node, self), dim)

    def counted(self, size: sympy.Expr, dtype: torch.dtype = torch.int64) -> Proxy:
        """Return what ``size`` is at the real sizes, as a tensor without dims."""
        return self.once(("counted", size, dtype), lambda: convert(self._counted(size), dtype))

    def _counted(self, size: sympy.Expr) -> Proxy:
        sizes = {
            symbol: self.counts[symbol] if symbol in self.counts else self.constant(self.plain(symbol), torch.int64)
            for symbol in size.free_symbols
        }
        try:
            tensor: Proxy = tensor_of_sizes(size, sizes, self.constant)
        except NotImplementedError:
            raise RefusePadding(f"the padded size reaches values as {size}") from None
        return tensor

    def constant(self, number: Any, dtype: torch.dtype | None = None, shape: Sequence[sympy.Expr] = ()) -> Proxy:
        """Return a tensor of ``shape``, without dims if none is given, that holds a number."""
        if dtype is None:
            dtype = {bool: torch.bool, int: torch.int64, float: torch.float64}[type(number)]
        size = [self.plain(each) for each in shape]
        made: Proxy = self(aten.full.default, size, number, dtype=dtype, device=self.device, pin_memory=False)
        return made

    def entries(self, size: Any) -> Proxy:
        """Return 0, 1, 2, … below ``size``."""
        options = {"start": 0, "step": 1, "dtype": torch.int64, "device": self.device, "requires_grad": False}
        made: Proxy = self(prims.iota.default, size, **options)
        return made


def value(proxy: Any) -> Any:
    """Return what is known of a proxy's result."""
    return proxy.node.meta["val"]


def convert(tensor: Proxy, dtype: torch.dtype) -> Proxy:
    """Return ``tensor`` as ``dtype``."""
    return tensor if value(tensor).dtype == dtype else prims.convert_element_type.default(tensor, dtype)


def values(argument: Any) -> Any:
    """Return arguments with nodes replaced by their values."""
    return torch.fx.map_arg(argument, lambda node: node.meta["val"])


def _device(graph: Graph) -> torch.device:
    tensors: Sequence[Any] = [node.meta.get("val") for node in graph.nodes]
    devices = [tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return next((device for device in devices if device.type not in ("cpu", "meta")), torch.device("cpu"))


def _sizes_of_inputs(graph: Graph) -> dict[sympy.Symbol, tuple[Node, int | None]]:
    """Return where a graph's sizes are found: in a number, or in a dim of a tensor, among its inputs."""
    found: dict[sympy.Symbol, tuple[Node, int | None]] = {}
    for node in graph.find_nodes(op="placeholder"):
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt):
            found[expr(val)] = (node, None)
        for dim, size in enumerate(val.shape if isinstance(val, torch.Tensor) else ()):
            found.setdefault(expr(size), (node, dim))
    return {size: place for size, place in found.items() if size.is_Symbol}
