"""The demo's sentence embedding service: real weights and sentences, batch size and token length change."""

from __future__ import annotations

from benchmarks import runners, streams
from benchmarks.rows import Row
from benchmarks.runners import Model
from benchmarks.topics import Settings
from cudagraph_backend.demo import workload

JOBS = ("service",)
LIMIT_S = 200
WAYS = (runners.EAGER, runners.INDUCTOR, runners.STOCK, runners.SHAREDGRAPH)


def run(job: str, settings: Settings) -> list[Row]:
    model, requests = ("mlp", 20) if settings.quick else ("minilm", 200)
    load = workload.build(model, requests, 0, settings.device)
    stream = streams.Stream(
        topic="minilm",
        case=model,
        requests=load.requests,
        prepare=lambda way: way.prepare(Model(load.module, load.requests[0], (), ())),
        tolerance=1e-3,
        settings={"dtype": "float32", "batch": f"1 to {workload.MAX_ROWS}", "shapes": load.distinct_shapes},
        unit=load.unit,
    )
    return streams.run_stream(stream, WAYS, settings)
