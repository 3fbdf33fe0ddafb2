"""What a call costs the host: small regions with more and more kernels and parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import rows, runners, timing
from benchmarks.rows import Row
from benchmarks.runners import Model, Served, marked
from benchmarks.topics import Settings

JOBS = ("regions",)
LIMIT_S = 200
WAYS = (runners.EAGER, runners.INDUCTOR, runners.STOCK, runners.HANDWRITTEN, runners.SHAREDGRAPH)
RAW = "raw replay"
WIDTH, BUCKET = 64, 8
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Case:
    kernels: int
    parameters: int

    def __str__(self) -> str:
        return f"{self.kernels} kernels, {self.parameters} parameters"


FULL = (Case(1, 1), Case(10, 1), Case(100, 1), Case(1000, 1), Case(300, 30), Case(300, 300))
QUICK = (Case(1, 1), Case(4, 2))


class Chain(nn.Module):
    """Matrix products, one after the other: nothing fuses, so each is a kernel. Orthogonal weights keep the numbers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        weights = (nn.init.orthogonal_(torch.empty(WIDTH, WIDTH)) for _ in range(case.parameters))
        self.weights = nn.ParameterList(weights)
        self.kernels = case.kernels

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.kernels):
            x = x @ self.weights[index % len(self.weights)]
        return x


def run(job: str, settings: Settings) -> list[Row]:
    results = []
    with torch.inference_mode():
        for case in QUICK if settings.quick else FULL:
            try:
                results += measure(case, settings)
            except Exception as error:  # the other cases are worth having
                results.append(rows.left_out("host_cost", str(case), "all", rows.failure(error)))
            runners.forget_everything()
    return results


def measure(case: Case, settings: Settings) -> list[Row]:
    """A call that fills its bucket, and one with a row less, which is padded where there are buckets."""
    device = settings.device
    torch.manual_seed(0)
    module = Chain(case).to(device).eval()
    full, padded = (marked((torch.randn(n, WIDTH, device=device),), BUCKET) for n in (BUCKET, BUCKET - 1))
    expected = {n: module(*batch) for n, batch in ((BUCKET, full), (BUCKET - 1, padded))}
    ways = [way for way in WAYS if runners.runs_on(way, device)]
    served = {way.name: way.prepare(Model(module, full, (BUCKET,), (None,))) for way in ways}
    results = [rows.left_out("host_cost", str(case), way.name, "needs CUDA") for way in WAYS if way not in ways]
    for batch, title in ((full, str(case)), (padded, f"{case}, padded")):
        errors = {name: checked(call, batch[0], expected[len(batch[0])]) for name, call in served.items()}
        calls = {name: caller(call, batch[0]) for name, call in served.items()}
        if batch is full:
            handwritten = served[runners.HANDWRITTEN.name]
            assert isinstance(handwritten, runners.HandWritten)
            calls[RAW] = handwritten.raw(BUCKET)
        results += timed(case, title, calls, errors, settings)
    return results


def checked(call: Served, x: Tensor, expected: Tensor) -> float:
    """The greatest error of a few calls, which leave everything compiled and captured."""
    return max(runners.relative_error(call(x), expected) for _ in range(4))


def caller(call: Served, x: Tensor) -> Callable[[], object]:
    return lambda: call(x)


def timed(
    case: Case, title: str, calls: dict[str, Callable[[], object]], errors: dict[str, float], settings: Settings
) -> list[Row]:
    device = settings.device
    rounds = 5 if settings.quick else 30
    # Few enough that the driver's queue does not fill up: then the host would wait for the GPU.
    repeats = max(1, min(50, 500 // case.kernels))
    metrics: dict[str, Callable[[Callable[[], object]], float]] = {
        "host time per call": lambda call: timing.enqueue_seconds(call, repeats, device),
        "wall time per call": lambda call: timing.wall_seconds(call, device),
        "GPU time per call": lambda call: timing.gpu_seconds(call, device),
    }
    if device.type != "cuda":
        del metrics["GPU time per call"]
    about = {"kernels": case.kernels, "parameters": case.parameters, "calls per sample": repeats, "dtype": "float32"}
    results = []
    for metric, measure_one in metrics.items():
        measures = {name: functools.partial(measure_one, call) for name, call in calls.items()}
        for name, samples in timing.interleaved(measures, rounds).items():
            found = timing.spread(samples, 1e6)
            quantiles = (found.median, found.p20, found.p80, found.samples)
            error = errors.get(name)
            row = Row("host_cost", title, name, metric, "µs", *quantiles, None, error, TOLERANCE, settings=about)
            results.append(row)
    return results
