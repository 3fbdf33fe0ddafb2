"""What the backend owns per device: a driver, the output pool, and a lock."""

from __future__ import annotations

import threading
from weakref import WeakValueDictionary

import torch

from cudagraph_backend.drivers import Driver
from cudagraph_backend.drivers.platforms import new_driver
from cudagraph_backend.memory.output_pool import OutputPool


class Device:
    """What regions on one device share. A call takes it: ``with device as is_within_another_call``."""

    def __init__(self, driver: Driver, pool: OutputPool | None = None):
        self.driver = driver
        self.lock = threading.RLock()
        self._calls = 0
        self.pool = pool or OutputPool(driver.new_memory())

    def __enter__(self) -> bool:
        """Let one thread in; return whether it calls from within another call, made by an operator of that region."""
        self.lock.acquire()
        self._calls += 1
        return self._calls > 1

    def __exit__(self, *error: object) -> None:
        self._calls -= 1
        self.lock.release()

    def poison_free_bytes(self) -> None:
        """Overwrite every byte of the pool in which nothing is live with 0xFF (a NaN in every float format)."""
        for first, end in self.pool.free_spans():
            self.pool.bytes(first, end - first).fill_(0xFF)


class Devices:
    """The devices of the process. One lives as long as a region on it, or as long as somebody holds its pool."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._devices: WeakValueDictionary[torch.device, Device] = WeakValueDictionary()
        self._pools: WeakValueDictionary[torch.device, OutputPool] = WeakValueDictionary()

    def at(self, device: torch.device) -> Device:
        """Return the device's driver and pool, made at the first use."""
        with self._lock:
            found = self._devices.get(device)
            if found is None:
                found = self._devices[device] = Device(new_driver(device), self._pools.get(device))
                self._pools[device] = found.pool
            return found

    def alive(self) -> dict[torch.device, Device]:
        return dict(self._devices)

    def clear(self) -> None:
        """Start anew; outputs that are alive keep the memory that they are in, which is not used any more."""
        self._devices.clear()
        self._pools.clear()
