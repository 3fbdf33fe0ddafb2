"""The words in ``SHAREDGRAPH_DEBUG``, and what the log shows of a pass that changes a graph."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

from cudagraph_backend.compile.graph_log import log_split, logged_change
from cudagraph_backend.compile.scalars import move_scalars
from cudagraph_backend.debug import Debug, debug_of
from cudagraph_backend.errors import OptionError

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("text", "debug"),
    [
        (None, Debug()),
        ("", Debug()),
        ("poison", Debug(poison=True)),
        ("addresses, graphs", Debug(addresses=True, graphs=True)),
        ("poison,addresses,graphs,poison", Debug(poison=True, addresses=True, graphs=True)),
    ],
)
def test_words(text, debug):
    assert debug_of(text) == debug


@pytest.mark.parametrize(
    ("text", "word"), [("poisson", "poisson"), ("poison;graphs", "poison;graphs"), ("graphs,", "")]
)
def test_an_unknown_word_is_named_with_what_is_accepted(text, word):
    with pytest.raises(OptionError) as caught:
        debug_of(text)
    assert str(caught.value) == (
        f"environment variable SHAREDGRAPH_DEBUG: got {word!r} in {text!r}; "
        "accepted are poison, addresses, graphs, separated by commas"
    )


def scaled_by_a_scalar() -> GraphModule:
    """A graph on a GPU that reads a scalar on the CPU."""
    graph = Graph()
    x, scale = graph.placeholder("x"), graph.placeholder("scale")
    product = graph.call_function(aten.mul.Tensor, (x, scale))
    graph.output((product,))
    with FakeTensorMode():
        x.meta["val"], scale.meta["val"] = torch.empty(3, device=CUDA), torch.empty(())
        product.meta["val"] = torch.empty(3, device=CUDA)
    return GraphModule(torch.nn.Module(), graph)


def test_a_scalar_that_moves_is_seen_though_no_operator_changes(caplog):
    caplog.set_level(logging.INFO, "cudagraph_backend")
    module = scaled_by_a_scalar()
    with logged_change("moving scalars, region 7 (inference)", module):
        assert move_scalars(module.graph, CUDA) == {1}
    (message,) = caplog.messages
    assert message.startswith("--- before moving scalars, region 7 (inference)\n+++ after moving scalars, region 7")
    assert '\n-    def forward(self, x: "f32[3]cuda:0", scale: "f32[]cpu"):' in message
    assert '\n+    def forward(self, x: "f32[3]cuda:0", scale: "f32[]cuda:0"):' in message


def test_a_pass_that_changes_nothing_is_not_logged(caplog):
    caplog.set_level(logging.INFO, "cudagraph_backend")
    with logged_change("moving scalars", scaled_by_a_scalar()):
        pass
    assert caplog.messages == []


def test_parts_have_titles(caplog):
    caplog.set_level(logging.INFO, "cudagraph_backend")
    whole, part = scaled_by_a_scalar(), scaled_by_a_scalar()
    log_split("splitting", whole, [("part 1: captured", part), ("part 2: waits", part)])
    (message,) = caplog.messages
    assert message.startswith("--- before splitting\n+++ after splitting")
    assert [line for line in message.splitlines() if "part" in line] == ["+# part 1: captured", "+# part 2: waits"]
