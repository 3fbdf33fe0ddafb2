"""The end-to-end tests run on the CPU with the host driver, which overwrites all that must not be read with NaN.

Where there is a GPU, those that ask for ``device`` run there as well, but for those marked ``host_only``.
"""

from __future__ import annotations

import pytest
import torch

from cudagraph_backend.drivers.host import HostDriver
from cudagraph_backend.padding.call import RULES


def pytest_generate_tests(metafunc):
    """Decides when tests are collected: where there is no GPU, nothing has to be skipped."""
    if "device" not in metafunc.fixturenames:
        return
    host_only = metafunc.definition.get_closest_marker("host_only")
    if host_only is not None and not host_only.args:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: host_only must say why")
    devices = ["cpu"]
    if torch.cuda.is_available() and host_only is None:
        devices.append(pytest.param("cuda", marks=pytest.mark.cuda))
    metafunc.parametrize("device", devices, indirect=True)


@pytest.fixture(autouse=True)
def poison(is_on_a_gpu, monkeypatch):
    """Scratch, padded rows that a proof calls irrelevant, and dead output ranges hold NaN."""
    if not is_on_a_gpu:
        monkeypatch.setattr(HostDriver, "poison", True)


@pytest.fixture
def no_rules_left():
    known = dict(RULES)
    yield
    RULES.clear()
    RULES.update(known)
