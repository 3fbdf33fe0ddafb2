"""Memory after each capture of a Llama-2-7B-shaped decode step, and the seconds that capturing takes.

Each way runs in a process of its own, so that no allocator holds what another way has left. Sizes are captured from
the largest down, the best order for a shared pool. Size 1 is left out: Dynamo compiles it apart from all others, which
would double the time and says nothing of graphs.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import cudagraph_backend as sg
from benchmarks import decode, rows, runners, timing
from benchmarks.decode import Shape
from benchmarks.rows import Row
from benchmarks.runners import Model, Served, Way
from benchmarks.topics import Settings
from cudagraph_backend.demo.workload import Batch

LIMIT_S = 150
WAYS = {way.name: way for way in (runners.SHAREDGRAPH, runners.STOCK, runners.HANDWRITTEN, runners.CUDAGRAPHS)}
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Variant:
    """A model and the sizes to capture; ``few``: those of ``cudagraphs``, whose weights are no static inputs."""

    shape: Shape
    sizes: tuple[int, ...]
    few: tuple[int, ...]


LLAMA = Shape(4096, 11008, 32, layers=32, vocabulary=32000, slots=256, context=8, logits=False)
VARIANTS = {
    "hidden states, 32 layers": Variant(LLAMA, runners.VLLM_SIZES[1:], (256, 128)),
    # The outputs are what matters here, and four layers compile in a fraction of the time.
    "logits, 4 layers": Variant(
        replace(LLAMA, layers=4, slots=512, logits=True), runners.SIZES_TO_512[1:], (512, 256, 8)
    ),
}
QUICK = Variant(Shape(32, 64, 2, layers=1, vocabulary=64, slots=8, context=8, logits=True), (2, 4, 8), (8,))
# Stable: `cudagraphs` comes last, where time may be up, as it has only a few sizes anyway.
JOBS = tuple(
    sorted((f"{variant}: {way}" for variant in VARIANTS for way in WAYS), key=lambda job: job.endswith(": cudagraphs"))
)


def run(job: str, settings: Settings) -> list[Row]:
    case, _, name = job.rpartition(": ")
    way = WAYS[name]
    if not runners.runs_on(way, settings.device):
        return [rows.left_out("memory", case, name, "needs CUDA")]
    try:
        with torch.inference_mode():
            return measure(case, QUICK if settings.quick else VARIANTS[case], way, settings)
    except Exception as error:
        return [rows.left_out("memory", case, name, rows.failure(error))]
    finally:
        gc.unfreeze()


@dataclass(frozen=True, slots=True)
class Level:
    """Bytes taken since the start: of the GPU, and as PyTorch's allocator counts what it holds."""

    device: int
    allocator: int


def measure(case: str, variant: Variant, way: Way, settings: Settings) -> list[Row]:
    device, shape = settings.device, variant.shape
    module = decode.build_decoder(shape, device, torch.float32 if settings.quick else torch.bfloat16)
    sizes = sorted(variant.few if way is runners.CUDAGRAPHS else variant.sizes, reverse=True)
    inputs = {size: decode.first_step(size, shape, device) for size in sizes}
    expected = {size: module(*inputs[size]).clone() for size in {sizes[0], sizes[len(sizes) // 2], sizes[-1]}}
    captured, start = way.captures(), level(device)
    served = way.prepare(Model(module, inputs[sizes[0]], tuple(variant.sizes), module.padding))
    seconds, levels, error = [], [], 0.0
    for size in sizes:
        began = time.perf_counter()
        calls(served, inputs[size], way.calls_to_replay - 1)
        timing.wait(device)
        seconds.append(time.perf_counter() - began)
        gc.freeze()  # what compiling has left is not searched for garbage after every size
        levels.append(taken(start, level(device)))
        if size in expected:
            error = max(error, runners.relative_error(served(*inputs[size]), expected[size]))
    about = {"layers": shape.layers, "hidden": shape.hidden, "sizes": f"{sizes[-1]} to {sizes[0]}", "count": len(sizes)}
    tell = Telling(case, way, error, 1e-3 if settings.quick else 0.1, about)
    graphs = way.captures() - captured
    return [*tell.series(sizes, levels), *tell.totals(levels, seconds, graphs), *tell.own_counters(way)]


def calls(served: Served, batch: Batch, count: int) -> None:
    """``count`` calls, whose results die at once."""
    for _ in range(count):
        result: Tensor = served(*batch)
        del result


def level(device: torch.device) -> Level | None:
    free = runners.free_memory(device)
    return None if free is None else Level(-free, torch.cuda.memory_reserved(device))


def taken(start: Level | None, now: Level | None) -> Level | None:
    return Level(now.device - start.device, now.allocator - start.allocator) if start and now else None


@dataclass(frozen=True, slots=True)
class Telling:
    """Makes the rows of one way."""

    case: str
    way: Way
    error: float
    tolerance: float
    settings: dict[str, object]

    def row(self, metric: str, unit: str, value: float, step: int | None = None, **more: object) -> Row:
        return Row(
            "memory",
            self.case,
            self.way.name,
            metric,
            unit,
            value,
            step=step,
            error=self.error,
            tolerance=self.tolerance,
            note=self.way.note,
            settings={**self.settings, **more},
        )

    def series(self, sizes: list[int], levels: list[Level | None]) -> list[Row]:
        found = [(i, size, now) for i, (size, now) in enumerate(zip(sizes, levels, strict=True), 1) if now]
        return [
            row
            for i, size, now in found
            for row in (
                self.row("GPU memory", "MiB", now.device / MIB, i, size=size),
                self.row("PyTorch's allocator", "MiB", now.allocator / MIB, i, size=size),
            )
        ]

    def totals(self, levels: list[Level | None], seconds: list[float], graphs: int) -> list[Row]:
        last = levels[-1]
        results = [
            self.row("all other sizes", "s", sum(seconds[1:])),
            self.row("sizes", "", len(seconds)),
            self.row("graphs", "", graphs),
        ]
        if last is not None:
            results.insert(0, self.row("GPU memory", "MiB", last.device / MIB))
            results.insert(1, self.row("PyTorch's allocator", "MiB", last.allocator / MIB))
        return results

    def own_counters(self, way: Way) -> list[Row]:
        """Sharedgraph's: what its outputs take, and what they would take apart."""
        if way is not runners.SHAREDGRAPH:
            return []
        stats = sg.stats()
        return [
            self.row("outputs", "MiB", stats.output_pool_bytes / MIB),
            self.row("outputs if separate", "MiB", stats.sum_of_buckets_bytes / MIB),
            self.row("scratch", "MiB", stats.memory_pool_bytes / MIB),
            self.row("executables", "MiB", stats.executable_bytes / MIB),
        ]
