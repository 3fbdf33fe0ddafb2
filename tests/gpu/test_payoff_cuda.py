"""``capture="auto"``: whether a graph pays is measured on the GPU itself."""

from __future__ import annotations

import torch

import cudagraph_backend as sg
from cudagraph_backend.drivers.cuda import CudaDriver

MEASURED = CudaDriver.seconds  # conftest.py takes it away


def test_many_small_kernels_are_worth_a_graph(device, monkeypatch):
    monkeypatch.setattr(CudaDriver, "seconds", MEASURED)
    weight = torch.randn(64, 64, device=device) / 8

    def function(x):
        for _ in range(100):
            x = x @ weight
        return x

    compiled = torch.compile(function, backend="sharedgraph")
    with torch.no_grad():
        for n in (33, 17, 35, 33):
            x = torch.randn(n, 64, device=device)
            torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
            torch.testing.assert_close(compiled(x), function(x), rtol=1e-2, atol=1e-3)
    assert sg.stats().fallbacks == {}
    assert sg.stats().graphs == 2


def test_results_are_right_whether_a_graph_is_kept_or_not(device, monkeypatch):
    """One kernel: it may go either way; a graph that is dropped was measured slower, and is said to be."""
    monkeypatch.setattr(CudaDriver, "seconds", MEASURED)
    compiled = torch.compile(lambda x, y: x * 2 + y, backend="sharedgraph")
    with torch.no_grad():
        for n in (33, 17, 35, 33, 17):
            x, y = torch.randn(n, 64, device=device), torch.randn(n, 64, device=device)
            torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
            torch._dynamo.mark_dynamic(y, 0, min=2, max=64)
            torch.testing.assert_close(compiled(x, y), x * 2 + y)
    stats = sg.stats()
    assert stats.captures == 2
    assert stats.graphs == 2 or all("slower" in reason for reason in stats.fallbacks)
