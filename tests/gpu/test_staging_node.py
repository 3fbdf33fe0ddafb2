"""Staging as the first node of a graph: its parameters are set before each launch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

import cudagraph_backend as sg
from cudagraph_backend.backend import sharedgraph
from cudagraph_backend.drivers.staging_kernel.node import StagingNode


def nodes() -> list[StagingNode | None]:
    """Those of all graphs."""
    states = [replayer.state for replayer in sharedgraph.regions()]
    places = [place for state in states if state is not None for place in state.places.listed]
    return [graph.node for place in places for graph in place.graphs.values()]


def marked(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0, min=2, max=64)
    return tensors


def launches(call: Callable[[], object]) -> list[str]:
    """What the host launches."""
    with torch.profiler.profile(activities=list(torch.profiler.ProfilerActivity.__members__.values())[:2]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if "Launch" in e.name and e.name.startswith("cu")]


def test_a_padded_call_is_one_launch(device):
    compiled = torch.compile(lambda x, y, m: torch.where(m, x @ x.T @ x, y.to(x.dtype)), backend="sharedgraph")
    with torch.no_grad():
        for n in (33, 33, 35, 40, 35):
            x, y = torch.randn(n, 16, device=device), torch.randint(0, 9, (n, 16), device=device)
            args = marked(x, y, y % 2 == 0)
            torch.testing.assert_close(compiled(*args), torch.where(args[2], x @ x.T @ x, y.to(x.dtype)))
        assert launches(lambda: compiled(*args)) == ["cudaGraphLaunch"]
    assert all(node is not None for node in nodes())


def test_one_graph_is_staged_for_any_size_address_and_alignment(device):
    """Calls that copy and fill, only copy, or do neither, in random order, with some arguments met again."""
    rng, compiled = random.Random(0), torch.compile(lambda x, y: (x * 2 + y, x.sum(1)), backend="sharedgraph")
    memory, kept = torch.randn(1 << 16, device=device), []
    out = None
    with torch.no_grad():
        for _ in range(150):
            n = rng.choice([33, 35, 36, 40])
            offset = rng.choice([0, 1, 2, 3, 4, 64, 4096])
            x = memory[offset:][: n * 16].view(n, 16)
            y = rng.choice([torch.randn(n, 16, device=device), x, *[k for k in kept if len(k) == n]])
            if out is not None and len(out) == n and rng.random() < 0.5:
                y = out
            kept = [*kept, x][-6:]
            expected = x * 2 + y, x.sum(1)
            marked(x, y)
            out, sums = compiled(x, y)
            torch.testing.assert_close((out, sums), expected)
            memory[rng.randrange(1 << 16)] = rng.random()
            del sums
    assert sg.stats().fallbacks == {}
    assert sg.stats().staged_copies
    assert sg.stats().read_in_place
    assert all(node is not None for node in nodes())


def test_more_inputs_than_a_node_takes(device):
    compiled = torch.compile(lambda *xs: sum(x * k for k, x in enumerate(xs)), backend="sharedgraph")
    with torch.no_grad():
        for n in (33, 35, 35, 40, 33):
            args = marked(*[torch.randn(n, 8, device=device) for _ in range(20)])
            torch.testing.assert_close(compiled(*args), sum(x * k for k, x in enumerate(args)))


def test_inputs_that_the_kernel_cannot_copy(device):
    compiled = torch.compile(lambda x, c: (x * 2, torch.view_as_real(c) * 3), backend="sharedgraph")
    with torch.no_grad():
        for n in (33, 35, 35, 40):
            x, c = marked(torch.randn(n, 4, device=device), torch.randn(n, 4, device=device, dtype=torch.complex128))
            torch.testing.assert_close(compiled(x, c), (x * 2, torch.view_as_real(c) * 3))


def test_launches_under_way_keep_their_arguments(device):
    """The host runs far ahead of the GPU; each launch must see the arguments of its own call."""
    compiled = torch.compile(lambda x, w: (x @ w).sum(1), backend="sharedgraph")
    w = torch.randn(16, 16, device=device)
    with torch.no_grad():
        inputs = [marked(torch.randn(33 + k % 8, 16, device=device))[0] for k in range(60)]
        expected = [(x @ w).sum(1) for x in inputs]
        for x in inputs[:8]:
            compiled(x, w)
        results = []
        torch.cuda._sleep(100_000_000)
        for x in inputs:
            results.append(compiled(x, w).clone())
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)


def test_without_a_node_inputs_are_staged_before_the_graph(device, monkeypatch: pytest.MonkeyPatch, caplog):
    def fail(self, graph, idle):
        raise RuntimeError("no such node")

    monkeypatch.setattr(StagingNode, "__init__", fail)
    compiled = torch.compile(lambda x: x * 2 + 1, backend="sharedgraph")
    with torch.no_grad():
        for n in (33, 35, 40, 17, 35):
            (x,) = marked(torch.randn(n, 16, device=device))
            torch.testing.assert_close(compiled(x), x * 2 + 1)
    assert set(nodes()) == {None}
    assert caplog.text.count("no such node") == 1
