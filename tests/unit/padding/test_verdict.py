"""What a verdict says beyond yes and no: symbols, links, fills, outputs, reasons; and rules added by users."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph

from cudagraph_backend.padding import Call, Fact, call
from cudagraph_backend.padding.call import rule
from cudagraph_backend.padding.prove import prove
from tests.support.oracle import Region, dynamic, refutation, refute, region, regions

CONSTANT = torch.arange(12.0).reshape(3, 4)


def two_dims(x: torch.Tensor) -> torch.Tensor:
    return (x.reshape(-1, 4) @ CONSTANT.t()).reshape(x.shape[0], x.shape[1], 3).softmax(-1)


def test_two_symbols_are_proven_each_for_itself():
    found = region(two_dims, dynamic(torch.randn(5, 7, 4), 0, 1))
    batch, length = found.metas[0].node.expr, found.metas[1].node.expr
    for symbol, dim in ((batch, 0), (length, 1)):
        verdict = found.prove(symbol)
        assert verdict.refusal is None, str(verdict.refusal)
        assert [rows.dim for (rows,) in verdict.outputs] == [dim]
        assert refute(found, verdict) is None


def test_one_of_two_symbols_may_be_refused():
    found = region(lambda x: x.mean(1), dynamic(torch.randn(5, 7, 4), 0, 1))
    batch, length = found.metas[0].node.expr, found.metas[1].node.expr
    assert found.prove(batch).refusal is None
    assert found.prove(length).refusal.op == "aten.mean.dim"


def test_symbols_that_belong_to_one_dim_are_linked():
    ids, mask = dynamic(torch.randint(0, 3, (5, 2))), dynamic(torch.ones(5, 4))
    found = region(lambda i, m: m[torch.arange(i.shape[0])[:, None], torch.arange(4)[None]] * 2, ids, mask)
    first, other = (found.metas[i].node.expr for i, meta in enumerate(found.metas) if isinstance(meta, torch.SymInt))
    assert first != other
    for symbol, missing in ((first, other), (other, first)):
        verdict = found.prove(symbol)
        assert verdict.refusal is not None
        assert verdict.link == {missing}
    linked = found.prove(first, other)
    assert linked.refusal is None
    assert not linked.link
    assert refute(found, linked) is None


def test_links_are_symbols_of_the_region():
    """Rows looked up by numbers of rows along another dim: that dim's size is no symbol to pad together with."""
    verdict = region(lambda x: F.embedding(torch.arange(x.shape[0]), x), dynamic(torch.randn(5, 4))).prove()
    assert verdict.refusal is not None
    assert not verdict.link


def test_outputs_tell_their_rows():
    def outputs(x):
        return x.t() * 2, x.shape[0], CONSTANT * 2, (x[:, None] * CONSTANT[:1]).reshape(-1, 2), x.shape[0] * 3

    verdict = region(outputs, dynamic(torch.randn(5, 4))).prove()
    assert [[(rows.dim, rows.per, rows.blocks) for rows in axes] for axes in verdict.outputs] == [
        [(1, 1, 1)],
        [],
        [],
        [(0, 2, 1)],
        [],
    ]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum(0),
        lambda x: (x * 2).sum(),
        lambda x: (x.sin() + x.tanh() * x).relu().sum(0),
        lambda x: x.bool().any(),
        lambda x: x.t() @ x,
        lambda x: x[:, :3] + (x.t() @ x)[0, 0],
    ],
)
def test_zero_fill_makes_sums_over_rows_exact(function):
    found = region(function, dynamic(torch.randn(5, 4)))
    verdict = found.prove(fill="zero")
    assert verdict.refusal is None, str(verdict.refusal)
    assert verdict.needs_fill
    assert refute(found, verdict, "zero") is None
    assert found.prove(fill="replica").refusal is not None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.exp().sum(0),
        lambda x: (x + 1).sum(0),
        lambda x: (x * float("inf")).sum(0),
        lambda x: (x * CONSTANT[0]).sum(0),
        lambda x: x.amax(0),
        lambda x: x.mean(0),
        lambda x: torch.where(x > 0, x, 1.0).sum(),
        lambda x: F.pad(x, (1, 1), value=1.0).sum(),
        lambda x: CONSTANT[:1].expand(x.shape[0], 4).sum(),
    ],
)
def test_zero_fill_does_not_survive(function):
    assert region(function, dynamic(torch.randn(5, 4))).prove(fill="zero").refusal is not None


def test_weight_gradient_of_a_linear_layer():
    weight = torch.randn(4, 3, requires_grad=True)
    forward, backward = regions(lambda x: x @ weight, dynamic(torch.randn(5, 4)), grad=True)
    assert forward.prove().refusal is None
    assert not forward.prove().needs_fill
    verdict = backward.prove(fill="zero")
    assert verdict.refusal is None, str(verdict.refusal)
    assert refute(backward, verdict, "zero") is None
    assert backward.prove(fill="replica").refusal.op == "aten.mm.default"


@pytest.mark.parametrize("make", [lambda n: torch.zeros(n // 2), lambda n: torch.zeros(n * n)])
def test_derived_sizes_are_refused(make):
    found = region(lambda x: (x * 2, make(x.shape[0])), dynamic(torch.randn(6, 4)))
    assert "multiple of the rows" in found.prove().refusal.reason


@pytest.mark.slow
def test_padding_of_the_users_own_that_is_cut_off_again():
    """As CUDA's attention aligns a mask: to a multiple of 16 entries, of which it reads the first."""

    def aligned(x):
        return torch.constant_pad_nd(x, [0, 16 - x.shape[-1] % 16])

    found = region(lambda x: aligned(x)[:, : x.shape[1]] * 2, dynamic(torch.randn(3, 5), 1))
    verdict = found.prove()
    assert verdict.refusal is None, str(verdict.refusal)
    assert refutation(found, verdict, 13, "poison") is None
    both = region(lambda x: aligned(x @ x.mT)[:, :, : x.shape[1]] * 2, dynamic(torch.randn(3, 5, 4), 1))
    assert refute(both, both.prove()) is None
    used = region(lambda x: aligned(x).relu()[:, : x.shape[1]], dynamic(torch.randn(3, 5), 1)).prove()
    assert used.refusal.reason == "pads behind the rows"


def test_an_input_with_several_entries_per_row():
    def add_pairs(x, pairs):
        return (x.repeat_interleave(2, 0) + pairs).view(x.shape[0], 2, 4).sum(1)

    found = region(add_pairs, dynamic(torch.randn(5, 4)), dynamic(torch.randn(10, 4)))
    verdict = found.prove()
    assert verdict.refusal is None, str(verdict.refusal)
    assert refute(found, verdict) is None


def test_an_input_with_rows_along_two_dims():
    graph, symbol = _graph_of(lambda x: x * 2, 2, 2)
    verdict = prove(graph, frozenset([symbol]), "replica")
    assert verdict.refusal is None
    assert [[rows.dim for rows in axes] for axes in verdict.outputs] == [[0, 1]]


def test_an_operator_without_rule_is_refused():
    found = region(lambda x: torch.linalg.qr(x)[0], dynamic(torch.randn(5, 3, 3)))
    refusal = found.prove().refusal
    assert refusal.reason == "no padding rule for this operator"
    assert "qr" in refusal.op


def test_a_higher_order_operator_is_refused():
    def branch(x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    graph = region(branch, dynamic(torch.randn(5, 4)))
    assert graph.prove().refusal is not None


def test_an_unused_mixed_result_is_no_refusal():
    found = region(lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)), dynamic(torch.randn(5, 4)))
    assert found.prove().refusal is None


def test_writing_rows_into_a_fixed_input_is_refused():
    def write(cache, x):
        cache.copy_(x[:3])
        return x * 2

    def write_sum(cache, x):
        cache.copy_(x.sum(0))
        return x * 2

    rows = dynamic(torch.randn(5, 4))
    assert region(write, torch.zeros(3, 4), rows).prove().refusal is None
    assert region(write_sum, torch.zeros(4), rows).prove().refusal is not None


def test_a_rule_for_a_custom_operator():
    with torch.library._scoped_library("padding_test", "FRAGMENT") as library:
        library.define("twice(Tensor x, SymInt factor) -> Tensor")
        library.impl("twice", lambda x, factor: x * factor, "CompositeExplicitAutograd")
        library._register_fake("twice", lambda x, factor: torch.empty_like(x))
        twice = torch.ops.padding_test.twice

        rows = dynamic(torch.randn(5, 4))
        found = region(lambda x: twice(x, 2), rows)
        sized = region(lambda x: twice(x, x.shape[0]), rows)
        assert found.prove().refusal.reason == "no padding rule for this operator"
        try:

            @rule("padding_test::twice")
            def row_by_row(call: Call):
                return call.keep(Fact.ALL)

            assert found.prove().refusal is None
            assert refute(found, found.prove()) is None
            assert "argument 'factor'" in sized.prove().refusal.reason
        finally:
            call.RULES.pop("padding_test::twice")


def test_a_rule_that_forgets_the_rows_is_caught_by_the_shape():
    found = region(lambda x: x.softmax(1), dynamic(torch.randn(5, 4)))
    kept = dict(call.RULES)
    try:
        rule("prims::prepare_softmax_online", "aten::amax")(lambda call: None)
        assert "shape changes" in found.prove().refusal.reason
    finally:
        call.RULES.update(kept)


def test_every_rule_names_an_operator_that_exists():
    for name in call.RULES:
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        found = getattr(getattr(torch.ops, namespace), packet, None)
        if found is None and (namespace, packet) in UNKNOWN_TO_SOME_VERSIONS:
            continue
        if namespace == "higher_order":  # these have no overloads
            assert found is not None, name
            continue
        assert (overload or "default") in found.overloads(), name


UNKNOWN_TO_SOME_VERSIONS = {
    ("prims", "prepare_softmax_online"),
    ("prims", "_low_memory_max_pool_with_offsets"),
    ("transformers", "grouped_mm_fallback"),
    ("transformers", "grouped_mm_fallback_backward"),
}


def _graph_of(function, *dynamic_like: int) -> tuple[Graph, object]:
    """A graph whose one input has the same symbol in ``dynamic_like`` dims."""
    x = torch.randn(*[5] * len(dynamic_like))
    for dim in range(len(dynamic_like)):
        torch._dynamo.mark_dynamic(x, dim)
    found: Region = region(lambda x: function(x) + x.t(), x)  # adding the transpose makes the dims equal
    (symbol,) = {size.node.expr for meta in found.metas if isinstance(meta, torch.Tensor) for size in meta.shape}
    return found.module.graph, symbol
