"""Operators that run others, or that must run at every call: captured or cut out, with the values of eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor_config
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import cudagraph_backend as sg
from cudagraph_backend.padding import UNCHANGED, Call, Fact, RefusePadding, padding_rule
from tests.support.operators import wave
from tests.support.regions import BUCKETS, SIZES, Kept, check, kinds, two

metadata = {"scale": 1.0}  # what an engine describes a batch with, outside of any tensor


@torch.library.custom_op("higher_order_e2e::scaled", mutates_args=())
def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * metadata["scale"]


@torch.library.custom_op("higher_order_e2e::scale", mutates_args=("x",))
def scale(x: torch.Tensor) -> None:
    x.mul_(metadata["scale"])


@torch.library.custom_op("higher_order_e2e::write", mutates_args=("cache",))
def write(rows: torch.Tensor, cache: torch.Tensor, at: torch.Tensor) -> None:
    cache.index_copy_(0, at, rows)


@torch.library.custom_op("higher_order_e2e::add_one", mutates_args=("x",))
def add_one(x: torch.Tensor) -> None:
    x.add_(1)


scaled.register_fake(torch.empty_like)


@torch.compiler.nested_compile_region
def block(x, w):
    return (x @ w).relu() + x


@torch.compiler.nested_compile_region
def unsafe_block(x, w):
    return wave(x @ w) + x


# ------------------------------------------------------------------------------------------------ named operators


def functional(x, w):
    return (scaled(two(x @ w)) @ w).relu()


def in_place(x, w):
    y = two(x @ w)
    scale(y)
    return (y @ w).relu()


NAMED = ["higher_order_e2e::scaled", "higher_order_e2e::scale.default"]


@pytest.mark.parametrize("given", ["option", "setting", "inductor"])
@pytest.mark.parametrize("function", [functional, in_place])
def test_an_operator_that_reads_a_python_object_stays_right(function, given, device, weight):
    """Captured on a GPU it would go on with what it read then. Replays on the host read it anew: so fallbacks count."""
    options: dict[str, Any] = {"option": {"uncapturable_ops": NAMED}, "setting": {}}.get(
        given, {"inductor": {"custom_should_partition_ops": NAMED}}
    )

    def make(n: int) -> list[torch.Tensor]:
        metadata["scale"] += 1
        return [torch.randn(n, 8, device=device), weight]

    with inductor_config.patch(custom_should_partition_ops=NAMED if given == "setting" else []):
        stats = check(function, make, **options)
    assert kinds() == "[c.c]"
    assert stats.fallbacks == {"the operator is named as one that must not be captured": len(SIZES)}
    assert stats.replays == 2 * len(SIZES)
    assert stats.rows_padded > 0
    assert "not captured: the operator is named as one" in sg.explain()


def test_names_that_no_operator_has_are_told(device):
    names = ["higher_order_e2e::scaled.default", "higher_order_e2e::scaled.other", "nowhere::op", "higher_order::cond"]
    check(two, lambda n: [torch.randn(n, 4, device=device)], uncapturable_ops=names)
    told = [line for line in sg.explain().splitlines() if line.startswith("uncapturable_ops")]
    assert told == [
        "uncapturable_ops: no operator is named 'higher_order_e2e::scaled.other'",
        "uncapturable_ops: no operator is named 'nowhere::op'",
    ]


# ------------------------------------------------------------------------------------------------ custom operators


def test_an_operator_that_writes_is_captured(device):
    """Into an argument's memory, and into a value of the graph: at exact sizes, as no rule says what padded rows do."""

    def function(x, cache, at):
        y = x * 2
        add_one(y)
        write(y, cache, at)
        return y, cache.sum(0) + 1

    compiled = torch.compile(function, backend="sharedgraph")
    ours, eager = torch.zeros(40, 4, device=device), torch.zeros(40, 4, device=device)
    kept = Kept()
    with torch.no_grad():
        for n in SIZES * 2:
            x, at = torch.randn(n, 4, device=device), torch.randperm(40, device=device)[:n]
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(at, 0)
            kept.keep(compiled(x, ours, at), function(x, eager, at))
            torch.testing.assert_close(ours, eager)
    assert sg.stats().fallbacks == {}
    assert sg.stats().graphs >= len(set(SIZES))
    reason = "no padding rule for an operator that changes its arguments (higher_order_e2e.add_one.default)"
    assert reason in sg.explain()


def test_an_operator_that_writes_is_padded_by_a_rule_that_says_so(device, no_rules_left):
    """Into slots of a cache: padded rows write what the last real row does. And into a value with rows."""

    @padding_rule("higher_order_e2e::write", writes=True)
    def write_rows(seen: Call):
        if seen["cache"].rows or not (seen["rows"].holds(Fact.REPLICA) and seen["at"].holds(Fact.REPLICA)):
            raise RefusePadding("padded rows would be written somewhere else")
        return UNCHANGED

    padding_rule("higher_order_e2e::add_one", writes=True)(lambda seen: seen.keep(Fact.REPLICA))

    def function(x, cache, at):
        y = x * 2
        add_one(y)
        write(y, cache, at)
        return y, cache.sum(0) + 1

    cache = torch.zeros(40, 4, device=device)
    stats = check(
        function, lambda n: [torch.randn(n, 4, device=device), cache.clone(), torch.randperm(40, device=device)[:n]]
    )
    assert stats.fallbacks == {}
    assert stats.graphs == len(BUCKETS)
    assert stats.rows_padded > 0


def test_results_of_an_operator_that_writes_are_fed_back(device):
    def function(x):
        y = x * 0.5
        add_one(y)
        return y

    compiled = torch.compile(function, backend="sharedgraph")
    ours = eager = torch.randn(6, 4, device=device)
    with torch.no_grad():
        for _ in range(6):
            ours, eager = compiled(ours), function(eager)
            torch.testing.assert_close(ours, eager)
    assert sg.stats().fallbacks == {}


def test_an_argument_is_written_twice_around_an_operator_that_is_cut_out(device, weight):
    def function(x, w, total):
        y = two(x @ w)
        add_one(total)
        z = two(wave(y) @ w)
        add_one(z)
        add_one(total)
        return z + total, y

    check(function, lambda n: [torch.randn(n, 8, device=device), weight, torch.zeros(8, device=device)])
    assert kinds() == "[c.c]"


def test_a_buffer_that_a_kernel_of_the_users_changes(device):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(4))

        def forward(self, x):
            add_one(self.calls)
            return x + self.calls

    ours, eager = Counting().to(device), Counting().to(device)
    compiled = torch.compile(ours, backend="sharedgraph")
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(compiled(x), eager(x))
            torch.testing.assert_close(ours.calls, eager.calls)
    assert sg.stats().fallbacks == {}
    assert sg.stats().rows_padded > 0  # no row reaches the operator


# ------------------------------------------------------------------------------------------------ nested regions


def test_nested_regions_are_captured_and_padded(device, weight):
    stats = check(lambda x, w: block(block(x, w), w).softmax(-1), lambda n: [torch.randn(n, 8, device=device), weight])
    assert stats.fallbacks == {}
    assert stats.graphs == len(BUCKETS)
    assert stats.rows_padded > 0


def test_results_made_in_a_nested_region_are_written_in_place(device, weight):
    stats = check(lambda x, w: block(block(x, w), w), lambda n: [torch.randn(n, 8, device=device), weight])
    assert stats.fallbacks == {}
    assert stats.output_copies == 0


def test_nested_regions_in_parts(device, weight):
    stats = check(
        lambda x, w: block(block(wave(block(block(x, w), w)), w), w).softmax(-1),
        lambda n: [torch.randn(n, 8, device=device), weight],
    )
    assert kinds() == "[c.c]"
    assert stats.rows_padded > 0


def test_a_nested_region_with_an_operator_that_cannot_be_captured_is_cut_out(device, weight):
    check(
        lambda x, w: two(unsafe_block(unsafe_block(two(x), w), w)),
        lambda n: [torch.randn(n, 8, device=device), weight],
    )
    assert kinds() == "[c.c]"
    assert "sharedgraph_tests.wave.default" in sg.explain()


def test_nested_regions_keep_results_and_train(device):
    ours = [torch.nn.Parameter(torch.eye(8, device=device) * scale) for scale in (0.5, 0.25)]
    eager = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]

    def function(x, first, second):
        return block(block(block(block(x, first), second), first), second)

    compiled = torch.compile(function, backend="sharedgraph")
    kept = Kept()
    for n in SIZES:
        x = torch.randn(n, 8, device=device)
        torch._dynamo.mark_dynamic(x, 0)
        results = compiled(x, *ours), function(x, *eager)
        for out in results:
            out.square().mean().backward()
        torch.testing.assert_close([p.grad for p in ours], [p.grad for p in eager], rtol=1e-4, atol=1e-4)
        kept.keep(*(out.detach() for out in results))
    assert sg.stats().fallbacks == {}


# ------------------------------------------------------------------------------------------------ two of torch's own


def test_a_checkpoint_draws_the_same_numbers_again(device):
    """Dropout of ones: an entry is what its gradient is."""

    def function(x):
        return checkpoint(lambda y: F.dropout(torch.relu(y), 0.5), x, use_reentrant=False)

    compiled = torch.compile(function, backend="sharedgraph", options={"inductor": {"fallback_random": True}})
    drawn = []
    for n in (6, 7, 9, 7, 6):
        x = torch.ones(n, 32, device=device, requires_grad=True)
        out = compiled(x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(out.detach(), gradient)
        assert set(out.unique().tolist()) == {0.0, 2.0}
        drawn.append(out.detach()[:6].clone())
    assert not torch.equal(drawn[0], drawn[-1])


def causal(b, h, q, k):
    return q >= k


def test_flex_attention_is_captured_and_padded_along_the_batch(device):
    mask = create_block_mask(causal, None, None, 128, 128, device=device)

    def function(q, k, v):
        return flex_attention(q, k, v, block_mask=mask)

    stats = check(
        function, lambda n: [torch.randn(n, 2, 128, 16, device=device) for _ in range(3)], sizes=(5, 7, 3, 9, 7)
    )
    assert stats.fallbacks == {}
    assert stats.rows_padded > 0
    assert isinstance(mask, BlockMask)


# ------------------------------------------------------------------------------------------------ boolean indices


def set_rows(x, w, mask, values):
    y = two(x @ w).clone()
    y[mask] = values
    return two(y @ w)


def test_a_mask_whose_entries_are_counted_is_cut_out(device, weight):
    """The host driver could run it; a graph can't."""

    def make(n: int) -> list[torch.Tensor]:
        return [
            torch.randn(n, 8, device=device),
            weight,
            torch.arange(n, device=device) % 3 == 0,
            torch.randn(8, device=device),
        ]

    check(set_rows, make)
    assert kinds() == "[c.c]"
    assert "how many entries a mask has is read back" in sg.explain()


def test_one_value_behind_a_mask_is_captured(device, weight):
    def function(x, w, mask):
        y = two(x @ w).clone()
        y[mask] = 3.0
        return two(y @ w)

    stats = check(
        function, lambda n: [torch.randn(n, 8, device=device), weight, torch.arange(n, device=device) % 3 == 0]
    )
    assert stats.fallbacks == {}
    assert stats.graphs == len(set(SIZES))


# ------------------------------------------------------------------------------------------------ effects

said: list[float] = []


@torch.library.custom_op("higher_order_e2e::say", mutates_args=())
def say(x: torch.Tensor) -> torch.Tensor:
    said.append(x.flatten()[0].item())
    return x + 1


say.register_fake(torch.empty_like)


@pytest.mark.host_only("a replay calls no Python")
def test_operators_with_effects_run_once_per_call_and_in_order_on_the_host(weight):
    """Also around an operator that is cut out, and where test runs are asked for."""
    effects = torch._higher_order_ops.effects
    effects._register_effectful_op("higher_order_e2e::say", effects._EffectType.ORDERED)

    def function(x, w):
        first = say(two(x))
        return say(two(wave(first) @ w)) + 1

    compiled = torch.compile(function, backend="sharedgraph", options={"pad": "probe", "verify": "capture"})
    with torch.no_grad():
        for n in (5, 7, 6, 7):
            x = torch.randn(n, 8)
            said.clear()
            expected = function(x, weight)
            by_eager = list(said)
            said.clear()
            torch.testing.assert_close(compiled(x, weight), expected, rtol=1e-4, atol=1e-4)
            assert said == pytest.approx(by_eager, rel=1e-4)
    assert sg.stats().captures > 0
