"""Fused attention of every device, on hand-built graphs: the operators need not run here."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from cudagraph_backend.padding.prove import Verdict, prove

CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default
EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default
FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
ALL, MASKED = [CPU, CUDNN, EFFICIENT, FLASH], [CPU, CUDNN, EFFICIENT]
BATCH, HEADS, LENGTH, FEATURES = range(4)
SHAPE = (5, 5, 5, 5)


def verdict(attention: Any, query: int | None, keys: int | None, mask: int | str = "no mask", **kwargs: Any) -> Verdict:
    """The verdict on an attention whose inputs have rows along the dims given; elsewhere their sizes are fixed."""
    graph, mode = Graph(), FakeTensorMode(shape_env=ShapeEnv())
    inputs = {"query": query, "key": keys, "value": keys}
    if mask != "no mask":
        inputs["attn_mask" if attention is CPU else "attn_bias"] = mask
    elif attention in (CUDNN, EFFICIENT):
        kwargs["attn_bias"] = None
    if attention in (CUDNN, EFFICIENT):
        kwargs["compute_log_sumexp"] = True
    for name, rows in inputs.items():
        kinds = [DimDynamic.DUCK if dim == rows else DimDynamic.STATIC for dim in range(4)]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        kwargs[name] = graph.placeholder(name)
        kwargs[name].meta["val"] = mode.from_tensor(torch.empty(SHAPE), symbolic_context=context)
    node = graph.call_function(attention, (), kwargs)
    like = kwargs["query"].meta["val"]
    node.meta["val"] = (like.clone(), like.sum(-1), *[like.new_empty(())] * (len(attention._schema.returns) - 2))
    results = [graph.call_function(operator.getitem, (node, index)) for index in (0, 1)]
    for index, result in enumerate(results):
        result.meta["val"] = node.meta["val"][index]
    graph.output(tuple(results))
    sizes = [size for name in inputs for size in kwargs[name].meta["val"].shape]
    symbols = {size.node.expr for size in sizes if isinstance(size, torch.SymInt)}
    return prove(graph, frozenset(symbols), "replica")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [BATCH, HEADS])
@pytest.mark.parametrize("attention", ALL)
def test_batch_or_heads(attention, rows, causal):
    found = verdict(attention, rows, rows, is_causal=causal)
    assert found.refusal is None
    assert not found.needs_fill
    assert [rows.dim for (rows,) in found.outputs] == [rows, rows]


@pytest.mark.parametrize("mask", [None, BATCH, HEADS])
@pytest.mark.parametrize("attention", MASKED)
def test_batch_with_a_mask(attention, mask):
    """A mask of as many entries as there happen to be rows fits no bucket."""
    found = verdict(attention, BATCH, BATCH, mask)
    assert (found.refusal is None) is (mask == BATCH)


@pytest.mark.parametrize("attention", ALL)
def test_queries_alone(attention):
    found = verdict(attention, LENGTH, None)
    assert found.refusal is None
    assert [rows.dim for (rows,) in found.outputs] == [LENGTH, LENGTH]


@pytest.mark.parametrize("attention", MASKED)
def test_queries_with_their_mask(attention):
    assert verdict(attention, LENGTH, None, LENGTH).refusal is None


@pytest.mark.parametrize("attention", ALL)
def test_a_causal_sequence_needs_finite_padding(attention):
    found = verdict(attention, LENGTH, LENGTH, is_causal=True)
    assert found.refusal is None
    assert found.needs_fill


@pytest.mark.parametrize("attention", ALL)
@pytest.mark.parametrize(
    ("query", "keys", "options"),
    [
        (LENGTH, LENGTH, {}),
        (None, LENGTH, {}),
        (None, LENGTH, {"is_causal": True}),
        (LENGTH, None, {"is_causal": True}),
        (FEATURES, FEATURES, {}),
        (BATCH, HEADS, {}),
        (BATCH, BATCH, {"dropout_p": 0.1}),
    ],
)
def test_refused(attention, query, keys, options):
    refusal = verdict(attention, query, keys, **options).refusal
    assert refusal is not None
    assert refusal.op == str(attention)


@pytest.mark.parametrize("attention", MASKED)
@pytest.mark.parametrize(("rows", "mask"), [(LENGTH, LENGTH), (BATCH, HEADS), (HEADS, BATCH)])
def test_refused_with_a_mask(attention, rows, mask):
    assert verdict(attention, rows, rows, mask, is_causal=True).refusal is not None
