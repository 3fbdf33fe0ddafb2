"""Graphs that measure slower than the plain call are dropped, and nothing is measured that must not run twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cudagraph_backend as sg
from cudagraph_backend.drivers.host import HostDriver
from cudagraph_backend.runtime.payoff import SLOWER, Payoff


class Clock:
    """A driver whose runs take as long as they return."""

    def seconds(self, run):
        return run()


SIZES = (8,)


@pytest.mark.parametrize(("plain", "replay", "expected"), [(1.0, 2.0, SLOWER), (2.0, 1.0, None), (1.0, 1.05, None)])
def test_a_graph_that_is_clearly_slower_is_refused(plain, replay, expected):
    assert Payoff(Clock()).refusal(SIZES, 0, lambda: plain, lambda: replay) is expected


def test_one_slow_round_decides_nothing():
    seconds = iter([1.0, 1.0, 1.0, 1.0, 50.0])
    assert Payoff(Clock()).refusal(SIZES, 0, lambda: 1.0, lambda: next(seconds)) is None


def test_what_is_not_measured_is_captured():
    assert Payoff(Clock()).refusal(SIZES, 0, lambda: None, lambda: 3.0) is None


def test_smaller_sizes_are_measured_unless_a_larger_one_was_clearly_faster():
    payoff = Payoff(Clock())
    slow = {"plain": lambda: 1.0, "replay": lambda: 2.0}
    assert payoff.refusal((8, 8), 10, lambda: 1.0, lambda: 1.0) is None  # about as fast: says nothing of others
    assert payoff.refusal((4, 4), 5, **slow) is SLOWER
    assert payoff.refusal((8, 8), 10, lambda: 2.0, lambda: 1.0) is None
    assert payoff.refusal((4, 8), 10, **slow) is None
    assert payoff.refusal((4, 16), 10, **slow) is SLOWER
    assert payoff.refusal((8, 8), 11, **slow) is SLOWER  # more is copied there


@pytest.fixture
def slow_graphs(monkeypatch) -> list[str]:
    """Every second run measured, the replay, takes longer. Says what ran."""
    ran: list[str] = []

    def seconds(self, run):
        run()
        ran.append("replay" if len(ran) % 2 else "plain")
        return 2.0 if ran[-1] == "replay" else 1.0

    monkeypatch.setattr(HostDriver, "seconds", seconds)
    return ran


def doubled(n: int, compiled) -> None:
    x = torch.randn(n, 4)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
    torch.testing.assert_close(compiled(x), x * 2)


@pytest.mark.slow
def test_calls_of_a_slow_bucket_run_plain(slow_graphs):
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    with torch.no_grad():
        for n in (5, 7, 5, 30, 31, 8):
            doubled(n, compiled)
    stats = sg.stats()
    assert (stats.graphs, stats.captures, stats.replays) == (0, 2, 2)
    assert stats.fallbacks == {SLOWER.reason: 4}
    assert slow_graphs == ["plain", "replay"] * 10


@pytest.mark.parametrize("options", [{"capture": "always"}, {"strict": True}])
def test_all_graphs_are_kept_if_the_user_wants_it(slow_graphs, options):
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph", options=options)
    with torch.no_grad():
        for n in (5, 7, 5):
            doubled(n, compiled)
    assert (sg.stats().graphs, slow_graphs) == (1, [])


def test_side_effects_and_backwards_are_not_run_again(slow_graphs):
    counter = torch.zeros(4)

    def counting(x):
        counter.add_(1)
        return x * counter

    counted = torch.compile(counting, backend="sharedgraph")
    with torch.no_grad():
        for calls in range(1, 4):
            torch.testing.assert_close(counted(torch.ones(3, 4)), torch.full((3, 4), float(calls)))
    assert slow_graphs == []
    linear = nn.Linear(4, 4)
    trained = torch.compile(lambda x: linear(x).tanh() * x, backend="sharedgraph", options={"capture": "always"})
    x = torch.randn(5, 4, requires_grad=True)
    (got,) = torch.autograd.grad(trained(x).sum(), x)
    (expected,) = torch.autograd.grad((linear(x).tanh() * x).sum(), x)
    torch.testing.assert_close(got, expected)
    assert slow_graphs == []
