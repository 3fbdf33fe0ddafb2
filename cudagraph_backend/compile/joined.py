"""Joined dims, as in ``[batch * length, features]``: taken apart where a graph begins and ends.

With the length padded, padded rows lie between real ones there, and no strides lead over them. ``[batch, length,
features]`` holds the same entries, and its real ones are a view. So what a forward saves for its backward is handed on
taken apart, and so are arguments and results of a region: arguments are viewed so before a call, results are joined
after it, which copies where rows are padded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Graph, GraphModule, Node, Proxy

from cudagraph_backend.compile.inputs import size_inputs
from cudagraph_backend.padding.alignment import ROUNDED_TO, is_rounded, padded_behind
from cudagraph_backend.padding.editor import Editor, value
from cudagraph_backend.padding.lattice import RefusePadding
from cudagraph_backend.region import SizeInput, evaluate_all
from cudagraph_backend.torch_internals import dispatch_to_proxies, expr, mark_visible, same_storage, visible_outputs

aten = torch.ops.aten

_SIZES_REMEMBERED = 1024  # combinations, whose shapes are not computed again

_VIEWS = (aten.view.default, aten.reshape.default)

#: The dims that a joined dim is made of, by its size.
Parts: TypeAlias = "dict[sympy.Expr, tuple[sympy.Expr, ...]]"


def save_apart(forward: GraphModule, backward: GraphModule, returned: int) -> None:
    """Let ``forward`` hand to ``backward`` what it saves, behind what is ``returned``, with joined dims taken apart."""
    parts = parts_of([forward.graph, backward.graph])
    output = forward.graph.output_node()
    read = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    results = list(output.args[0])  # type: ignore[arg-type]
    for i, node in enumerate(results[returned:], start=returned):
        reader = read.get(node.name) if isinstance(node, Node) and node.op == "call_function" else None
        if reader is None or _shape(reader) != _shape(node) or node in results[:returned]:
            continue  # what is also returned is one tensor, so that autograd knows when it was changed
        if _is_rounded_up(node):
            whole = padded_behind(node) or _cut(forward.graph, node, before=output)
            if whole.op == "call_function":
                results[i] = whole
                _round_up(backward.graph, reader, node, whole)
        elif (shape := _apart(node, parts)) is not None:
            made = _viewed(forward.graph, node, shape, before=output)
            if made is not None and _take_argument_apart(backward.graph, reader, made.meta["val"]):
                results[i] = made
    if results == list(output.args[0]):  # type: ignore[arg-type]
        return
    output.args = (type(output.args[0])(results),)  # type: ignore[operator, assignment]
    forward.recompile()
    backward.recompile()


@dataclass(frozen=True, slots=True)
class Joined:
    """The arguments and results of a region that its graph has taken apart.

    Attributes:
        arguments: their shapes in the graph, by index.
        results: the first and the last of the dims that are joined, one pair after the other, by index.
        again: where a joined result is returned once more, and which one. It must be one tensor: if it is also saved,
            only so does autograd know when it was changed.
        sizes: where the sizes in the arguments' shapes are read, by symbol.
    """

    arguments: Mapping[int, tuple[sympy.Expr, ...]]
    results: Mapping[int, tuple[tuple[int, int], ...]]
    again: Mapping[int, int]
    sizes: Mapping[sympy.Symbol, SizeInput]

    def __bool__(self) -> bool:
        return bool(self.arguments or self.results)

    def around(self, call: Callable[[list[Any]], Sequence[Any]]) -> Callable[[list[Any]], Sequence[Any]]:
        """Return a call that takes and returns what is joined."""
        reads = [*self.sizes.values()]
        shapes_at = functools.lru_cache(_SIZES_REMEMBERED)(self._shapes_at)

        def call_apart(args: list[Any]) -> Sequence[Any]:
            for index, shape in shapes_at(tuple([read.read(args) for read in reads])):
                args[index] = args[index].view(shape)
            results = list(call(args))
            for index, dims in self.results.items():
                results[index] = _joined(results[index], dims)
            for index, first in self.again.items():
                results[index] = results[first]
            return results

        return call_apart

    def _shapes_at(self, sizes: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
        values = dict(zip(self.sizes, sizes, strict=True))
        return [(index, evaluate_all(shape, values)) for index, shape in self.arguments.items()]


def _joined(result: torch.Tensor, dims: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Return a result with dims joined, on the same memory where that can be: but it is no view of anything.

    AOTAutograd makes views itself, and autograd lets nobody write to those that it does not know.
    """
    joined = result
    for first, last in dims:
        joined = joined.flatten(first, last)
    if joined.untyped_storage()._cdata != result.untyped_storage()._cdata:
        return joined
    return same_storage(result, joined.shape, joined.stride(), int(joined.storage_offset()))


def take_apart(module: GraphModule, example_inputs: Sequence[Any]) -> Joined:
    """Take joined dims of arguments and results apart in the graph of ``module``."""
    graph, parts = module.graph, parts_of([module.graph])
    inputs = graph.find_nodes(op="placeholder")
    found = {size.size: size for size in size_inputs(example_inputs) if isinstance(size.size, sympy.Symbol)}
    arguments: dict[int, tuple[sympy.Expr, ...]] = {}
    results: dict[int, tuple[tuple[int, int], ...]] = {}
    again: dict[int, int] = {}
    written = {node.args[0] for node in graph.find_nodes(op="call_function", target=aten.copy_.default)}
    output = graph.output_node()
    handed_out: list[Any] = [*output.args[0]]  # type: ignore[misc]
    for index, node in enumerate(inputs):
        shape = _apart(node, parts) if node not in written and node not in handed_out else None
        if shape is None or any(size.free_symbols - found.keys() for size in shape):
            continue
        with_parts = _fake_view(graph, node, shape)
        if with_parts is not None and _take_argument_apart(graph, node, with_parts):
            arguments[index] = shape
    for node in dict.fromkeys(handed_out):
        shape = _apart(node, parts) if isinstance(node, Node) and node.op == "call_function" else None
        if shape is None or not node.meta["val"].is_contiguous():
            continue
        dims = _joined_dims(_shape(node), _known_parts(node, parts))
        made = _viewed(graph, node, shape, before=output)
        if made is not None:
            first, *more = [index for index, one in enumerate(handed_out) if one is node]
            results[first] = dims
            again.update(dict.fromkeys(more, first))
            handed_out[first] = made
            for index in more:
                handed_out[index] = None
    if results:
        output.args = (type(output.args[0])(handed_out),)  # type: ignore[operator, assignment]
        mark_visible(graph, sorted({*visible_outputs(graph), *results}))
    if results or arguments:
        module.recompile()
    needed = frozenset().union(*(size.free_symbols for shape in arguments.values() for size in shape))
    return Joined(arguments, results, again, {symbol: found[symbol] for symbol in sorted(needed, key=str)})


def parts_of(graphs: Iterable[Graph]) -> Parts:
    """Return what the graphs show of joined dims, at least two of them dynamic, by the product of their sizes."""
    parts = _parts_in(node for graph in graphs for node in graph.nodes)
    return {product: run for product, run in parts.items() if len(product.free_symbols) > 1}


def _parts_in(nodes: Iterable[Node]) -> Parts:
    """Return dims that lie side by side in a tensor, by the product of their sizes.

    Where those whose first dim is the only dynamic one could be meant, these: they can stay joined.
    """
    runs: dict[tuple[sympy.Expr, ...], None] = {}
    for shape in dict.fromkeys(map(_shape, nodes)):
        for first, last in combinations(range(len(shape) + 1), 2):
            run = shape[first:last]
            if len(run) > 1 and 1 not in run and any(size.free_symbols for size in run):
                runs[run] = None
    parts: Parts = {}
    for run in sorted(runs, key=lambda run: not _can_stay_joined(run)):
        if all(len(size.free_symbols) <= 1 for size in run):
            parts.setdefault(sympy.expand(sympy.Mul(*run)), run)
    return {product: run for product, run in parts.items() if not _can_stay_joined(run)}


def _can_stay_joined(run: Sequence[sympy.Expr]) -> bool:
    return bool(run[0].free_symbols) and not any(size.free_symbols for size in run[1:])


def _shape(node: Node) -> tuple[sympy.Expr, ...]:
    val = node.meta.get("val")
    return tuple(sympy.expand(expr(size)) for size in val.shape) if isinstance(val, torch.Tensor) else ()


def _apart(node: Any, parts: Parts) -> tuple[sympy.Expr, ...] | None:
    """Return the shape of a tensor with its joined dims taken apart; ``None`` if it has none."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.layout != torch.strided:
        return None
    shape, parts = _shape(node), _known_parts(node, parts)
    apart = tuple(part for size in shape for part in _parts(size, parts))
    return apart if len(apart) > len(shape) else None


def _known_parts(node: Node, parts: Parts) -> Parts:
    """Return ``parts``, and what is known of those of ``node``: it is a view of them, or they are views of it."""
    around = [read for read in node.all_input_nodes if node.target in _VIEWS]
    return {**parts, **_parts_in([*around, *(user for user in node.users if user.target in _VIEWS)])}


def _parts(size: sympy.Expr, parts: Parts) -> tuple[sympy.Expr, ...]:
    return parts.get(size, (size,)) if size.free_symbols else (size,)


def _joined_dims(shape: Sequence[sympy.Expr], parts: Parts) -> tuple[tuple[int, int], ...]:
    """Return which dims to join, one joined dim after the other, as they are numbered by then."""
    widths = [len(_parts(size, parts)) for size in shape]
    return tuple((dim, dim + width - 1) for dim, width in enumerate(widths) if width > 1)


def _viewed(graph: Graph, node: Node, shape: Sequence[sympy.Expr], before: Node) -> Node | None:
    editor = Editor(graph, frozenset())
    try:
        with dispatch_to_proxies(), editor.before(before):
            made: Proxy = editor(aten.view.default, Proxy(node, editor), [editor.plain(size) for size in shape])
    except (RefusePadding, RuntimeError, ValueError):  # a size is not known here, or no view has this shape
        return None
    finally:
        editor.finish()
    return made.node


def _fake_view(graph: Graph, node: Node, shape: Sequence[sympy.Expr]) -> Any:
    """Return what a graph would know of ``node`` in another shape."""
    editor = Editor(graph, frozenset())
    try:
        with dispatch_to_proxies(), editor.before(next(iter(node.users), graph.output_node())):
            sizes = [value(size) if isinstance(size, Proxy) else size for size in map(editor.plain, shape)]
            with editor.fake:
                return node.meta["val"].view(sizes)
    except (RefusePadding, RuntimeError, ValueError):
        return None
    finally:
        editor.finish()


def _take_argument_apart(graph: Graph, node: Node, apart: torch.Tensor) -> bool:
    """Let an input of ``graph`` have the shape of ``apart``; what reads it gets it joined."""
    joined, users = node.meta["val"], list(node.users)
    shape = _shape(node)
    node.meta["val"] = apart
    made = _viewed(graph, node, shape, before=_next(node))
    if made is None:
        node.meta["val"] = joined
        return False
    for user in users:
        user.replace_input_with(node, made)
    node.meta.pop("tensor_meta", None)
    return True


def _is_rounded_up(node: Node) -> bool:
    """Return whether a kernel's alignment has made a size of a node what follows from no dim's by sums and products."""
    sizes = [size for size in _shape(node) if size.free_symbols and not size.is_polynomial()]
    return bool(sizes) and (is_rounded(node) or padded_behind(node) is not None)


def _cut(graph: Graph, node: Node, before: Node) -> Node:
    """Cut off what is behind the entries of an attention's queries."""
    editor = Editor(graph, frozenset())
    queries: Any = node.args[0].args[0]  # type: ignore[union-attr]
    with dispatch_to_proxies(), editor.before(before):
        many = editor(aten.sym_size.int, Proxy(queries, editor), 2)
        made = editor(aten.slice.Tensor, Proxy(node, editor), 2, 0, many)
    editor.finish()
    return made.node  # type: ignore[no-any-return]


def _round_up(graph: Graph, node: Node, rounded: Node, whole: Node) -> None:
    """Let an input of ``graph`` be what was saved, ``whole``; what reads it gets it ``rounded`` up, as it was."""
    users = list(node.users)
    node.meta["val"] = whole.meta["val"]
    node.meta.pop("tensor_meta", None)
    editor = Editor(graph, frozenset())
    filling = float("inf") if is_rounded(rounded) else rounded.args[2] if len(rounded.args) > 2 else 0
    pads: list[Any] = []
    with dispatch_to_proxies(), editor.before(_next(node)):
        for before, after in reversed([*zip(_shape(whole), _shape(rounded), strict=True)]):
            many = editor.plain(before)
            up = (many + (ROUNDED_TO - 1)) // ROUNDED_TO * ROUNDED_TO if is_rounded(rounded) else editor.plain(after)
            pads += [0, up - many if before != after else 0]
        made = editor(aten.constant_pad_nd.default, Proxy(node, editor), pads, filling)
    editor.finish()
    for user in users:
        user.replace_input_with(node, made.node)


def _next(node: Node) -> Node:
    """Return the first node behind the inputs."""
    while node.op == "placeholder":
        node = node.next
    return node
