"""Parts: a region with operators that can't be captured, cut around them into graphs of their own."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from cudagraph_backend.compile.capturable import op_refusal, symbols_in, symbols_made
from cudagraph_backend.compile.inputs import input_refusals, size_inputs
from cudagraph_backend.compile.levels import CONSTANTS, CannotSplit, Flow, parts_of
from cudagraph_backend.errors import Refusal
from cudagraph_backend.graph.operators import has_token, is_token, read_by, targets_of
from cudagraph_backend.graph.source import source_line
from cudagraph_backend.region import Wiring
from cudagraph_backend.torch_internals import (
    MAKE_TOKEN,
    SINK_TOKENS,
    SYMBOLIC,
    expr,
    mark_visible,
    module_of,
    visible_outputs,
)

Value: TypeAlias = "Node | sympy.Symbol"
"""What parts read: an input or result of the region's graph, or a size that is read from one of its arguments."""

_NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Part:
    """A graph of its own, and fake arguments for it.

    ``reads`` and ``makes`` number the values that it takes and returns (see ``Wiring``). ``refusal`` is why the part
    can't be captured.
    """

    module: GraphModule
    examples: tuple[Any, ...]
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    refusal: Refusal | None


@dataclass(frozen=True, slots=True)
class Split:
    """A region as parts, in the order in which they run, and how values go between them."""

    parts: tuple[Part, ...]
    wiring: Wiring

    def is_read(self, value: int) -> bool:
        """Return whether a part reads a value."""
        return any(value in reads for reads in self.wiring.reads)


def split(
    module: GraphModule,
    example_inputs: Sequence[Any],
    device: torch.device,
    unsafe: Collection[str] = (),
    failed: Mapping[str, str] = _NOTHING,
) -> Split | None:
    """Return the parts of a region that is captured on ``device``; ``None`` if nothing, or all of it, can be captured.

    ``unsafe`` names operators not to be captured, ``failed`` those whose capture was tried, and why it failed. The
    region's own graph stays as it is.

    Raises:
        CannotSplit: a part would need what it can't be given.
    """
    flow = Flow(module.graph)
    inputs = input_refusals(module.graph, example_inputs)
    judged = (
        (node, op_refusal(node, device, unsafe) or _refused_read(flow, node, inputs) or _failed_before(node, failed))
        for node in module.graph.nodes
    )
    unfit = {node: refusal for node, refusal in judged if refusal is not None}
    refused = {node: unfit[node] for node in flow.operators if node in unfit}
    part_of = parts_of(flow, refused)
    count = 1 + max(part_of.values(), default=-1)
    refusals = [next((r for node, r in refused.items() if part_of[node] == i), None) for i in range(count)]
    if not refused:  # but a returned constant on the CPU gets an uncaptured part at the end
        results = module.graph.output_node().all_input_nodes
        refusals += [unfit[node] for node in results if node in unfit and flow.is_repeated(node)][:1]
    if all(refusals) or not any(refusals):
        return None
    return _Cutter(module, example_inputs, flow, part_of, refusals, unfit).split()


def _failed_before(node: Node, failed: Mapping[str, str]) -> Refusal | None:
    """Return why a node can't be captured, for one of the operators that it runs."""
    found = next((name for name in map(str, targets_of(node)) if name in failed), None)
    return None if found is None else Refusal(f"its capture failed: {failed[found]}", found, source_line(node))


def _refused_read(flow: Flow, node: Node, inputs: Mapping[Node, Refusal]) -> Refusal | None:
    """Return why an operator can't be captured for what it reads, through views or not."""
    return next((inputs[read] for read in flow.reads[node] if read in inputs), None)


class _Cutter:
    """Makes a graph of each part, and numbers the values that go between them."""

    def __init__(
        self,
        module: GraphModule,
        example_inputs: Sequence[Any],
        flow: Flow,
        part_of: Mapping[Node, int],
        refusals: Sequence[Refusal | None],
        unfit: Collection[Node],
    ):
        self._module = module
        self._unfit = unfit
        self._flow = flow
        self._refusals = refusals
        self._nodes = [node for node in module.graph.nodes if node.op != "output"]
        self._results = module.graph.output_node().args[0]
        self._returned = {value for value in self._results if isinstance(value, Node)}
        self._part_of = {**part_of, **dict(self._repeated_results(part_of))}
        self._sizes = tuple(s for s in size_inputs(example_inputs) if s.dim is not None)
        self._size_values = {s.size: example_inputs[s.index].shape[s.dim] for s in self._sizes}
        self._given = dict(zip(module.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        self._givers = {expr(n.meta["val"]): n for n in reversed(self._nodes) if self._gives_symbol(n)}
        self._inside = [self._nodes_inside(index) for index in range(len(refusals))]
        self._reads = [self._values_read(index) for index in range(len(refusals))]
        self._read = {value for values in self._reads for value in values}

    def split(self) -> Split:
        values = [*self._module.graph.find_nodes(op="placeholder"), *(s.size for s in self._sizes)]
        constants = [value for value in self._results if not isinstance(value, Node)]
        slots: dict[Any, int] = {value: slot for slot, value in enumerate(values)}
        first_constant = len(values)
        count = first_constant + len(constants)
        parts = []
        for index, refusal in enumerate(self._refusals):
            made = [node for node in self._inside[index] if self._is_made(node, index)]
            slots.update(zip(made, range(count, count + len(made)), strict=True))
            count += len(made)
            reads, makes = (tuple(slots[value] for value in some) for some in (self._reads[index], made))
            parts.append(Part(self._graph(index, made), self._examples(index), reads, makes, refusal))
        numbers = iter(range(first_constant, first_constant + len(constants)))
        results = tuple(slots[r] if isinstance(r, Node) else next(numbers) for r in self._results)
        all_reads, all_makes = tuple(part.reads for part in parts), tuple(part.makes for part in parts)
        return Split(tuple(parts), Wiring(self._sizes, tuple(constants), all_reads, all_makes, results))

    def _repeated_results(self, part_of: Mapping[Node, int]) -> Iterator[tuple[Node, int]]:
        """Yield each returned view or size with the part to compute it: where what it reads is made, or the last.

        No graph can have a view of what only the CPU can read, for one.
        """
        last = len(self._refusals) - 1
        last_uncaptured = max(index for index, refusal in enumerate(self._refusals) if refusal is not None)
        last_captured = max(index for index, refusal in enumerate(self._refusals) if refusal is None)
        for node in self._returned:
            if self._flow.is_repeated(node):
                is_constant = node.target in CONSTANTS  # a view of an argument waits for what is written to it
                otherwise = last_uncaptured if node in self._unfit else last_captured if is_constant else last
                yield node, max((part_of[needed] for needed in self._flow.needs[node]), default=otherwise)

    def _gives_symbol(self, node: Node) -> bool:
        value = node.meta.get("val")
        is_symbol = isinstance(value, SYMBOLIC) and isinstance(expr(value), sympy.Symbol)
        return is_symbol and not self._flow.is_repeated(node)

    def _nodes_inside(self, index: int) -> list[Node]:
        """Return a part's operators and all that it computes on its own for them, in the order of the graph."""
        inside = {node for node, part in self._part_of.items() if part == index}
        waiting = list(inside)
        while waiting:
            for node in read_by(waiting.pop()):
                if self._flow.is_repeated(node) and node not in inside:
                    inside.add(node)
                    waiting.append(node)
        return [node for node in self._nodes if node in inside]

    def _values_read(self, index: int) -> list[Value]:
        """Return what a part is given: sizes whose symbols its values have, then the region's inputs, parts' results.

        Inductor's cache knows the sizes of a call from numbers alone, so each is given as one, if a tensor has it too.
        """
        inside = self._inside[index]
        read = {node for user in inside for node in read_by(user)} - set(inside)
        reads = [node for node in self._nodes if node in read]
        for node in reads:
            if not isinstance(node.meta.get("val"), (torch.Tensor, *SYMBOLIC)) and node.op != "placeholder":
                raise CannotSplit(f"{node} is neither a tensor nor a size")
        made = {symbol for node in inside for symbol in symbols_made(node)}
        numbers = {expr(node.meta["val"]) for node in reads if isinstance(node.meta["val"], SYMBOLIC)}
        needed = {symbol for node in (*inside, *reads) for symbol in symbols_in(node)} - made - numbers
        givers = [self._giver(symbol, index, reads) for symbol in sorted(needed, key=str)]
        return [*(giver for giver in givers if giver is not None), *reads]

    def _giver(self, symbol: sympy.Symbol, index: int, reads: Sequence[Node]) -> Value | None:
        """Return what gives a part a size as a number; ``None`` where only the dims of tensors do."""
        giver = self._givers.get(symbol)
        if giver is not None and self._part_of.get(giver, -1) < index:
            return giver
        if symbol in self._size_values:
            return symbol
        tensors = (node.meta["val"] for node in reads if isinstance(node.meta["val"], torch.Tensor))
        if not any(symbol == expr(size) for tensor in tensors for size in tensor.shape):
            raise CannotSplit(f"nothing gives a part the size {symbol}")
        return None

    def _is_made(self, node: Node, index: int) -> bool:
        """Return whether a part hands on a node inside it."""
        is_own = self._part_of.get(node) == index
        return is_own and (node in self._returned or (node in self._read and not self._flow.is_repeated(node)))

    def _graph(self, index: int, made: Sequence[Node]) -> GraphModule:
        graph = Graph()
        copies: dict[Value, Node] = {}
        for value in self._reads[index]:
            copies[value] = graph.placeholder(str(value.target) if _is_argument(value) else str(value))
            copies[value].meta = self._meta(value)
        for node in self._inside[index]:
            self._make_token(graph, node, copies)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        _sink_tokens(graph)
        graph.output(tuple(copies[node] for node in made))
        # What other parts read must have the strides that their graphs were traced with.
        visible = {self._results[i] for i in visible_outputs(self._module.graph)} | self._read
        mark_visible(graph, [i for i, node in enumerate(made) if node in visible])
        return module_of(graph, self._module)

    def _make_token(self, graph: Graph, node: Node, copies: dict[Value, Node]) -> None:
        """Make the token from which the first operator with effects in a part starts."""
        for read in node.all_input_nodes:
            if is_token(read) and read not in copies:
                copies[read] = graph.call_function(MAKE_TOKEN)
                copies[read].meta["val"] = read.meta["val"]

    def _examples(self, index: int) -> tuple[Any, ...]:
        return tuple(self._given.get(value, self._meta(value)["val"]) for value in self._reads[index])

    def _meta(self, value: Value) -> dict[str, Any]:
        if isinstance(value, sympy.Symbol):
            return {"val": self._size_values[value]}
        return dict(value.meta) if value.op == "placeholder" else {"val": value.meta["val"]}


def _sink_tokens(graph: Graph) -> None:
    """Let a graph keep its operators with effects, whether their results are read or not."""
    tokens = []
    for node in [node for node in graph.nodes if has_token(node)]:
        tokens.append(graph.call_function(operator.getitem, (node, 0)))
        tokens[-1].meta["val"] = node.args[0].meta["val"]  # type: ignore[union-attr]
    if tokens:
        graph.call_function(SINK_TOKENS, (tokens,)).meta["val"] = None


def _is_argument(value: Value) -> bool:
    return isinstance(value, Node) and value.op == "placeholder"
