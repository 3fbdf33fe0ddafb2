"""An operator whose capture fails is found, and cut out: what is around it is captured from the next call on."""

from __future__ import annotations

import pytest
import torch

import cudagraph_backend as sg
from cudagraph_backend import sharedgraph, torch_internals
from cudagraph_backend.drivers.host import HostDriver

SIZES = (5, 7, 30, 3, 5, 7)
capturing: list[int] = []
runs: list[int] = []


def _fail_in_a_capture() -> None:
    if capturing:
        raise RuntimeError("operation not permitted when stream is capturing")


@torch.library.custom_op("cut_out::sine", mutates_args=())
def sine(x: torch.Tensor) -> torch.Tensor:
    _fail_in_a_capture()
    runs.append(len(x))
    return x.sin()


@torch.library.custom_op("cut_out::cosine", mutates_args=())
def cosine(x: torch.Tensor) -> torch.Tensor:
    _fail_in_a_capture()
    return x.cos()


sine.register_fake(torch.empty_like)
cosine.register_fake(torch.empty_like)
sine.register_autograd(
    lambda ctx, grad: cosine(*ctx.saved_tensors) * grad,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.fixture(autouse=True)
def captures(monkeypatch):
    """Lets the host driver call what it captures, as a capture on a GPU does; what that writes is put back."""
    capture = HostDriver.capture

    def call_and_capture(self, run, **of_graph):
        pool = sharedgraph.device(self.device).pool
        held = pool.bytes(0, pool.nbytes).clone()
        capturing.append(1)
        try:
            run()
        except Exception as error:
            raise sg.CaptureError(str(error)) from error
        finally:
            capturing.pop()
            pool.bytes(0, pool.nbytes).copy_(held)
        return capture(self, run, **of_graph)

    monkeypatch.setattr(HostDriver, "capture", call_and_capture)
    runs.clear()


def once(x, w):
    return (sine((x @ w).relu()) @ w).softmax(-1)  # the line


def twice(x, w):
    return (cosine(once(x, w)) @ w).relu()


def written(x, w):
    y = once(x, w)
    x.add_(1)
    return y


@pytest.mark.parametrize(
    ("function", "structure"),
    [(once, "[c.c]"), (twice, "[c.c.c]"), (written, "[c.c]")],
    ids=["once", "twice", "written"],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_around_is_captured(function, structure, dynamic):
    weight = torch.randn(8, 8)
    compiled = torch.compile(function, backend="sharedgraph", dynamic=dynamic)
    with torch.no_grad():
        for n in SIZES if dynamic else (5,) * 6:
            ours = torch.randn(n, 8)
            eager = ours.clone()
            runs.clear()
            result = compiled(ours, weight)
            assert runs == [n]
            torch.testing.assert_close(result, function(eager, weight))
            torch.testing.assert_close(ours, eager)
    parts = [
        r.region for r in sharedgraph.regions() if r.region.part is not None and r.region.part[1] == len(structure) - 2
    ]
    assert "".join(".c"[region.refusal is None] for region in parts) == structure[1:-1]
    failed = 1 + (function is twice)  # calls after which something had to be cut out
    stats = sg.stats()
    assert stats.fallbacks["its capture failed: operation not permitted when stream is capturing"] >= 6 - failed
    assert stats.replays >= structure.count("c") * (6 - failed)
    assert "(cut_out.sine.default) at " in sg.explain()
    assert "softmax(-1)  # the line" in sg.explain()


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_in_training(dynamic):
    weight = torch.randn(8, 8, requires_grad=True)
    compiled = torch.compile(once, backend="sharedgraph", dynamic=dynamic)
    for n in SIZES if dynamic else (5,) * 6:
        x = torch.randn(n, 8)
        results = compiled(x, weight), once(x, weight)
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), weight) for y in results))
    captured = {r.region.kind for r in sharedgraph.regions() if r.region.part is not None and r.counters.replays >= 5}
    assert captured == {"forward", "backward"}


def test_a_bound_that_inductor_finds_is_no_promise_of_the_users():
    compiled = torch.compile(once, backend="sharedgraph")
    weight = torch.randn(8, 8)
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 8)
            torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
            compiled(x, weight)
    assert {dim.upper for r in sharedgraph.regions() for dim in r.region.dims} == {64}
    torch._dynamo.reset()
    compiled = torch.compile(once, backend="sharedgraph", dynamic=True)
    with torch.no_grad():
        for n in SIZES:
            compiled(torch.randn(n, 8), weight)
    assert {dim.upper for r in sharedgraph.regions() for dim in r.region.dims} == {None}


def test_what_it_takes_to_compile_again_is_dropped_with_the_first_capture():
    compiled = torch.compile(lambda x, w: (x @ w).relu(), backend="sharedgraph", dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(5, 8), torch.randn(8, 8))
    assert [r._cut_out for r in sharedgraph.regions()] == [None]


@pytest.mark.slow
@pytest.mark.parametrize("function", [once, twice])
def test_parts_that_hold_for_certain_sizes_only_are_called_for_these(function, monkeypatch):
    """Dynamo's guards are made by then. Inductor compares sizes with the range of 32-bit indices, for one."""
    compile_region, compilations = torch_internals.compile_region, []

    def compile_for_20_rows(gm, example_inputs, **kwargs):
        compilations.append(gm)
        if len(compilations) > 1:
            assert all(n <= 20 for t in example_inputs if isinstance(t, torch.Tensor) for n in t.shape)
        return compile_region(gm, example_inputs, **kwargs)

    monkeypatch.setattr(torch_internals, "compile_region", compile_for_20_rows)
    weight = torch.randn(8, 8)
    compiled = torch.compile(function, backend="sharedgraph", dynamic=True)
    cuts = 1 if function is once else 2
    with torch.no_grad():
        for n in (5, 7, 30, 3, 31, 20):
            x = torch.randn(n, 8)
            before = {id(r): r.counters.replays for r in sharedgraph.regions()}
            torch.testing.assert_close(compiled(x, weight), function(x, weight))
            called = {r.region.part for r in sharedgraph.regions() if r.counters.replays > before.get(id(r), 0)}
            if n in (3, 20):
                assert {part[1] for part in called} == {1 + 2 * cuts}
            elif n > 20:
                assert called == set(), "the parts were compiled for 20 rows at most"


@pytest.mark.parametrize("why", ["does not compile", "other strides", "guards that can't be told"])
def test_where_that_is_not_possible_the_region_runs_uncaptured(why, monkeypatch):
    compile_region, compilations = torch_internals.compile_region, []

    def compile_once(gm, example_inputs, **kwargs):
        compilations.append(gm)
        if why == "does not compile" and len(compilations) > 1:
            raise RuntimeError("no code for this part")
        return compile_region(gm, example_inputs, **kwargs)

    monkeypatch.setattr(torch_internals, "compile_region", compile_once)
    output_strides = torch_internals.output_strides
    if why == "other strides":
        monkeypatch.setattr(
            torch_internals, "output_strides", lambda c: [("1", "8")] if len(compilations) > 3 else output_strides(c)
        )
    if why == "guards that can't be told":
        monkeypatch.setattr(torch_internals, "has_lost_guards", lambda graph: True)
        monkeypatch.setattr(torch_internals.Shapes, "freeze_guards", lambda self: len(compilations) <= 3)
    weight = torch.randn(8, 8)
    compiled = torch.compile(once, backend="sharedgraph", dynamic=True)
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 8)
            torch.testing.assert_close(compiled(x, weight), once(x, weight))
    assert len(compilations) > 1
    assert sg.stats().captures == 0
    assert sg.stats().fallbacks == {"capture failed: operation not permitted when stream is capturing": len(SIZES)}


def test_where_nothing_is_around_the_region_runs_uncaptured():
    compiled = torch.compile(sine, backend="sharedgraph", dynamic=True)
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 8)
            runs.clear()
            torch.testing.assert_close(compiled(x), x.sin())
            assert runs == [n]
    assert (sg.stats().regions, sg.stats().captures) == (1, 0)
    assert sg.stats().fallbacks == {"capture failed: operation not permitted when stream is capturing": len(SIZES)}


def test_with_strict_it_is_an_error():
    compiled = torch.compile(once, backend="sharedgraph", options={"strict": True, "pad": "assume"})
    with torch.no_grad(), pytest.raises(sg.RefusalError, match=r"capture failed.*cut_out.sine"):
        compiled(torch.randn(5, 8), torch.randn(8, 8))


def test_one_inside_a_nested_region_is_found_too():
    @torch.compiler.nested_compile_region
    def block(x):
        return sine(x.relu()) * 2

    def function(x):
        y = block((x * 2).tanh()).relu()
        return (block(y) + 1).tanh() * 3

    compiled = torch.compile(function, backend="sharedgraph", dynamic=True)
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 4)
            torch.testing.assert_close(compiled(x), function(x))
    assert sg.stats().graphs > 0
