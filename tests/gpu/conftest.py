"""Everything here needs a CUDA GPU; where there is none it is skipped, with that reason."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import pytest
import torch

from cudagraph_backend.drivers.cuda import CudaDriver


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Values are compared with eager's; TF32 would blur them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(autouse=True)
def all_graphs_are_kept(monkeypatch):
    """Tests count graphs of models that are too small to be worth one."""
    monkeypatch.setattr(CudaDriver, "seconds", lambda self, run: None)


_LOCKS = Path(tempfile.gettempdir())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Several processes run tests on one GPU; one marked ``alone``, which asks for its free memory, waits for the rest.

    Who waits holds the turn, so that no new test begins before. Around all fixtures, which free what a test used.
    """
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
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
