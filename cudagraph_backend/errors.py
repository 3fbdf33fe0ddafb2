"""Errors a user can see, and the record of why something was not padded or not captured."""

from __future__ import annotations

from dataclasses import dataclass

import torch


class SharedGraphError(Exception):
    """Base of every error this package raises on purpose."""


class OptionError(SharedGraphError, ValueError):
    """A bad option: names the option, what was given, what is accepted and the cure."""


class PaddingRuleError(SharedGraphError, ValueError):
    """A padding rule that can't be registered, raises an error of its own, or answers what is no answer."""


class WarmupError(SharedGraphError, ValueError):
    """``warmup`` can't tell what to capture, or was given sizes that the function can't have."""


class RefusalError(SharedGraphError, RuntimeError):
    """With ``strict=True``: what would have been a counted refusal is raised instead."""


class AddressError(SharedGraphError, RuntimeError):
    """With ``SHAREDGRAPH_DEBUG=addresses``: a graph would read other memory than an argument of the call."""


class CaptureError(SharedGraphError, RuntimeError):
    """A capture failed and was cleanly aborted."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory could not be had; beyond torch's allocator for CUDA, no exception of its own says so."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a dim was not padded, or a region (or one call of it) was not captured.

    Attributes:
        reason: a short sentence; equal reasons are counted together in ``stats()``.
        op: the ATen operator that refused, e.g. ``aten.mean.dim``, if there is one.
        source: the user's source line that led to the operator, if known.
    """

    reason: str
    op: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        where = f" at {self.source}" if self.source else ""
        what = f" ({self.op})" if self.op else ""
        return f"{self.reason}{what}{where}"
