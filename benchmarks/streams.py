"""A stream of requests served in every way: compiled, a first pass, timed passes in turn, all checked against eager."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows, runners, timing
from benchmarks.rows import Row
from benchmarks.runners import Served, Way
from benchmarks.topics import Settings
from cudagraph_backend.demo.ways import quantile
from cudagraph_backend.demo.workload import Batch

BLOCK = 10  # requests that one way serves before the next one's turn


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests, and what answers them.

    Attributes:
        prepare: a way → what is called for each request. What it changes (weights, caches) is its own.
        begin: called before each pass, where what answers has to be as it was in the beginning.
        unit: what one row of a request is, in the plural.
        check_every: compare only one result of so many, where all of them would not fit in memory.
        scale: how many calls of the model one request makes; times are per call.
        percentiles: which of the time per call are told.
        shuffled: serve each timed pass in an order of its own.
        must_be_right: a way whose first two passes are wrong has failed, and is not timed.
    """

    topic: str
    case: str
    requests: Sequence[Batch]
    prepare: Callable[[Way], Served]
    tolerance: float
    settings: dict[str, object]
    unit: str = "rows"
    begin: Callable[[Served], None] = lambda served: None
    check_every: int = 1
    scale: int = 1
    grad: bool = False
    timed_passes: int = 2
    percentiles: Sequence[int] = (99,)
    shuffled: bool = False
    must_be_right: bool = False

    def extremes(self) -> tuple[Batch, Batch]:
        """The smallest and the largest request: after these, all is compiled."""
        ordered = sorted(self.requests, key=lambda batch: batch[0].shape[0])
        return ordered[0], ordered[-1]

    def rows(self) -> int:
        return sum(batch[0].shape[0] for batch in self.requests)


@dataclass(slots=True)
class Lane:
    """One way, and what was seen of it so far."""

    way: Way
    served: Served | None = None
    compiling_s: float = 0.0
    first_s: list[float] = field(default_factory=list)
    timed_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    error: float = 0.0
    captures: int = 0
    memory: int | None = None
    failure: str = ""

    def running(self) -> Served:
        """What answers requests. A way that has failed is not asked."""
        assert self.served is not None
        return self.served


def run_stream(stream: Stream, ways: Sequence[Way], settings: Settings) -> list[Row]:
    """Rows for each way; one that can't run here, or fails, gets a row that says so."""
    device = settings.device
    runners.warm_up_compiler(device)
    try:
        return _rows_of_ways(stream, ways, device)
    finally:
        gc.unfreeze()


def _rows_of_ways(stream: Stream, ways: Sequence[Way], device: torch.device) -> list[Row]:
    with torch.inference_mode(not stream.grad):
        references = _references(stream)
        lanes = [_first_passes(stream, way, references, device) for way in ways if runners.runs_on(way, device)]
        for number in range(stream.timed_passes):
            _timed_pass(stream, lanes, number, device)
        for lane in lanes:
            _attempt(lane, partial(_pass, stream, lane, references, device))
    absent = [way for way in ways if not runners.runs_on(way, device)]
    told = [rows.left_out(stream.topic, stream.case, way.name, "needs CUDA") for way in absent]
    return [row for lane in lanes for row in _rows(stream, lane)] + told


def _references(stream: Stream) -> list[Tensor | None]:
    served = stream.prepare(runners.EAGER)
    stream.begin(served)
    results: list[Tensor | None] = []
    for index, batch in enumerate(stream.requests):
        result = served(*batch)
        results.append(result.detach().clone() if index % stream.check_every == 0 else None)
    return results


def _first_passes(stream: Stream, way: Way, references: Sequence[Tensor | None], device: torch.device) -> Lane:
    """Compile, serve the stream, and once more: stock records a size only when it is met again."""
    lane = Lane(way)
    captured_before, free_before = way.captures(), runners.free_memory(device)

    def passes() -> None:
        with runners.own_cache():
            start = time.perf_counter()
            lane.served = served = stream.prepare(way)
            stream.begin(served)
            for batch in stream.extremes():
                served(*batch)
            timing.wait(device)
            lane.compiling_s = time.perf_counter() - start
            gc.collect()
            gc.freeze()  # what compiling has left; else a call somewhere waits for half a second while it is searched
            lane.first_s = _pass(stream, lane, references, device)
            _pass(stream, lane, references, device)
        if stream.must_be_right and not lane.error <= stream.tolerance:
            raise ArithmeticError(f"off by {lane.error:.1e} of the greatest, where {stream.tolerance:.0e} is allowed")

    _attempt(lane, passes)
    free_now = runners.free_memory(device)
    lane.captures = way.captures() - captured_before
    lane.memory = free_before - free_now if free_before is not None and free_now is not None else None
    return lane


def _attempt(lane: Lane, action: Callable[[], object]) -> None:
    """One way that fails must not cost the results of the others."""
    if lane.failure:
        return
    try:
        action()
    except Exception as error:
        lane.failure = rows.failure(error)


def _pass(stream: Stream, lane: Lane, references: Sequence[Tensor | None], device: torch.device) -> list[float]:
    """Serve the stream, compare results, and return the seconds of each call."""
    served = lane.running()
    stream.begin(served)
    seconds = []
    for batch, expected in zip(stream.requests, references, strict=True):
        timing.wait(device)
        start = time.perf_counter()
        result = served(*batch)
        timing.wait(device)
        seconds.append(time.perf_counter() - start)
        if expected is not None:
            lane.error = max(lane.error, runners.relative_error(result.detach(), expected))
        del result
    return seconds


def _timed_pass(stream: Stream, lanes: Sequence[Lane], number: int, device: torch.device) -> None:
    requests = list(stream.requests)
    if stream.shuffled:
        random.Random(number).shuffle(requests)
    for lane in lanes:
        _attempt(lane, partial(_begin, stream, lane))
    for start in range(0, len(requests), BLOCK):
        block = requests[start : start + BLOCK]
        for lane in lanes:
            _attempt(lane, partial(_timed_block, stream, lane, block, device))


def _begin(stream: Stream, lane: Lane) -> None:
    stream.begin(lane.running())


def _timed_block(stream: Stream, lane: Lane, block: Sequence[Batch], device: torch.device) -> None:
    served = lane.running()
    seconds = [timing.wall_seconds(partial(served, *batch), device) for batch in block]
    lane.timed_s += [each / stream.scale for each in seconds]
    lane.rates.append(stream.scale * sum(batch[0].shape[0] for batch in block) / sum(seconds))


def _rows(stream: Stream, lane: Lane) -> list[Row]:
    if lane.failure:
        return [rows.left_out(stream.topic, stream.case, lane.way.name, lane.failure)]
    about: dict[str, Any] = {
        "error": lane.error,
        "tolerance": stream.tolerance,
        "note": lane.way.note,
        "settings": {"requests": len(stream.requests), "timed passes": stream.timed_passes, **stream.settings},
    }

    def row(metric: str, unit: str, value: float | timing.Spread) -> Row:
        known = value if isinstance(value, timing.Spread) else timing.Spread(value, value, value, 1)
        return Row(
            stream.topic,
            stream.case,
            lane.way.name,
            metric,
            unit,
            known.median,
            known.p20,
            known.p80,
            known.samples,
            **about,
        )

    results = [
        row("time per call", "ms", timing.spread(lane.timed_s, 1e3)),
        *[row(f"{each}th percentile", "ms", quantile(lane.timed_s, each / 100) * 1e3) for each in stream.percentiles],
        row("throughput", f"{stream.unit}/s", timing.spread(lane.rates)),
        row("compiling", "s", lane.compiling_s),
        row("first pass", "s", sum(lane.first_s)),
        row("throughput of the first pass", f"{stream.unit}/s", stream.scale * stream.rows() / sum(lane.first_s)),
        row("longest stall", "s", max(lane.first_s)),
        row("graphs", "", lane.captures),
    ]
    return results + ([row("GPU memory", "MiB", lane.memory / 2**20)] if lane.memory is not None else [])
