"""What an output pool needs of the memory behind it."""

from __future__ import annotations

from typing import Protocol

import torch


class Memory(Protocol):
    """Growing memory behind an output pool. Addresses never move; every tensor handed out keeps it alive."""

    device: torch.device
    address: int
    """Of the first byte."""
    nbytes: int
    """Bytes that are really there."""

    def grow(self, nbytes: int) -> None:
        """Provide at least ``nbytes``. Raises ``torch.OutOfMemoryError`` if they can't be had."""

    def bytes_at(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return a uint8 tensor with a storage of its own over ``nbytes`` bytes from ``offset``."""
