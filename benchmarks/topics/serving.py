"""A continuous-batching decode loop: the number of requests in flight is a random walk."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import decode, runners, streams
from benchmarks.decode import Shape
from benchmarks.rows import Row
from benchmarks.runners import Model, Served, Way
from benchmarks.topics import Settings

JOBS = ("decode",)
LIMIT_S = 200
WAYS = (
    runners.EAGER,
    runners.INDUCTOR,
    runners.STOCK,
    runners.HANDWRITTEN,
    runners.SHAREDGRAPH,
    runners.WARMED_UP,
)

FULL = Shape(2048, 5504, 16, layers=4, vocabulary=8192, slots=256, context=64, logits=True)
QUICK = Shape(32, 64, 2, layers=1, vocabulary=64, slots=8, context=8, logits=True)


def run(job: str, settings: Settings) -> list[Row]:
    shape, device = (QUICK if settings.quick else FULL), settings.device
    dtype = torch.float32 if settings.quick else torch.bfloat16
    steps = 20 if settings.quick else 300
    sizes = tuple(size for size in runners.VLLM_SIZES if size <= shape.slots)

    # Each way has its own, as the cache is part of it; made before memory is measured.
    modules = {way.name: decode.build_decoder(shape, device, dtype) for way in WAYS}
    # Made here, as the requests are: for tensors that are made in inference mode Dynamo compiles apart.
    examples = {size: decode.first_step(size, shape, device) for size in {shape.slots, *sizes}}

    def prepare(way: Way) -> Served:
        module = modules[way.name]
        served = way.prepare(Model(module, examples[shape.slots], sizes, module.padding))
        if way is runners.HANDWRITTEN and not settings.quick:
            for size in reversed(sizes):  # at the start, as such a runner does
                served(*examples[size])
        return sampling(served)

    stream = streams.Stream(
        topic="serving",
        case="decode step",
        requests=decode.random_walk(steps, shape, device, stride=max(1, shape.slots // 16)),
        prepare=prepare,
        tolerance=1e-3 if settings.quick else 0.1,
        settings={
            "layers": shape.layers,
            "hidden": shape.hidden,
            "vocabulary": shape.vocabulary,
            "context": shape.context,
            "dtype": str(dtype).removeprefix("torch."),
            "batch": f"1 to {shape.slots}",
        },
        unit="tokens",
        check_every=10,
    )
    return streams.run_stream(stream, WAYS, settings)


def sampling(served: Served) -> Served:
    """With what a server does at each step: choose the tokens and hand them to the host."""

    def step(*batch: Tensor) -> Tensor:
        logits = served(*batch)
        logits.argmax(-1).cpu()
        return logits

    return step
