"""What every test starts from and must leave behind."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
import weakref

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
