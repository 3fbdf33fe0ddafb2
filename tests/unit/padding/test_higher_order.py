"""Higher-order operators: nested regions are walked, FlexAttention has a rule, and of the others nothing is known."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cudagraph_backend.padding import UNCHANGED, Call, Fact, RefusePadding, padding_rule
from cudagraph_backend.padding.call import RULES
from tests.support.oracle import Region, dynamic, refute, region, regions

SEQUENCE = 128


@torch.library.custom_op("padding_unit::bump", mutates_args=("x",))
def bump(x: torch.Tensor) -> None:
    x.add_(1)


@torch.library.custom_op("padding_unit::write", mutates_args=("cache",))
def write(values: torch.Tensor, cache: torch.Tensor, at: torch.Tensor) -> None:
    cache.index_copy_(0, at, values)


@torch.library.custom_op("padding_unit::split", mutates_args=("x", "y"))
def split(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    y.mul_(2)
    return x * y


split.register_fake(lambda x, y: torch.empty_like(x))


@torch.compiler.nested_compile_region
def block(x, w):
    return (x @ w).relu() + x


@torch.compiler.nested_compile_region
def centred(x, w):
    return x @ w - (x @ w).mean(0)


@torch.compiler.nested_compile_region
def total(x, w):
    return x.sum(0) @ w


@torch.compiler.nested_compile_region
def outer(x, w):
    return block(x, w) * 2


def rows(*shape: int) -> torch.Tensor:
    return dynamic(torch.randn(shape or (5, 4)))


def weight() -> torch.Tensor:
    return torch.randn(4, 4)


def holds(one: Region, target: Any) -> bool:
    return bool(one.module.graph.find_nodes(op="call_function", target=target))


# ------------------------------------------------------------------------------------------------ nested regions

SAFE = {
    "twice": lambda x, w: block(block(x, w), w) + 1,
    "of a view": lambda x, w: block(block(x[:, None], w), w),
    "two levels": lambda x, w: outer(outer(x, w), w).softmax(-1),
    "of what is free of rows": lambda x, w: x + centred(centred(w, w), w)[:1],
}


@pytest.mark.parametrize("name", SAFE)
def test_a_nested_region_is_walked(name):
    found = region(SAFE[name], rows(), weight())
    assert holds(found, torch.ops.higher_order.invoke_subgraph)
    verdict = found.prove()
    assert verdict.refusal is None
    assert refute(found, verdict) is None


def test_a_users_triton_kernel_that_no_row_reaches_is_walked():
    """It gives a dict of what it has written."""
    found = region(lambda x, w: x @ w.sin(), rows(), weight())
    graph = found.module.graph
    (sine,) = graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    with graph.inserting_before(sine):
        launch = {"kernel_idx": 0, "kwargs": {"out_ptr": sine.args[0]}, "tensors_to_clone": ["out_ptr"]}
        called = graph.call_function(torch.ops.higher_order.triton_kernel_wrapper_functional, (), launch)
        called.meta["val"] = {"out_ptr": sine.meta["val"]}
        written = graph.call_function(operator.getitem, (called, "out_ptr"))
        written.meta["val"] = sine.meta["val"]
    sine.replace_all_uses_with(written)
    graph.erase_node(sine)
    assert found.prove().refusal is None


def test_what_a_nested_region_mixes_is_refused_with_its_line():
    verdict = region(lambda x, w: centred(centred(x, w), w) + 1, rows(), weight()).prove(masked=True)
    assert verdict.refusal is not None
    assert "aten." in str(verdict.refusal.op)
    assert "in centred: return x @ w - (x @ w).mean(0)" in str(verdict.refusal.source)


def test_facts_about_padded_rows_go_in():
    """A sum is right if padded rows are zeros. No mask is put into a nested region."""
    found = region(lambda x, w: total(x, w) + total(x.abs(), w), rows(), weight())
    verdict = found.prove(fill="zero")
    assert verdict.refusal is None
    assert verdict.needs_fill
    assert refute(found, verdict, "zero") is None
    refusal = found.prove(fill="replica", masked=True).refusal
    assert refusal is not None
    assert refusal.op == "aten.sum.dim_IntList"


def test_a_nested_region_that_was_traced_for_another_size_is_refused():
    found = region(SAFE["twice"], rows(), weight())
    call, *_ = found.module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
    inside = getattr(found.module, call.args[0].target).graph.find_nodes(op="placeholder")
    other = torch.empty(7, 4)
    next(node for node in inside if isinstance(node.meta["val"], torch.Tensor)).meta["val"] = other
    refusal = found.prove().refusal
    assert refusal is not None
    assert refusal.reason == "it was traced with arguments of other sizes"


# ------------------------------------------------------------------------------------------------ opaque ones


def test_an_operator_behind_a_wrapper_is_named():
    def function(x):
        y = x * 2
        bump(y)
        return y + 1

    refusal = region(function, rows()).prove(masked=True).refusal
    assert refusal is not None
    assert refusal.op == "padding_unit.bump.default"
    assert refusal.reason == "no padding rule for an operator that changes its arguments"
    assert "in function: bump(y)" in str(refusal.source)


def test_a_wrapper_that_no_row_reaches_is_safe():
    def function(x, w):
        y = w * 2
        bump(y)
        return x @ y

    found = region(function, rows(), weight())
    assert holds(found, torch.ops.higher_order.auto_functionalized_v2)
    verdict = found.prove()
    assert verdict.refusal is None
    assert refute(found, verdict) is None


def test_a_wrapper_that_the_padded_size_reaches_is_refused():
    def function(x, w):
        y = w.new_zeros(x.shape[0], 4)
        bump(y)
        return x + y

    assert region(function, rows(), weight()).prove().refusal is not None


def write_rows(call: Call):
    if call["cache"].rows or not (call["values"].holds(Fact.REPLICA) and call["at"].holds(Fact.REPLICA)):
        raise RefusePadding("padded rows would be written somewhere else")
    return UNCHANGED


@pytest.fixture
def rules():
    known = dict(RULES)
    padding_rule("padding_unit::write", writes=True)(write_rows)
    padding_rule("padding_unit::bump", writes=True)(lambda call: call.keep(Fact.REPLICA))
    padding_rule("padding_unit::split", writes=True)(lambda call: call.each(Fact.NOTHING))
    yield
    RULES.clear()
    RULES.update(known)


def written_to_slots(x, cache, at):
    y = x * 2
    bump(y)
    write(y, cache, at)
    return y, cache.sum(0)


def written_from_somewhere(x, cache, at):
    write(x, cache, at.cumsum(0) - at.cumsum(0) + at)
    return x, cache.sum(0)


def slots() -> torch.Tensor:
    return dynamic(torch.tensor([3, 1, 4, 0, 6]))


def test_a_rule_for_an_operator_that_writes(rules):
    found = region(written_to_slots, rows(), torch.zeros(9, 4), slots())
    verdict = found.prove()
    assert verdict.refusal is None
    assert verdict.needs_fill
    assert refute(found, verdict) is None
    assert region(written_from_somewhere, rows(), torch.zeros(9, 4), slots()).prove().refusal is not None


def test_a_rule_for_an_operator_that_writes_may_ask_for_masks(rules):
    @padding_rule("padding_unit::write", writes=True)
    def masked(call: Call):
        for name in ("values", "at"):
            if not call[name].holds(Fact.REPLICA):
                call.fill(call[name], "last", otherwise="padded rows would be written somewhere else")
        return UNCHANGED

    found = region(written_from_somewhere, rows(), torch.zeros(9, 4), slots())
    assert found.prove().refusal is not None
    verdict = found.prove(masked=True)
    assert verdict.refusal is None
    assert verdict.masks
    assert refute(found, verdict) is None


def test_results_come_before_what_was_changed(rules):
    def function(x):
        y, z = x * 2, x + 1
        return split(y, z) + y, z.sum(1)

    found = region(function, rows())
    verdict = found.prove()
    assert verdict.refusal is None
    assert refute(found, verdict) is None


@pytest.mark.parametrize("kind", ["view", "two views", "no opt-in"])
def test_a_rule_is_asked_of_whole_arguments_and_where_it_says_so(kind, rules):
    def function(x):
        y = x * 2
        if kind == "two views":
            split(y[:, :2], y[:, 2:])
        else:
            bump(y[:, 1:] if kind == "view" else y)
        return y + 1

    if kind == "no opt-in":
        padding_rule("padding_unit::bump")(lambda call: call.keep(Fact.REPLICA))
    refusal = region(function, rows()).prove(masked=True).refusal
    assert refusal is not None
    assert refusal.reason == "no padding rule for an operator that changes its arguments"


# ------------------------------------------------------------------------------------------------ FlexAttention


def inputs(batch: int = 3) -> tuple[torch.Tensor, ...]:
    return tuple(dynamic(torch.randn(batch, 2, SEQUENCE, 16)) for _ in range(3))


def causal(b, h, q, k):
    return q >= k


def attention(score: Callable[..., Any] | None = None, mask: BlockMask | None = None) -> Callable[..., Any]:
    return lambda q, k, v: flex_attention(q, k, v, score_mod=score, block_mask=mask) + 1


def shared_mask() -> BlockMask:
    return create_block_mask(causal, None, None, SEQUENCE, SEQUENCE, device="cpu")


def by_head(bias):
    return lambda score, b, h, q, k: score + bias[h]


def by_batch(bias):
    return lambda score, b, h, q, k: score + bias[b]


SAFE_ATTENTION = {
    "plain": lambda: attention(),
    "a mask for all": lambda: attention(mask=shared_mask()),
    "a captured tensor by head": lambda: attention(by_head(torch.randn(2))),
    "the batch's number alone": lambda: attention(lambda score, b, h, q, k: score * (b + 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAFE_ATTENTION)
def test_flex_attention_along_the_batch(name):
    found = region(SAFE_ATTENTION[name](), *inputs())
    assert holds(found, torch.ops.higher_order.flex_attention)
    verdict = found.prove()
    assert verdict.refusal is None
    assert not verdict.needs_fill
    assert refute(found, verdict, tolerance=1e-4) is None


def test_replicas_stay_replicas_unless_the_batch_is_counted():
    def largest(score: Callable[..., Any] | None) -> Callable[..., Any]:
        return lambda q, k, v: flex_attention(q, k, v, score_mod=score).amax(0)

    assert region(largest(None), *inputs()).prove().refusal is None
    assert region(largest(lambda score, b, h, q, k: score * (b + 1)), *inputs()).prove().refusal is not None


def with_blocks(q, k, v, counts, indices, for_gradients=True):
    mask = BlockMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=SEQUENCE, mask_mod=causal, compute_q_blocks=for_gradients
    )
    return flex_attention(q, k, v, block_mask=mask) + 1


def blocks(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    counts, indices = torch.ones(batch, 1, 1, dtype=torch.int32), torch.zeros(batch, 1, 1, 1, dtype=torch.int32)
    return dynamic(counts), dynamic(indices)


def test_a_mask_with_the_rows_of_the_batch_must_be_valid_in_padded_rows():
    found = region(with_blocks, *inputs(), *blocks(), for_gradients=False)
    verdict = found.prove()
    assert verdict.refusal is None
    assert verdict.needs_fill, "padded rows that hold anything hold no valid index"
    assert refute(found, verdict, tolerance=1e-4) is None


@pytest.mark.parametrize("kind", ["sized", "table"])
def test_captured_tensors_by_batch_are_refused(kind):
    """Of a table's rows beyond the batch nothing is known, not even that they are there."""
    if kind == "sized":
        found = region(
            lambda q, k, v, bias: flex_attention(q, k, v, score_mod=by_batch(bias)), *inputs(), dynamic(torch.randn(3))
        )
    else:
        table = torch.randn(8)
        found = region(lambda q, k, v: flex_attention(q, k, v, score_mod=by_batch(table)), *inputs())
    refusal = found.prove(masked=True).refusal
    assert refusal is not None
    assert ("captured tensor" if kind == "table" else "the padded size reaches values") in refusal.reason
    assert refusal.op == "flex_attention"


def test_flex_attention_along_the_sequence_is_refused():
    q, k, v = (dynamic(torch.randn(3, 2, SEQUENCE, 16), 2) for _ in range(3))
    refusal = region(attention(), q, k, v).prove(masked=True).refusal
    assert refusal is not None


def test_flex_attention_of_keys_that_all_rows_share():
    q = inputs()[0]
    k, v = torch.randn(1, 2, SEQUENCE, 16), torch.randn(1, 2, SEQUENCE, 16)
    found = region(with_blocks, q, k, v, *blocks())
    verdict = found.prove()
    assert verdict.refusal is None
    assert refute(found, verdict, tolerance=1e-4) is None


@pytest.fixture
def gradients_on_the_cpu(monkeypatch):
    """FlexAttention computes them there, but does not offer it."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)


def with_gradients(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.requires_grad_() for tensor in tensors]


def test_flex_attention_backward(gradients_on_the_cpu):
    _, backward = regions(attention(mask=shared_mask()), *with_gradients(*inputs()), grad=True)
    assert holds(backward, torch.ops.higher_order.flex_attention_backward)
    verdict = backward.prove()
    assert verdict.refusal is None
    assert refute(backward, verdict, tolerance=1e-4) is None


def test_gradients_that_are_sums_over_the_batch_are_refused(gradients_on_the_cpu):
    q, *_ = inputs()
    shared = torch.randn(1, 2, SEQUENCE, 16), torch.randn(1, 2, SEQUENCE, 16)
    _, backward = regions(with_blocks, *with_gradients(q, *shared), *blocks(), grad=True)
    refusal = backward.prove(masked=True).refusal
    assert refusal is not None
    assert refusal.reason == "sums over the padded rows"


def test_gradients_of_captured_tensors_are_refused(gradients_on_the_cpu):
    bias = torch.randn(2, requires_grad=True)
    _, backward = regions(
        lambda q, k, v: flex_attention(q, k, v, score_mod=by_head(bias)), *with_gradients(*inputs()), grad=True
    )
    refusal = backward.prove(masked=True).refusal
    assert refusal is not None
    assert "gradient of a captured tensor" in refusal.reason
