"""The records of platforms: all that differs between kinds of devices is there."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from cudagraph_backend.drivers.platforms import (
    CUDA,
    DRIVERS,
    PLATFORMS,
    driver_refusal,
    forks,
    generators_of,
    new_driver,
    platform_of,
    synchronize,
)


def test_names_are_apart_and_those_with_a_driver_are_options():
    names = [platform.name for platform in PLATFORMS]
    assert len(names) == len(set(names))
    assert set(DRIVERS) == {platform.name for platform in PLATFORMS if platform.new_driver is not None}


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda platform: platform.name)
def test_a_driver_has_its_device_and_does_not_poison(platform):
    device = platform.current() if platform.available() else None
    if device is None or platform.new_driver is None:
        pytest.skip(f"this process uses no device of {platform.name}")
    assert platform_of(device) is platform
    driver = new_driver(device)
    assert driver.device == device
    assert not driver.poison


def test_a_device_of_no_platform():
    meta = torch.device("meta")
    assert platform_of(meta) is None
    assert generators_of(meta) == ()
    assert forks(meta)
    synchronize(meta)  # there is nothing to wait for


@pytest.mark.parametrize("driver", ["auto", "cuda"])
def test_rocm_is_refused_by_its_name(driver, monkeypatch):
    """Its devices are called "cuda" by torch, too."""
    monkeypatch.setattr(torch.version, "hip", "6.0")
    refusal = driver_refusal(driver, torch.device("cuda", 0))
    assert refusal is not None
    assert "HIP graphs are not supported" in refusal.reason


def test_a_device_has_the_driver_of_its_platform_alone():
    on_cpu, on_meta = driver_refusal("cuda", torch.device("cpu")), driver_refusal("auto", torch.device("meta"))
    assert on_cpu is not None
    assert on_cpu.reason == "driver 'cuda' can't capture a region on cpu"
    assert on_meta is not None
    assert on_meta.reason == "no graph driver for device meta"
    assert driver_refusal("host", torch.device("cpu")) is None


@pytest.mark.parametrize("is_there", [False, True])
def test_a_gpu_is_refused_without_the_bindings_of_cuda(is_there: bool, monkeypatch: pytest.MonkeyPatch):
    bindings = ModuleType("cuda.bindings")
    bindings.driver = ModuleType("cuda.bindings.driver")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings if is_there else None)
    refusal = CUDA.refusal()
    assert (refusal is None) == is_there
    assert refusal is None or "pip install 'cudagraph_backend[cuda]'" in refusal.reason
