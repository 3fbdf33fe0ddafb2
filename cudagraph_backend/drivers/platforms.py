"""Platforms: the kinds of devices that regions run on. All that differs between them beside their drivers is here.

To add one: write its driver (``drivers/__init__.py`` says what that must do), and its record below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cudagraph_backend.drivers import Driver
from cudagraph_backend.errors import Refusal


@dataclass(frozen=True, slots=True)
class Platform:
    """One kind of devices.

    Attributes:
        name: what the option ``driver`` calls it.
        matches: tells its devices.
        is_host: whether it is where Python runs: an accelerator's graph can read no memory of it.
        available: whether this machine has such a device.
        needs: what makes it available, in words.
        refusal: why no graph is captured on it, for want of software; ``None`` where all is there.
        new_driver: makes the driver of a device; ``None`` where there is none yet.
        synchronize: waits until a device has done all that was asked of it.
        current: the device of operators that are told of none; ``None`` while the process uses no such device.
        generators: the indices by which ``torch.random.fork_rng`` knows the default generator of a device (the host's,
            which it always keeps, has none).
        forks: whether a forked child may use, and free, what its parent had there.
    """

    name: str
    matches: Callable[[torch.device], bool]
    is_host: bool
    available: Callable[[], bool]
    needs: str
    refusal: Callable[[], Refusal | None]
    new_driver: Callable[[torch.device], Driver] | None
    synchronize: Callable[[torch.device], None]
    current: Callable[[], torch.device | None]
    generators: Callable[[torch.device], Sequence[int]]
    forks: bool


def platform_of(device: torch.device) -> Platform | None:
    """Return the platform of a device; ``None`` if no graph can be captured there."""
    return next((platform for platform in PLATFORMS if platform.matches(device)), None)


def new_driver(device: torch.device) -> Driver:
    """Make the driver of a device; ``driver_refusal`` says whether there is one."""
    platform = platform_of(device)
    assert platform is not None
    assert platform.new_driver is not None
    return platform.new_driver(device)


def generators_of(device: torch.device) -> Sequence[int]:
    """Return the indices by which ``torch.random.fork_rng`` knows the default generator of a device."""
    platform = platform_of(device)
    return () if platform is None else platform.generators(device)


def forks(device: torch.device) -> bool:
    """Return whether a forked child may use, and free, what its parent had on a device."""
    platform = platform_of(device)
    return platform is None or platform.forks


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that was asked of it."""
    platform = platform_of(device)
    if platform is not None:
        platform.synchronize(device)


def current_devices() -> set[torch.device]:
    """Return the devices, one per platform that the process uses, on which operators run that are told of none."""
    return {device for platform in PLATFORMS if (device := platform.current()) is not None}


def unavailable(name: str) -> str | None:
    """Return what this machine lacks for the driver with this name, in words."""
    platform = next(platform for platform in PLATFORMS if platform.name == name)
    return None if platform.available() else platform.needs


def is_accelerator(device: torch.device) -> bool:
    """Return whether graphs are captured on a device that is not the host."""
    platform = platform_of(device)
    return platform is not None and not platform.is_host


def device_refusal(device: torch.device) -> Refusal | None:
    """Return why no platform has a device."""
    return Refusal(f"no graph driver for device {device}") if platform_of(device) is None else None


def driver_refusal(name: str, device: torch.device) -> Refusal | None:
    """Return why the driver that the user chose (the option ``driver``) can't serve a region on a device."""
    if name == "off":
        return Refusal("capture is off (option driver='off')")
    platform = platform_of(device)
    if platform is None:
        return device_refusal(device)
    if platform.new_driver is None:
        return platform.refusal()
    if name not in ("auto", platform.name):
        return Refusal(f"driver {name!r} can't capture a region on {device.type}")
    return platform.refusal()


# ---- the host


def _host_driver(device: torch.device) -> Driver:
    from cudagraph_backend.drivers.host import HostDriver

    return HostDriver(device)


HOST = Platform(
    name="host",
    matches=lambda device: device.type == "cpu",
    is_host=True,
    available=lambda: True,
    needs="nothing",
    refusal=lambda: None,
    new_driver=_host_driver,
    synchronize=lambda device: None,
    current=lambda: torch.device("cpu"),
    generators=lambda device: (),
    forks=True,
)


# ---- CUDA


def _cuda_driver(device: torch.device) -> Driver:
    from cudagraph_backend.drivers.cuda import CudaDriver  # here, as it takes what only CUDA builds have

    return CudaDriver(device)


def _cuda_refusal() -> Refusal | None:
    try:
        from cuda.bindings import driver  # noqa: F401
    except ImportError:
        return Refusal("cuda-bindings is missing: pip install 'cudagraph_backend[cuda]'")
    return None


def _cuda_current() -> torch.device | None:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else None


CUDA = Platform(
    name="cuda",
    matches=lambda device: device.type == "cuda" and torch.version.hip is None,
    is_host=False,
    available=lambda: torch.cuda.is_available(),
    needs="torch.cuda.is_available()",
    refusal=_cuda_refusal,
    new_driver=_cuda_driver,
    synchronize=torch.cuda.synchronize,
    current=_cuda_current,
    generators=lambda device: (device.index,),
    forks=False,
)


# ---- ROCm, whose devices torch calls "cuda", too


ROCM = Platform(
    name="rocm",
    matches=lambda device: device.type == "cuda" and torch.version.hip is not None,
    is_host=False,
    available=lambda: torch.version.hip is not None and torch.cuda.is_available(),
    needs="a ROCm build of torch, and one of its devices",
    refusal=lambda: Refusal("HIP graphs are not supported: this torch is built for ROCm"),
    new_driver=None,
    synchronize=torch.cuda.synchronize,
    current=_cuda_current,
    generators=lambda device: (device.index,),
    forks=False,
)

PLATFORMS = (CUDA, ROCM, HOST)
DRIVERS = tuple(platform.name for platform in PLATFORMS if platform.new_driver is not None)
"""What the option ``driver`` may name."""
