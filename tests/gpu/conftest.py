"""Everything here needs a CUDA GPU; where there is none it is skipped, with that reason."""

from __future__ import annotations

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


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
