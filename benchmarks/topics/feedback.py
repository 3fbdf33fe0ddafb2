"""A feedback loop, ``x = f(x)``: each output is the next input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks import runners, streams
from benchmarks.rows import Row
from benchmarks.runners import Model, Served, Way, marked
from benchmarks.topics import Settings

JOBS = ("loop",)
LIMIT_S = 120
WAYS = (runners.EAGER, runners.INDUCTOR, runners.STOCK, runners.HANDWRITTEN, runners.SHAREDGRAPH)
WIDTH, LARGEST = 256, 64


class Residual(nn.Module):
    """Three layers added to their input; tanh keeps numbers small however often it is repeated."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + 0.1 * self.layers(x))


def run(job: str, settings: Settings) -> list[Row]:
    device = settings.device
    turns = 5 if settings.quick else 100
    torch.manual_seed(0)
    module = Residual().to(device).eval()
    rows = (5, 16, 3) if settings.quick else (37, 64, 5, 12, 50, 24, 2, 37, 64, 30)
    requests = [marked((torch.randn(n, WIDTH, device=device),), LARGEST) for n in rows]
    largest = marked((torch.randn(LARGEST, WIDTH, device=device),), LARGEST)
    sizes = tuple(size for size in runners.VLLM_SIZES if 2 <= size <= LARGEST)

    def prepare(way: Way) -> Served:
        return looping(way.prepare(Model(module, largest, sizes, (None,))), turns, way is runners.STOCK)

    stream = streams.Stream(
        topic="feedback",
        case="x = f(x)",
        requests=requests,
        prepare=prepare,
        tolerance=1e-3,
        settings={"turns per request": turns, "width": WIDTH, "dtype": "float32", "batch": f"2 to {LARGEST}"},
        scale=turns,
        timed_passes=2 if settings.quick else 10,
    )
    return streams.run_stream(stream, WAYS, settings)


def looping(served: Served, turns: int, must_clone: bool) -> Served:
    """Stock's outputs are gone at the next call, so its user must clone what is fed back."""

    def loop(x: Tensor) -> Tensor:
        for _ in range(turns):
            x = served(x).clone() if must_clone else served(x)
        return x

    return loop
