"""Outputs that the caller keeps: none, the last one, the last three, or very many of them."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn

from benchmarks import runners, streams
from benchmarks.rows import Row
from benchmarks.runners import Model, Served, Way, marked
from benchmarks.topics import Settings

KEPT = {"none": 0, "the last one": 1, "the last three": 3, "the last 300": 300}
JOBS = tuple(KEPT)
LIMIT_S = 120
WAYS = (runners.EAGER, runners.INDUCTOR, runners.STOCK, runners.SHAREDGRAPH)
WIDTH, WIDE, LARGEST = 256, 4096, 64


def run(job: str, settings: Settings) -> list[Row]:
    device = settings.device
    torch.manual_seed(0)
    wide = nn.Linear(WIDTH, WIDE)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), wide)
    module = module.to(device).eval()
    rows = (5, 16, 3) if settings.quick else (37, 64, 5, 12, 50, 24, 2, 37, 64, 30)
    requests = [marked((torch.randn(n, WIDTH, device=device),), LARGEST) for n in rows * (1 if settings.quick else 20)]
    largest = marked((torch.randn(LARGEST, WIDTH, device=device),), LARGEST)
    sizes = tuple(size for size in runners.VLLM_SIZES if 2 <= size <= LARGEST)

    def prepare(way: Way) -> Served:
        return keeping(way.prepare(Model(module, largest, sizes, (None,))), KEPT[job], way is runners.STOCK)

    stream = streams.Stream(
        topic="kept",
        case=f"outputs kept: {job}",
        requests=requests,
        prepare=prepare,
        tolerance=1e-3,
        settings={"width": WIDTH, "output": WIDE, "dtype": "float32", "batch": f"2 to {LARGEST}"},
        timed_passes=2 if settings.quick else 10,
    )
    return streams.run_stream(stream, WAYS, settings)


def keeping(served: Served, count: int, must_clone: bool) -> Served:
    """Stock's outputs are gone at the next call, so its user must clone what is kept."""
    kept: deque[Tensor] = deque(maxlen=count)

    def call(x: Tensor) -> Tensor:
        out = served(x).clone() if must_clone and count else served(x)
        kept.append(out)
        return out

    return call
