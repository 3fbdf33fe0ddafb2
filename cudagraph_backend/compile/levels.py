"""Which part an operator goes to, in a graph that is cut around the operators that can't be captured.

Operators get *levels*, alternately capturable and not, each as low as the operators that it reads allow; a level that
is used becomes a part. Views, constants and sizes have none: every part that reads them computes them on its own, so
that only results of operators go from part to part, and no part writes to memory that another one reads as a view.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch.fx import Graph, Node

from cudagraph_backend.compile.capturable import tensors_of
from cudagraph_backend.errors import Refusal
from cudagraph_backend.graph.operators import (
    communicates,
    has_token,
    measures,
    read_by,
    targets_of,
    waits,
    writes_in_place,
)
from cudagraph_backend.torch_internals import (
    MAKE_TOKEN,
    SINK_TOKENS,
    SYMBOLIC,
    is_operator,
    operator_name,
    operator_schema,
    returns_view,
)

aten, prims = torch.ops.aten, torch.ops.prims

CONSTANTS = (aten.full.default, aten.scalar_tensor.default, prims.iota.default, MAKE_TOKEN)
# Of a view and a look-up that their schemas don't tell.
_AS_GOOD_AS_VIEWS = ("aten::_unsafe_view", "prims::inductor_lookup_seed")

Refusals = Mapping[Node, Refusal]
Levels = dict[Node, int]


class CannotSplit(Exception):
    """Why a region runs whole, as compiled code."""


class Flow:
    """What the operators of a graph read of each other, seen through all that every part computes on its own.

    ``reads`` are, per node, the inputs of the graph and the operators behind its arguments, ``needs`` the operators
    among them, and ``bases`` what a reader of the node reads: an input or operator is its own base. ``operators`` are
    all of them, in the graph's order.
    """

    def __init__(self, graph: Graph):
        self.reads: dict[Node, frozenset[Node]] = {}
        self.needs: dict[Node, list[Node]] = {}
        self.bases: dict[Node, frozenset[Node]] = {}
        self.operators: list[Node] = []
        for node in graph.nodes:
            self.reads[node] = frozenset().union(*(self.bases[read] for read in read_by(node)))
            self.needs[node] = [base for base in self.reads[node] if base.op != "placeholder"]
            if node.op in ("placeholder", "output"):
                self.bases[node] = frozenset([node])
            elif node.target is SINK_TOKENS:
                self.bases[node] = frozenset()  # no part needs it: each ends with one of its own
            elif self._is_repeated(node):
                self.bases[node] = self.reads[node]
            else:
                self.bases[node] = frozenset([node])
                self.operators.append(node)
        self.results = self.reads[graph.output_node()]

    def is_repeated(self, node: Node) -> bool:
        """Return whether every part that reads ``node`` computes it on its own."""
        return node not in self.bases[node]

    def _is_repeated(self, node: Node) -> bool:
        if node.op == "get_attr":
            return True
        if node.target is operator.getitem:
            return self.is_repeated(node.args[0])
        # A constant may be a number that an operator gives, and a size of a result is best read where that is made.
        if node.target in CONSTANTS or measures(node):
            return not self.needs[node]
        if isinstance(node.meta.get("val"), (int, float, *SYMBOLIC)):
            return not any(True for read in node.all_input_nodes for _ in tensors_of(read))
        if not is_operator(node.target):
            return False
        return returns_view(node.target) or operator_schema(node.target).name in _AS_GOOD_AS_VIEWS


def parts_of(flow: Flow, refused: Refusals) -> dict[Node, int]:
    """Return the number of each operator's part: so that most are captured, in as few parts as there can be.

    Raises:
        CannotSplit: the graph writes in place in a way that ties it together.
    """
    choices = [_numbered(_levels(flow, refused, first), refused) for first in (0, 1)]
    return min(choices, key=lambda part_of: _cost(part_of, refused))


def _cost(part_of: Mapping[Node, int], refused: Refusals) -> tuple[int, int]:
    uncaptured = {part_of[node] for node in refused}
    return sum(part in uncaptured for part in part_of.values()), max(part_of.values(), default=0)


def _levels(flow: Flow, refused: Refusals, first: int) -> Levels:
    """Return each operator's level; the even levels are capturable if ``first`` is 0, the odd ones if it is 1."""
    levels: Levels = {}
    writes = _writes_at_the_end(flow)
    last_in_order = 0
    for node in flow.operators:
        if node in writes:
            continue
        in_order = _keeps_order(node, refused)
        level = max((levels[needed] for needed in flow.needs[node]), default=0)
        level = max(level, last_in_order) if in_order else level
        if not _is_light(node, refused):
            level += (level + first) % 2 != (node in refused)
        last_in_order = level if in_order else last_in_order
        levels[node] = level
    _sink(flow, refused, levels)
    _place_writes(flow, writes, refused, levels, first)
    return levels


def _writes_at_the_end(flow: Flow) -> list[Node]:
    """Return the in-place changes of arguments, with which a graph ends."""
    is_write = [writes_in_place(node) for node in flow.operators]
    if is_write != sorted(is_write):
        raise CannotSplit("an argument is written before the graph's end")
    return [node for node, writes in zip(flow.operators, is_write, strict=True) if writes]


def _is_light(node: Node, refused: Refusals) -> bool:
    """Return whether a node makes no tensor, or picks one of several: it is done where its neighbours are."""
    if node in refused:
        return False
    return node.target is operator.getitem or not any(True for _ in tensors_of(node))


def _keeps_order(node: Node, refused: Refusals) -> bool:
    """Return whether an operator runs in the graph's order: it draws, has effects, or may act unseen as the user's."""
    if waits(node.target):
        return False  # it belongs to the part of the collective that it waits for
    targets = list(targets_of(node))
    if any(torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) for target in targets) or node.is_impure():
        return True
    if has_token(node) or any(map(communicates, targets)):
        return True
    if node not in refused or node.target is operator.getitem:
        return False
    return not (is_operator(node.target) and operator_name(node.target).startswith(("aten::", "prims::")))


def _sink(flow: Flow, refused: Refusals, levels: Levels) -> None:
    """Let operators that read arguments alone be where they are read: cast weights would be held from the start on."""
    readers: dict[Node, list[Node]] = {node: [] for node in levels}
    for node in levels:
        for needed in flow.needs[node]:
            readers[needed].append(node)
    for node in reversed(levels):
        if flow.needs[node] or node in flow.results or _is_light(node, refused) or _keeps_order(node, refused):
            continue
        if readers[node] and not any(_is_light(reader, refused) for reader in readers[node]):
            latest = min(levels[reader] for reader in readers[node])
            levels[node] = max(n for n in levels.values() if n <= latest and (n - levels[node]) % 2 == 0)


def _place_writes(flow: Flow, writes: Sequence[Node], refused: Refusals, levels: Levels, first: int) -> None:
    """Place each write to an argument where its value is made, but after all that reads the argument."""
    last_read: Levels = {}
    for node, level in levels.items():
        last_read.update({read: max(level, last_read.get(read, 0)) for read in flow.reads[node]})
    last, written = max(levels.values(), default=0), set[Node]()
    for node in writes:
        target, value = (flow.bases[argument] for argument in node.args[:2])
        if node.target is not aten.copy_.default or value & written:
            raise CannotSplit(f"{node.target} writes in place")
        after = [*(last_read[t] for t in target if t in last_read), *(levels[n] for n in value if n in levels)]
        level = max(after, default=last)
        levels[node] = level + (node in refused and (level + first) % 2 == 0)
        written |= target


def _numbered(levels: Levels, refused: Refusals) -> dict[Node, int]:
    """Return each operator's part: adjacent levels of one kind are one; a level of light operators joins the next.

    One operator alone is not worth a graph next to others: to stage, replay and copy takes longer than to run it.
    """
    heavy = Counter(level for node, level in levels.items() if not _is_light(node, refused))
    allowed = set(heavy) - {levels[node] for node in refused}
    captured = {level for level in allowed if heavy[level] > 1} or allowed
    used = sorted(heavy) or [0]
    parts = {used[0]: 0}
    for before, after in itertools.pairwise(used):
        parts[after] = parts[before] + ((before in captured) != (after in captured))
    joined = {level: next((n for n in used if n >= level), used[-1]) for level in levels.values()}
    return {node: parts[joined[level]] for node, level in levels.items()}
