"""``torch._dynamo.override_cudagraphs``: graphs can be turned off for a function, forward and backward apart."""

from __future__ import annotations

import types

import pytest
import torch

import cudagraph_backend as sg
from cudagraph_backend.compile import region_compile

OFF = "CUDA graphs are off for this function (override_cudagraphs)"


def by_annotation(function, fwd, bwd):
    """As torch notes it on the graph that it hands over, for releases that have no way to ask for it."""

    def backend(gm, inputs):
        gm.meta["cudagraph_annotation"] = types.SimpleNamespace(fwd=fwd, bwd=bwd)
        return sg.sharedgraph(gm, inputs)

    return torch.compile(function, backend=backend)


def by_decorator(function, fwd, bwd):
    helper = torch._dynamo.override_cudagraphs(fwd=fwd, bwd=bwd)(function)
    return torch.compile(lambda *args: helper(*args), backend="sharedgraph")


def by_context(function, fwd, bwd):
    def within(*args):
        with torch._dynamo.override_cudagraphs(fwd=fwd, bwd=bwd):
            return function(*args)

    return torch.compile(within, backend="sharedgraph")


WAYS = [by_annotation]
if hasattr(torch._dynamo, "override_cudagraphs"):  # since torch 2.13
    WAYS += [by_decorator, by_context]


def train(compiled, function, device):
    """Two steps at one size, with checked values; the captures of each kind of region, and what was counted."""
    for _ in range(2):
        w = torch.randn(4, 4, device=device, requires_grad=True)
        x = torch.randn(5, 4, device=device)
        (found,) = torch.autograd.grad(compiled(x, w).square().sum(), w)
        (expected,) = torch.autograd.grad(function(x, w).square().sum(), w)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    captures = {r.region.kind: r.counters.captures for r in sg.sharedgraph.regions()}
    return captures, sg.stats().fallbacks


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("fwd", "bwd", "captured", "uncaptured"),
    [
        (False, False, set(), 4),
        (False, None, set(), 4),
        (False, True, {"backward"}, 2),
        (None, False, {"forward"}, 2),
        (True, False, {"forward"}, 2),
        (None, None, {"forward", "backward"}, 0),
        (True, True, {"forward", "backward"}, 0),
        (True, None, {"forward", "backward"}, 0),
    ],
)
def test_forward_and_backward_apart(way, fwd, bwd, captured, uncaptured, device):
    def function(x, w):
        return (x @ w).tanh()

    captures, fallbacks = train(way(function, fwd, bwd), function, device)
    assert {kind for kind, count in captures.items() if count} == captured
    assert fallbacks == ({OFF: uncaptured} if uncaptured else {})


@pytest.mark.parametrize("way", WAYS)
def test_inference(way, device):
    compiled = way(lambda x: x.sin() * 2, False, None)
    with torch.no_grad():
        for n in (5, 7, 5):
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(compiled(x), x.sin() * 2)
    assert sg.stats().captures == 0
    assert sg.stats().fallbacks == {OFF: 3}
    assert OFF in sg.explain()
    assert "test_override_cudagraphs.py" in sg.explain()


def test_other_functions_are_captured(device):
    without = by_annotation(lambda x: x.sin() * 2, False, None)
    compiled = torch.compile(lambda x: x.cos() * 2, backend="sharedgraph")
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(5, 4, device=device)
            torch.testing.assert_close(without(x), x.sin() * 2)
            torch.testing.assert_close(compiled(x), x.cos() * 2)
    assert sg.stats().captures == 1
    assert sg.stats().fallbacks == {OFF: 2}


def test_nothing_of_it_is_captured_in_parts(device):
    """An operator that can't be captured leaves those around it capturable, but not against the user's word."""

    def function(x, w):
        rows = (x @ w).relu()
        kept = rows[rows[:, 0] > 0]
        return (kept @ w).relu()

    compiled = by_annotation(function, False, None)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        for n in (5, 7):
            x, w = torch.randn(n, 4, device=device), torch.randn(4, 4, device=device)
            torch.testing.assert_close(compiled(x, w), function(x, w))
    assert sg.stats().captures == 0
    assert list(sg.stats().fallbacks) == [OFF]
    assert all(replayer.region.part is None for replayer in sg.sharedgraph.regions())


@pytest.mark.parametrize("way", WAYS)
def test_asking_for_graphs_does_not_bring_stocks(way, device, monkeypatch):
    import torch._inductor.config as settings

    asked, compile_region = [], region_compile.torch_internals.compile_region

    def recorded(*args, **kwargs):
        asked.append((settings.triton.cudagraphs, bool(kwargs["cudagraphs"])))
        return compile_region(*args, **kwargs)

    monkeypatch.setattr(region_compile.torch_internals, "compile_region", recorded)

    def function(x, w):
        return (x @ w).tanh()

    train(way(function, True, True), function, device)
    assert asked == [(False, False)] * 2


def test_with_strict_it_is_a_refusal_as_any_other(device):
    sg.configure(strict=True)
    try:
        with pytest.raises(Exception, match="can't be captured: CUDA graphs are off for this function"):
            by_annotation(lambda x: x.sin() * 2, False, None)(torch.randn(5, 4, device=device))
    finally:
        sg.unconfigure()
