"""What parts of a graph are given, where that can't be told from the graph's own values."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cudagraph_backend.compile.cut import Split, split
from cudagraph_backend.compile.levels import CannotSplit
from cudagraph_backend.runtime.composition import Composition

aten = torch.ops.aten
CPU = torch.device("cpu")


class Rows:
    """A graph on the rows of ``x`` that are not zero: their number is known from data, and no node reads it."""

    def __init__(self) -> None:
        self.graph, self._mode = Graph(), FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        with self._mode:
            self._value = torch.empty(6)
        self.x = self.graph.placeholder("x")
        self.x.meta["val"] = self._value

    def add(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        with self._mode:
            node.meta["val"] = target(*torch.fx.map_arg(args, lambda read: read.meta["val"]))
        return node

    def split(self, result: Node, unsafe: Collection[str] = ()) -> Split:
        self.graph.output((result,))
        made = split(GraphModule({}, self.graph), [self._value], CPU, unsafe)
        assert made is not None
        return made


def test_a_size_that_only_a_tensor_has_is_read_from_that():
    rows = Rows()
    found = rows.add(aten.nonzero.default, rows.x)
    made = rows.split(rows.add(aten.mul.Tensor, rows.add(aten.add.Tensor, found, 1), 2))
    assert [part.refusal is None for part in made.parts] == [False, True]
    assert made.wiring.reads == ((0,), made.wiring.makes[0]), "no number is given besides the rows"
    composition = Composition(made.wiring, [lambda args, part=part: part.module(*args) for part in made.parts])
    for x in (torch.tensor([0.0, 1, 0, 2, 3, 0]), torch.ones(6)):
        torch.testing.assert_close(composition([x]), [(x.nonzero() + 1) * 2])


def test_a_size_that_nothing_tells_is_not_guessed():
    rows = Rows()
    found = rows.add(aten.nonzero.default, rows.x)
    twice = rows.add(aten.cat.default, [found, found])  # as many rows as no tensor of its reader has once
    with pytest.raises(CannotSplit, match="nothing gives a part the size u0"):
        rows.split(rows.add(aten.mul.Tensor, rows.add(aten.add.Tensor, twice, 1), 2), unsafe=["aten::cat"])


def test_what_is_neither_a_tensor_nor_a_size_goes_to_no_other_part():
    rows = Rows()
    halves = rows.add(aten.unbind_copy.int, rows.x)
    with pytest.raises(CannotSplit, match="unbind_copy_int is neither a tensor nor a size"):
        rows.split(rows.add(aten.cos.default, rows.add(aten.stack.default, halves)), unsafe=["aten::unbind_copy"])
