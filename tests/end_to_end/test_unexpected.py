"""An error of ours while a region is compiled costs its graphs, not the user's program."""

from __future__ import annotations

import pytest
import torch

import cudagraph_backend as sg
from cudagraph_backend.compile import analysis, dims, region_compile
from cudagraph_backend.padding import masks

SIZES = (5, 7, 30, 5)


def centred(x, w):
    return ((x @ w).softmax(0) @ w).relu()  # softmax over rows needs a mask


@pytest.mark.parametrize("where", ["before Inductor", "in a changed graph", "after Inductor"])
@pytest.mark.parametrize("is_training", [False, True])
def test_the_region_runs_as_inductor_compiles_it(where, is_training, device, monkeypatch, caplog, unexpected):
    insert = masks.insert

    def fail(*args, **kwargs):
        raise KeyError("s21")

    def insert_and_fail(*args):
        insert(*args)
        fail()

    if where == "before Inductor":
        monkeypatch.setattr(dims, "prove", fail)
    elif where == "in a changed graph":
        monkeypatch.setattr(masks, "insert", insert_and_fail)
    else:
        monkeypatch.setattr(analysis, "with_strides", fail)
    compiled = torch.compile(centred, backend="sharedgraph", dynamic=True)
    weight = torch.randn(8, 8, device=device, requires_grad=is_training)
    for n in SIZES:
        x = torch.randn(n, 8, device=device)
        result, expected = compiled(x, weight), centred(x, weight)
        torch.testing.assert_close(result, expected)
        if is_training:
            ours, theirs = (torch.autograd.grad(y.square().sum(), weight) for y in (result, expected))
            torch.testing.assert_close(ours, theirs)
    (reason, count), *others = sg.stats().fallbacks.items()
    assert "an unexpected error, please report it: KeyError: 's21'" in reason
    assert not others
    assert count == len(SIZES) * (1 + is_training)
    assert sg.stats().captures == 0
    assert "test_unexpected.py" in sg.explain()
    assert reason in caplog.text
    unexpected.clear()


def test_a_warning_of_it_fails_a_test(unexpected, device):
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dims, "prove", lambda *args, **kwargs: 1 / 0)
        torch.compile(lambda x: x + 1, backend="sharedgraph", dynamic=True)(torch.randn(4, device=device))
    assert len(unexpected) == 1
    unexpected.clear()


def test_it_is_an_error_where_every_refusal_is_one(device, monkeypatch):
    monkeypatch.setattr(dims, "prove", lambda *args, **kwargs: 1 / 0)
    compiled = torch.compile(lambda x: x + 1, backend="sharedgraph", dynamic=True, options={"strict": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"RefusalError.*ZeroDivisionError"):
        compiled(torch.randn(4, device=device))


@pytest.mark.parametrize("strict", [False, True])
def test_a_region_that_computes_nothing_is_returned_as_inductor_left_it(strict, device, monkeypatch, unexpected):
    """There is nothing to capture, and nothing to refuse: the backward of a sum hands its gradient on."""
    analyse = region_compile.analyse

    def fail_for_a_backward(gm, example_inputs, kind, *args):
        if kind == "backward":
            raise KeyError("s21")
        return analyse(gm, example_inputs, kind, *args)

    monkeypatch.setattr(region_compile, "analyse", fail_for_a_backward)
    compiled = torch.compile(lambda x, y: x + y, backend="sharedgraph", options={"strict": strict})
    for _ in range(3):
        x, y = (torch.randn(4, 8, device=device, requires_grad=True) for _ in range(2))
        gradient = torch.randn(4, 8, device=device)
        torch.testing.assert_close(torch.autograd.grad(compiled(x, y), (x, y), gradient), (gradient, gradient))
    assert [replayer.region.kind for replayer in sg.sharedgraph.regions()] == ["forward"]
    assert sg.stats().fallbacks == {}
    assert not unexpected


def test_an_error_of_inductors_is_the_users_to_see(device, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(region_compile.torch_internals, "compile_region", fail)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no compiler"):
        torch.compile(lambda x: x + 1, backend="sharedgraph")(torch.randn(4, device=device))
    assert sg.stats().regions == 0
