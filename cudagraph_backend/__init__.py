"""sharedgraph: a ``torch.compile`` backend whose CUDA graphs of all sizes share one pooled output tensor.

The way of the data::

    torch.compile(model, backend="sharedgraph", options={...})
     1  Dynamo     an FX graph, with symbolic sizes for dynamic dims
     2  backend    options parsed strictly; composes what follows            backend, options
     3  analyse    inputs, outputs, dynamic dims and their padding verdict   compile/, padding/, graph/
     4  Inductor   each region (or part of one) compiled once for all sizes  compile/region_compile
     -- compile time above, once per region; call time below -------------------------------------
     5  plan       sizes of the call -> plan -> bucket                       runtime/planner
     6  find       addresses of the call -> route -> place -> graph          runtime/finder, runtime/places
     7  stage      real rows to where the graph reads, padded rows filled    memory/copies, drivers/staging_kernel
     8  replay     one launch; scratch in the memory pool                    drivers/
     9  outputs    views of the real rows, in the output pool                runtime/layout, memory/
"""

from __future__ import annotations

from typing import Any

import torch

from cudagraph_backend.backend import sharedgraph
from cudagraph_backend.errors import (
    AddressError,
    CaptureError,
    OptionError,
    PaddingRuleError,
    Refusal,
    RefusalError,
    SharedGraphError,
    WarmupError,
)
from cudagraph_backend.memory.output_pool import OutputPool
from cudagraph_backend.options import Options
from cudagraph_backend.padding import padding_rule
from cudagraph_backend.report import AliasInfo, Stats, alias_info_of, explanation_of, stats_of
from cudagraph_backend.warmup import WarmedSize, warmup

__all__ = [
    "AddressError",
    "AliasInfo",
    "CaptureError",
    "OptionError",
    "Options",
    "OutputPool",
    "PaddingRuleError",
    "Refusal",
    "RefusalError",
    "SharedGraphError",
    "Stats",
    "WarmedSize",
    "WarmupError",
    "alias_info",
    "configure",
    "explain",
    "output_pool",
    "padding_rule",
    "reset",
    "sharedgraph",
    "stats",
    "unconfigure",
    "warmup",
]


def configure(**options: Any) -> dict[str, Any]:
    """Set options for the process, for callers that can't pass ``options=``; returns all that are set so.

    They are checked at once, add to what earlier calls have set, and hold for what is compiled from now on. Option by
    option (``inductor``: setting by setting) they win over the environment variable ``SHAREDGRAPH_OPTIONS``, and the
    ``mode`` and ``options`` of ``torch.compile`` over them. ``reset()`` leaves them alone; ``unconfigure()`` forgets
    them.

    Raises:
        OptionError: an unknown name, a wrong type or an impossible value; nothing is set then.
    """
    return sharedgraph.configure(**options)


def unconfigure() -> None:
    """Forget all that ``configure`` has set."""
    sharedgraph.unconfigure()


def stats() -> Stats:
    """Return counts and memory since the last reset."""
    return stats_of(sharedgraph)


def explain() -> str:
    """Return a text on each region: where it is from, what is padded or captured, what is not and why; and memory."""
    return explanation_of(sharedgraph)


def reset() -> None:
    """Free all graphs, buffers and pools. Outputs stay valid; compiled functions capture anew when called.

    Marks of steps that were made before count no more. What ``configure`` has set stays.
    """
    sharedgraph.reset()


def output_pool(device: torch.device | str | int) -> OutputPool:
    """Return the output pool of a device: ``.tensor`` (uint8) and ``.nbytes``. Made, empty, if there is none yet."""
    return sharedgraph.device(torch.empty(0, device=device).device).pool  # its index, where none is given


def alias_info(tensor: torch.Tensor) -> AliasInfo | None:
    """Return where in the pool ``tensor`` lies, and the output it is or is a view of; ``None`` if not in the pool."""
    return alias_info_of(sharedgraph, tensor)
