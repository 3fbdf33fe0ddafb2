"""Measuring: interleaved rounds, medians with the 20th and 80th percentile, host time and GPU time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cudagraph_backend.demo.ways import quantile

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    p20: float
    p80: float
    samples: int


def spread(values: Sequence[float], scale: float = 1.0) -> Spread:
    """Of ``values`` times ``scale``."""
    median, p20, p80 = (quantile(values, q) * scale for q in (0.5, 0.2, 0.8))
    return Spread(median, p20, p80, len(values))


def interleaved(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """A B C, A B C, …: what drifts (clocks, other users of the machine) meets every variant alike."""
    samples: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            samples[name].append(measure())
    return samples


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def enqueue_seconds(call: Call, repeats: int, device: torch.device) -> float:
    """The host's seconds per call when it does not wait for the GPU in between.

    ``repeats`` must be few: once the driver's queue is full, the host waits for the GPU after all.
    """
    wait(device)
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    seconds = (time.perf_counter_ns() - start) / repeats / 1e9
    wait(device)
    return seconds


def wall_seconds(call: Call, device: torch.device) -> float:
    """Seconds from the call until the GPU has finished it."""
    wait(device)
    start = time.perf_counter_ns()
    call()
    wait(device)
    return (time.perf_counter_ns() - start) / 1e9


def gpu_seconds(call: Call, device: torch.device) -> float:
    """Seconds between two CUDA events around a call; the host's time on a CPU."""
    if device.type != "cuda":
        return wall_seconds(call, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3
