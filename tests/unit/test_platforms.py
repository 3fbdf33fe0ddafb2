"""The records of platforms: all that differs between kinds of devices is there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import cudagraph_backend
from cudagraph_backend.drivers.platforms import DRIVERS, HOST, PLATFORMS, new_driver, platform_of

PACKAGE = Path(cudagraph_backend.__file__).parent
AT_HOME = ("drivers", "demo")  # the demo is a program of its own, which asks the user for a device


def test_no_other_module_names_a_type_of_devices_that_only_some_machines_have():
    names = {platform.name for platform in PLATFORMS} - {HOST.name}
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in AT_HOME
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert found == []


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
