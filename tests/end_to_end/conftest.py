"""The end-to-end tests run on the CPU with the host driver, which overwrites all that must not be read with NaN."""

from __future__ import annotations

import pytest
import torch

from cudagraph_backend.drivers.host import HostDriver


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Scratch, padded rows that a proof calls irrelevant, and dead output ranges hold NaN."""
    monkeypatch.setattr(HostDriver, "poison", True)
