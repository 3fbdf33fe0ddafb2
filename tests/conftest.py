"""What every test starts from and must leave behind; and on which devices tests run.

Tests that ask for ``device`` run on the CPU with the host driver and, where there is a GPU, on it with the cuda driver.
Where there is none, these variants and ``tests/gpu`` are left out, which the report's header says.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import tempfile
import weakref
from pathlib import Path

# One Inductor cache for all workers of a run: equal regions are compiled once.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"sharedgraph_tests_{os.getuid()}")
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch._inductor.cudagraph_trees import MarkStepBox

from cudagraph_backend import sharedgraph
from cudagraph_backend.compile.region_compile import UNEXPECTED
from cudagraph_backend.drivers.cuda import CudaDriver

_LOCKS = Path(tempfile.gettempdir())


def pytest_report_header():
    if torch.cuda.is_available():
        return "GPU: tests that ask for a device run on the CPU and on the GPU (marker cuda)"
    return "GPU: none, so tests of the cuda driver are left out (marker cuda)"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Several processes run tests on one GPU; one marked ``alone``, which asks for its free memory, waits for the rest.

    Who waits holds the turn, so that no new test begins before. Around all fixtures, which free what a test used.
    """
    if not torch.cuda.is_available():
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    with (
        open(_LOCKS / f"sharedgraph_turn_{os.getuid()}", "w") as turn,
        open(_LOCKS / f"sharedgraph_device_{os.getuid()}", "w") as device,
    ):
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(device, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(device, fcntl.LOCK_UN)  # also for what the test has forked


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The one that the test was collected for; a test that says nothing runs on the CPU."""
    kind = getattr(request, "param", "cpu")
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


@pytest.fixture
def is_on_a_gpu(request: pytest.FixtureRequest) -> bool:
    return request.node.get_closest_marker("cuda") is not None


@pytest.fixture(autouse=True)
def full_precision(is_on_a_gpu):
    """Values are compared with eager's; TF32 would blur them.

    Without ``monkeypatch``: it deletes what an object does not hold itself, and these settings are torch's.
    """
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul) if is_on_a_gpu else ()
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    yield
    for setting, allowed in zip(settings, before, strict=True):
        setting.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def all_graphs_are_kept(is_on_a_gpu, monkeypatch):
    """Tests count graphs of models that are too small to be worth one."""
    if is_on_a_gpu:
        monkeypatch.setattr(CudaDriver, "seconds", lambda self, run: None)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def weight(device) -> torch.Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture(autouse=True)
def unexpected():
    """The errors of ours that a user is spared, as the region runs uncaptured: in a test, each is one to be mended."""
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if UNEXPECTED in record.getMessage():
                told.append(record.getMessage())

    log, handler = logging.getLogger("cudagraph_backend"), Handler(logging.WARNING)
    log.addHandler(handler)
    yield told
    log.removeHandler(handler)
    assert not told


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """After every test, a reset of Dynamo frees all graphs, buffers and pools: nothing refers to their drivers."""
    torch.manual_seed(0)
    MarkStepBox.mark_step_counter = 0  # once a test has marked a step, only marks would count
    yield
    if not sharedgraph.regions() and not sharedgraph.devices():
        return  # a reset and a collection after each of a thousand unit tests would cost minutes
    gc.collect()
    held = [weakref.ref(part) for d in sharedgraph.devices().values() for part in (d, d.driver, d.pool)]
    held += [weakref.ref(place) for r in sharedgraph.regions() if r.state for place in r.state.places.listed]
    torch._dynamo.reset()
    gc.collect()
    assert not sharedgraph.regions()
    assert not sharedgraph.devices()
    left = [type(ref()).__name__ for ref in held if ref() is not None]
    assert not left, f"alive after torch._dynamo.reset(): {left}"
    gc.freeze()  # what is left is torch's own, a million objects: the next collections need not walk through it
