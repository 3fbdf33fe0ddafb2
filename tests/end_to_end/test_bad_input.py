"""Bad input gives a clear error, or the compiled region's own result with the reason counted; never a wrong value."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import cudagraph_backend as sg
from cudagraph_backend.runtime import region_state
from cudagraph_backend.runtime.limits import LIMITS
from cudagraph_backend.runtime.places import Places

pytestmark = pytest.mark.host_only("what is refused, and what a failed capture leaves, is decided above the drivers")


def run(function, *args, **options):
    with torch.no_grad():
        return torch.compile(function, backend="sharedgraph", options=options)(*args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capture_size": [1]}, "'capture_size' is unknown; accepted are capture_sizes"),
        ({"capture_sizes": []}, "'capture_sizes': got .*; accepted is 'auto' or a non-empty list of ints"),
        ({"capture_sizes": [4, 0]}, "holds 0"),
        ({"pad": "maybe"}, "'pad': got 'maybe'; accepted is one of 'prove'"),
        ({"strict": 1}, "'strict': got 1; accepted is True or False"),
        ({"max_graphs": 0}, "'max_graphs': got 0; accepted is an int of at least 1"),
        ({"inductor": {"max_autotun": True}}, "which has no 'max_autotun'"),
        ({"inductor": {"max_autotune": "yes"}}, "values of the settings' types"),
        ({"inductor": {"triton.cudagraphs": True}}, "this backend captures the graphs itself"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(Exception, match=message) as raised:
        run(lambda x: x * 2, torch.randn(3), **options)
    assert isinstance(raised.value, sg.OptionError) or isinstance(raised.value.inner_exception, sg.OptionError)


@pytest.mark.slow
def test_driver_off_runs_the_compiled_region(device):
    x = torch.randn(5, device=device)
    torch.testing.assert_close(run(lambda x: x * 2, x, driver="off"), x * 2)
    assert sg.stats().fallbacks == {"capture is off (option driver='off')": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "captures"),
    [(lambda x: x[x[:, 0] > 0] * 2, 3), (lambda x: x.nonzero().T.contiguous() * 2, 0)],
    ids=["rows", "columns"],
)
def test_values_that_depend_on_data_run_compiled(function, captures, device):
    @torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
    def check():
        for n in (5, 7, 9):
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(compiled(x), function(x))

    compiled = torch.compile(function, backend="sharedgraph")
    check()
    assert sg.stats().captures == captures  # of the comparison, as there is nothing else
    refused = sg.stats().fallbacks
    refused.pop("a size that depends on data is met for the first time", None)
    assert sum(refused.values()) == 3
    assert "depends on data" in sg.explain()
    assert "test_bad_input.py" in sg.explain()


def test_sparse_inputs(device):
    def function(a, x):
        return torch.sparse.mm(a, x) * 2

    compiled = torch.compile(function, backend="sharedgraph")
    for n in (5, 7, 9):
        a = torch.eye(n, device=device).to_sparse()
        x = torch.randn(n, 4, device=device)
        torch.testing.assert_close(compiled(a, x), x * 2)


@pytest.mark.slow
def test_tensor_subclasses(device):
    from torch.testing._internal.two_tensor import TwoTensor

    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    with torch.no_grad():
        for n in (5, 7, 9, 7):
            a, b = torch.randn(n, 4, device=device), torch.randn(n, 4, device=device)
            got = compiled(TwoTensor(a, b))
            assert isinstance(got, TwoTensor)
            torch.testing.assert_close(got.a, a * 2)
            torch.testing.assert_close(got.b, b * 2)


def test_without_memory_to_capture_graphs_are_replayed_and_others_captured_later(device, monkeypatch):
    monkeypatch.setattr(region_state, "Places", partial(Places, limits=replace(LIMITS, idle_calls=6)))
    driver = type(sg.sharedgraph.device(device).driver)
    capture, is_short = driver.capture, []

    def sometimes(self, run, **kwargs):
        if is_short:
            raise sg.CaptureError("no memory") from torch.OutOfMemoryError("no memory")
        return capture(self, run, **kwargs)

    monkeypatch.setattr(driver, "capture", sometimes)
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph", options={"capture": "always"})
    graphs = []
    with torch.no_grad():
        for n, is_short[:] in (
            (5, []),
            (20, [1]),
            (20, []),
            (5, []),
            (6, []),
            (20, []),
            (20, []),
            (20, []),
            (20, []),
            (20, []),
        ):
            x = torch.randn(n, 4, device=device)
            torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
            torch.testing.assert_close(compiled(x), x * 2)
            graphs.append(sg.stats().graphs)
    assert graphs == [1, 1, 1, 1, 1, 1, 1, 1, 2, 2]
    assert sg.stats().fallbacks == {"no memory to capture a graph": 5}
    assert sg.stats().replays == 6  # one of them had its answer when memory was short


def test_a_failing_capture_still_answers(device, monkeypatch):
    """The call that was to capture has its values already; later ones run the compiled region."""

    def fail(self, run, **of_graph):
        raise sg.CaptureError("the driver says no")

    driver = type(sg.sharedgraph.device(device).driver)
    monkeypatch.setattr(driver, "capture", fail)
    buffer = torch.zeros(4, device=device)

    def function(x):
        buffer.add_(1)
        return x * 2 + buffer

    compiled = torch.compile(function, backend="sharedgraph")
    with torch.no_grad():
        for calls, n in enumerate((5, 5, 7, 7), start=1):
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(compiled(x), x * 2 + calls)
    assert sg.stats().captures == 0
    assert list(sg.stats().fallbacks) == ["capture failed: the driver says no"]


def test_strict_raises_refusals(device):
    compiled = torch.compile(lambda x: x - x.median(0).values, backend="sharedgraph", options={"strict": True})
    with torch.no_grad():
        compiled(torch.randn(5, 4, device=device))
        with pytest.raises(Exception, match=r"can't be padded: .*median.* at .*test_bad_input.py"):
            compiled(torch.randn(7, 4, device=device))


def test_strict_raises_at_sizes_without_a_bucket(device):
    options = {"strict": True, "capture_sizes": [8]}
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph", options=options)
    with torch.no_grad():
        compiled(torch.randn(5, 4, device=device))
        compiled(torch.randn(7, 4, device=device))
        with pytest.raises(sg.RefusalError, match=r"dim .* is larger than the largest of capture_sizes"):
            compiled(torch.randn(9, 4, device=device))


def test_no_memory_for_the_output_pool(monkeypatch):
    """The call that finds the pool full still answers, from the run it has made, and is counted like those after it."""

    def full(self, nbytes):
        raise torch.OutOfMemoryError("full")

    compiled = torch.compile(lambda x: (x * 2, x), backend="sharedgraph")
    with torch.no_grad():
        x = torch.randn(5, 4)
        sg.output_pool("cpu")
        memory = type(sg.sharedgraph.device(torch.device("cpu")).pool._memory)
        monkeypatch.setattr(memory, "grow", full)
        for n in (5, 5, 7, 7):
            x = torch.randn(n, 4)
            doubled, same = compiled(x)
            torch.testing.assert_close(doubled, x * 2)
            assert same is x
    assert sg.stats().captures == sg.stats().replays == 0
    assert sg.stats().fallbacks == {"no memory for the output pool: full": 4}


@pytest.mark.slow
def test_importing_before_and_after_the_look_up_is_the_same_backend():
    script = """
import torch
from torch._dynamo.backends.registry import lookup_backend
found = lookup_backend("sharedgraph")
import cudagraph_backend, importlib
importlib.reload(cudagraph_backend)
assert found is cudagraph_backend.sharedgraph is lookup_backend("sharedgraph")
assert "sharedgraph" in torch._dynamo.list_backends()
assert not cudagraph_backend.sharedgraph.devices()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
