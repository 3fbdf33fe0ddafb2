"""A model that Dynamo breaks into six regions, served with random batch sizes."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from benchmarks import runners, streams
from benchmarks.rows import Row
from benchmarks.runners import Model, Served, Way, marked
from benchmarks.topics import Settings

JOBS = ("six regions",)
LIMIT_S = 120
WAYS = (runners.EAGER, runners.INDUCTOR, runners.STOCK, runners.SHAREDGRAPH)  # nobody writes six runners by hand
REGIONS = 6


class Broken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(REGIONS))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        x = self.blocks[1](x)
        torch._dynamo.graph_break()
        x = self.blocks[2](x)
        torch._dynamo.graph_break()
        x = self.blocks[3](x)
        torch._dynamo.graph_break()
        x = self.blocks[4](x)
        torch._dynamo.graph_break()
        return self.blocks[5](x)


def run(job: str, settings: Settings) -> list[Row]:
    device = settings.device
    width, largest, requests = (32, 16, 10) if settings.quick else (512, 256, 200)
    torch.manual_seed(0)
    module = Broken(width).to(device).eval()
    draw = random.Random(0)

    def batch(rows: int) -> tuple[Tensor, ...]:
        return marked((torch.randn(rows, width, device=device),), largest)

    def prepare(way: Way) -> Served:
        served = way.prepare(Model(module, batch(largest), (), (None,)))
        return new_step(served) if way is runners.STOCK else served

    stream = streams.Stream(
        topic="graph_breaks",
        case="six regions",
        requests=[batch(draw.randint(2, largest)) for _ in range(requests)],
        prepare=prepare,
        tolerance=1e-3,
        settings={"width": width, "dtype": "float32", "batch": f"2 to {largest}"},
    )
    return streams.run_stream(stream, WAYS, settings)


def new_step(served: Served) -> Served:
    """Stock must be told where a step begins, so that it keeps what one region hands to the next."""

    def step(*batch: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return served(*batch)

    return step
