"""The current CUDA device and stream, for the hot path: without what ``torch.cuda`` looks up first."""

from __future__ import annotations

import torch


def current_stream(device: torch.device) -> tuple[int, int, int]:
    """Return the id of the device's current stream, its device index and its device type."""
    return torch._C._cuda_getCurrentStream(device.index)


def raw_stream(device_index: int) -> int:
    """Return the device's current stream as the driver's handle."""
    return torch._C._cuda_getCurrentRawStream(device_index)


def current_device_index() -> int:
    """Return the index of the current CUDA device, without ``torch.cuda``'s look whether CUDA is initialised."""
    return torch._C._cuda_getDevice()


def is_current_stream_capturing() -> bool:
    """Return whether the current stream is captured, without ``torch.cuda``'s look whether CUDA is initialised."""
    return torch._C._cuda_isCurrentStreamCapturing()
