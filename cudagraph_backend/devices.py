"""What the backend owns per device: a driver, the output pool, the places in the step, and a lock."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable

import torch

from cudagraph_backend.drivers import Driver
from cudagraph_backend.drivers.host import HostDriver
from cudagraph_backend.errors import Refusal
from cudagraph_backend.options import DriverName
from cudagraph_backend.output_pool import OutputPool
from cudagraph_backend.tree import Place

_DRIVER_OF = {"cpu": "host", "cuda": "cuda"}


class Device:
    def __init__(self, driver: Driver):
        self.driver = driver
        self.lock = threading.RLock()
        self.pool = OutputPool(driver.new_memory())
        self._places: weakref.WeakValueDictionary[Hashable, Place] = weakref.WeakValueDictionary()

    def place(self, key: Hashable) -> Place:
        """The place named ``key``; it lives as long as a region holds it."""
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = Place(self.pool)
        return place

    def poison_dead_ranges(self) -> None:
        """Overwrite every byte of the pool that no live output holds with 0xFF (a NaN in every float format)."""
        for dead in self.pool.dead_ranges():
            dead.bytes(dead.nbytes).fill_(0xFF)


def make_device(device: torch.device) -> Device:
    if device.type == "cuda":
        from cudagraph_backend.drivers.cuda import CudaDriver

        return Device(CudaDriver(device))
    return Device(HostDriver(device))


def driver_refusal(name: DriverName, device: torch.device) -> Refusal | None:
    """Why the driver that the user chose can't serve a region on ``device``."""
    if name == "off":
        return Refusal("capture is off (option driver='off')")
    fitting = _DRIVER_OF[device.type]
    if name not in ("auto", fitting):
        return Refusal(f"driver {name!r} can't capture a region on {device.type}")
    if fitting == "cuda" and not _has_cuda_bindings():
        return Refusal("cuda-bindings is missing: pip install 'cudagraph_backend[cuda]'")
    return None


def _has_cuda_bindings() -> bool:
    try:
        from cuda.bindings import driver  # noqa: F401
    except ImportError:
        return False
    return True
