"""The host's pool: as many addresses as the system gives."""

from __future__ import annotations

import errno
import mmap
from typing import Any

import pytest
import torch

from cudagraph_backend.drivers import host
from cudagraph_backend.drivers.host import HostMemory


def allow(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    reserve = mmap.mmap

    def limited(fileno: int, length: int, **kwargs: Any) -> mmap.mmap:
        if length > most:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return reserve(fileno, length, **kwargs)

    monkeypatch.setattr(host.mmap, "mmap", limited)


def test_where_addresses_are_limited_fewer_are_reserved(monkeypatch: pytest.MonkeyPatch):
    most = 1 << 28
    allow(monkeypatch, most)
    memory = HostMemory()
    memory.grow(most)
    assert memory.nbytes == most
    with pytest.raises(torch.OutOfMemoryError, match=f"needs {most + 1} bytes; {most} are reserved"):
        memory.grow(most + 1)
    last = memory.bytes_at(most - 8, 8)
    assert torch.equal(last.fill_(7), torch.full((8,), 7, dtype=torch.uint8))
    assert memory.bytes_at(most, 0).numel() == 0


def test_where_hardly_any_are_there_the_error_is_the_systems(monkeypatch: pytest.MonkeyPatch):
    allow(monkeypatch, 1 << 20)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        HostMemory()
