"""A training step (forward, backward, optimizer) whose batch size changes."""

from __future__ import annotations

import copy
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import runners, streams
from benchmarks.rows import Row
from benchmarks.runners import Model, Served, Way, marked
from benchmarks.topics import Settings

JOBS = ("steps",)
LIMIT_S = 150
WAYS = (runners.EAGER, runners.INDUCTOR, runners.STOCK, runners.SHAREDGRAPH)
CLASSES = 10


def run(job: str, settings: Settings) -> list[Row]:
    device = settings.device
    width, layers, largest, requests = (16, 2, 16, 10) if settings.quick else (512, 8, 128, 100)
    torch.manual_seed(0)
    module = classifier(width, layers).to(device)
    draw = random.Random(0)

    def batch(rows: int) -> tuple[Tensor, ...]:
        x, labels = torch.randn(rows, width, device=device), torch.randint(CLASSES, (rows,), device=device)
        return marked((x, labels), largest)

    stream = streams.Stream(
        topic="training",
        case="step",
        requests=[batch(draw.randint(2, largest)) for _ in range(requests)],
        prepare=lambda way: TrainingStep(module, way, batch(largest)),
        tolerance=1e-3,
        settings={"layers": layers, "width": width, "optimizer": "SGD", "dtype": "float32", "batch": f"2 to {largest}"},
        begin=_start_anew,
        grad=True,
    )
    return streams.run_stream(stream, WAYS, settings)


def _start_anew(step: Served) -> None:
    assert isinstance(step, TrainingStep)
    step.start_anew()


def classifier(width: int, layers: int) -> nn.Module:
    blocks = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(layers)]
    return nn.Sequential(*blocks, nn.Linear(width, CLASSES))


class TrainingStep:
    """Trains its own copy of a model; answers a batch with its loss, which tells of all earlier gradients."""

    def __init__(self, module: nn.Module, way: Way, largest: tuple[Tensor, ...]) -> None:
        self._initial = module.state_dict()
        self._module = copy.deepcopy(module)
        self._optimizer = torch.optim.SGD(self._module.parameters(), lr=0.01, momentum=0.9)
        own = self._module

        def loss(x: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(own(x), labels)

        self._loss: Served = way.prepare(Model(loss, largest, (), (None, None)))
        self._is_stock = way is runners.STOCK

    def start_anew(self) -> None:
        self._module.load_state_dict(self._initial)
        self._optimizer.state.clear()

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        if self._is_stock:
            torch.compiler.cudagraph_mark_step_begin()
        self._optimizer.zero_grad()
        loss = self._loss(x, labels)
        loss.backward()
        self._optimizer.step()
        return loss.detach()
