"""Memory as ``stats`` and ``explain`` tell it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cudagraph_backend as sg
from cudagraph_backend.drivers.host import HostDriver, HostGraph

pytestmark = pytest.mark.host_only("the executables are made up, and of the host driver")

SIZES = (64, 40, 8, 5)  # 5 is served by the graph of 8


@pytest.fixture
def executables_of_growing_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first graph captured has an executable of 1000 bytes, the next one of 2000, and so on."""
    sizes = itertools.count(1000, 1000)

    def capture(self: HostDriver, run: Callable[[], None], **of_graph: Any) -> HostGraph:
        return HostGraph(run, next(sizes))

    monkeypatch.setattr(HostDriver, "capture", capture)


def serve(device: torch.device) -> None:
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    for n in SIZES:
        x = torch.randn(n, 4, device=device)
        torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
        assert torch.equal(compiled(x), x * 2)


@pytest.mark.usefixtures("executables_of_growing_size")
def test_executables_are_summed_over_the_graphs_that_are_held(device):
    assert sg.stats().executable_bytes == 0
    serve(device)
    assert sg.stats().graphs == 3
    assert sg.stats().executable_bytes == 1000 + 2000 + 3000
    sg.reset()
    assert sg.stats().executable_bytes == 0


@pytest.mark.usefixtures("executables_of_growing_size")
def test_explain_tells_each_kind_of_memory(device):
    serve(device)
    stats = sg.stats()
    assert stats.sum_of_buckets_bytes == (64 + 40 + 8) * 16
    assert sg.explain().splitlines()[-5:] == [
        f"memory on {device}",
        f"  output pool: {stats.output_pool_bytes} bytes; outputs as separate buckets: {(64 + 40 + 8) * 16}",
        f"  staging: {64 * 16} bytes of the output pool, shared with outputs",
        "  scratch: 0 bytes, shared by all graphs",
        "  executables: 6000 bytes, outside of all allocators, for 3 graphs",
    ]


def test_without_regions_there_is_nothing_to_explain():
    assert sg.explain() == "sharedgraph: no region is compiled"


def test_the_host_has_no_executables(device):
    serve(device)
    assert sg.stats().executable_bytes == 0
