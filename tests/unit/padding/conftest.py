"""Tests of the analysis alone: nothing is captured, so nothing can be left behind."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Overrides the costly check for leaks: these tests build graphs and pools of no driver."""
    torch.manual_seed(0)
