"""The records of platforms: all that differs between kinds of devices is there."""

from __future__ import annotations

import pytest
import torch

from cudagraph_backend.drivers.platforms import DRIVERS, PLATFORMS, driver_refusal, new_driver, platform_of


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
    assert platform_of(torch.device("meta")) is None


@pytest.mark.parametrize("driver", ["auto", "cuda"])
def test_rocm_is_refused_by_its_name(driver, monkeypatch):
    """Its devices are called "cuda" by torch, too."""
    monkeypatch.setattr(torch.version, "hip", "6.0")
    refusal = driver_refusal(driver, torch.device("cuda", 0))
    assert refusal is not None
    assert "HIP graphs are not supported" in refusal.reason
