"""The ways of running a workload: eager, Inductor, stock ``reduce-overhead`` and sharedgraph.

Eager comes first and gives the references. Each other way starts from a reset Dynamo, serves the whole stream untimed
(compiling and capturing as it meets new sizes), and once more with every call timed. Each result of each pass is
compared with eager's.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import cudagraph_backend as sg
from cudagraph_backend import torch_internals
from cudagraph_backend.demo.workload import Batch, Workload

WARM_UP_CALLS = 3

Served = Callable[..., Tensor]
Progress = Callable[[str], None]  # called with the way's name after each request


@dataclass(frozen=True, slots=True)
class Way:
    """One way of running a module.

    Attributes:
        prepare: the module → what is called for each request.
        captures: how many graphs were captured since the last reset, for a device.
        untimed_passes: how often the stream is served before it is timed.
    """

    name: str
    prepare: Callable[[nn.Module], Served]
    captures: Callable[[torch.device], int]
    untimed_passes: int = 1
    cuda_only: bool = False


@dataclass(frozen=True, slots=True)
class WayResult:
    """What running a workload in one way has shown.

    Attributes:
        first_pass_s: seconds that the first pass took in calls, compiling included.
        call_s: seconds of each call of the timed pass.
        max_abs_error: the greatest difference from eager in any pass; infinite if a result was NaN or of a wrong shape.
        device_memory_bytes: how much GPU memory the way took in all and kept (``None`` on a CPU).
        stats: sharedgraph's own counters, for that way alone.
    """

    name: str
    first_pass_s: float
    call_s: tuple[float, ...] = field(repr=False)
    max_abs_error: float
    captures: int
    device_memory_bytes: int | None = None
    stats: dict[str, Any] | None = None
    explanation: str | None = None

    @property
    def median_ms(self) -> float:
        return quantile(self.call_s, 0.5) * 1e3

    @property
    def p95_ms(self) -> float:
        return quantile(self.call_s, 0.95) * 1e3


def quantile(values: Sequence[float], q: float) -> float:
    """Return the ``q``-quantile of ``values``, linear between the two nearest ranks."""
    if not values:
        raise ValueError("a quantile needs at least one value")
    ordered = sorted(values)
    rank = q * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def max_abs_error(result: Tensor, expected: Tensor) -> float:
    """Return the greatest absolute difference; infinite if shapes or dtypes differ, or if it is not a number."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return math.inf
    error = (result - expected).abs().max().item() if expected.numel() else 0.0
    return math.inf if math.isnan(error) else float(error)


EAGER = Way("eager", lambda module: module, lambda device: 0, untimed_passes=0)
WAYS = (
    EAGER,
    Way("inductor", torch.compile, lambda device: 0),
    # Stock warms up the first time it meets a size and records the second time; only the third is a replay.
    Way(
        "reduce-overhead",
        lambda module: torch.compile(module, mode="reduce-overhead"),
        torch_internals.stock_graph_count,
        untimed_passes=2,
        cuda_only=True,
    ),
    Way("sharedgraph", lambda module: torch.compile(module, backend="sharedgraph"), lambda device: sg.stats().captures),
)


def calls_in_all(ways: Iterable[Way], requests: int) -> int:
    """Count the reports of progress: eager always runs, for the references, and every other way in all its passes."""
    return requests * (1 + sum(way.untimed_passes + 1 for way in ways if way != EAGER))


@torch.inference_mode()
def run_eager(workload: Workload, progress: Progress) -> tuple[WayResult, list[Tensor]]:
    """Time eager, and keep its results as references. It compiles nothing, so a few calls warm it up."""
    device = workload.requests[0][0].device
    for batch in workload.requests[:WARM_UP_CALLS]:
        workload.module(*batch)
    free_before = _free_memory(device)
    seconds: list[float] = []
    references: list[Tensor] = []
    for batch in workload.requests:
        took, result = _timed(workload.module, batch, device)
        seconds.append(took)
        references.append(result)
        progress(EAGER.name)
    kept = sum(result.untyped_storage().nbytes() for result in references)
    memory = _taken(free_before, device)
    return WayResult(
        name=EAGER.name,
        first_pass_s=sum(seconds),
        call_s=tuple(seconds),
        max_abs_error=0.0,
        captures=0,
        device_memory_bytes=None if memory is None else max(0, memory - kept),
    ), references


@torch.inference_mode()
def run_way(way: Way, workload: Workload, references: Sequence[Tensor], progress: Progress) -> WayResult:
    """Serve the stream in one way, from a clean start."""
    device = references[0].device
    torch.compiler.reset()
    sg.reset()
    free_before = _free_memory(device)
    served = way.prepare(workload.module)
    seconds: list[float] = []
    error = 0.0
    passes: list[tuple[float, ...]] = []
    for _ in range(way.untimed_passes + 1):
        seconds = []
        for batch, expected in zip(workload.requests, references, strict=True):
            took, off = _serve(served, batch, expected)
            seconds.append(took)
            error = max(error, off)
            progress(way.name)
        passes.append(tuple(seconds))
    memory = _taken(free_before, device)
    ours = way.name == "sharedgraph"
    return WayResult(
        name=way.name,
        first_pass_s=sum(passes[0]),
        call_s=passes[-1],
        max_abs_error=error,
        captures=way.captures(device),
        device_memory_bytes=memory,
        stats=sg.stats().as_dict() if ours else None,
        explanation=sg.explain() if ours else None,
    )


def _serve(served: Served, batch: Batch, expected: Tensor) -> tuple[float, float]:
    """Return the seconds that one call took, and its error. The result dies here, as once a server has sent it."""
    took, result = _timed(served, batch, expected.device)
    return took, max_abs_error(result, expected)


def _timed(served: Served, batch: Batch, device: torch.device) -> tuple[float, Tensor]:
    """Return the seconds from the call until the device has the result ready, and the result."""
    _wait(device)
    start = time.perf_counter()
    result = served(*batch)
    _wait(device)
    return time.perf_counter() - start, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_memory(device: torch.device) -> int | None:
    """Return the free bytes of the GPU once everything that can be given back was given back."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize(device)
    return torch.cuda.mem_get_info(device)[0]


def _taken(free_before: int | None, device: torch.device) -> int | None:
    """Return how much of the GPU's memory was taken since, and not given back."""
    free_now = _free_memory(device)
    return None if free_before is None or free_now is None else free_before - free_now
