"""The ways of running a model whose batch size changes, all with one interface: arguments in, result out.

Every argument has its rows along dim 0, and is marked dynamic there, so that each way is told the same.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._inductor.utils import fresh_inductor_cache

import cudagraph_backend as sg
from cudagraph_backend import torch_internals
from cudagraph_backend.demo.workload import Batch, ChangingDim, mark

Served = Callable[..., Tensor]

VLLM_SIZES = (1, 2, 4, *range(8, 257, 8))
SIZES_TO_512 = (*VLLM_SIZES, *range(272, 513, 16))


@dataclass(frozen=True, slots=True)
class Model:
    """What a way is given.

    Attributes:
        largest: arguments of the largest size.
        sizes: the batch sizes to capture.
        padding: per argument, what a hand-written runner must put in padded rows; ``None``: old contents do no harm.
    """

    fn: Callable[..., Tensor]
    largest: Batch
    sizes: tuple[int, ...]
    padding: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Way:
    """One way of running.

    Attributes:
        captures: how many graphs this process has captured in this way, or holds.
        calls_to_replay: which call of a size is the first that only replays.
    """

    name: str
    prepare: Callable[[Model], Served]
    captures: Callable[[], int] = lambda: 0
    calls_to_replay: int = 2
    cuda_only: bool = False
    note: str = ""


def marked(batch: Batch, largest: int) -> Batch:
    """Tell Dynamo that the first dim changes, and up to what size; a single row is compiled apart, and not marked."""
    return mark(batch, (ChangingDim(0, 2, largest),))


class HandWritten:
    """As `vLLM PR #5074 <https://github.com/vllm-project/vllm/pull/5074>`_: a graph per size, in one memory pool.

    Inputs are copied to static buffers; every graph copies its result to ONE output buffer, that of the largest size.
    What it runs is compiled by Inductor. The result is valid until the next call: no copy is made for the caller.
    """

    captured: ClassVar[int] = 0

    def __init__(self, model: Model) -> None:
        # With an option of its own, Dynamo does not answer it from what another way has compiled for the same code.
        self._fn = torch.compile(model.fn, options={"triton.cudagraphs": False})
        self._buffers = tuple(tensor.clone() for tensor in model.largest)
        self._padding = model.padding
        self._largest = max(model.sizes)
        self._bucket = _buckets(model.sizes)
        self._on_gpu = self._buffers[0].is_cuda
        self._output: Tensor | None = None
        self._graphs: dict[int, Any] = {}
        self._pool: Any = None

    def __call__(self, *batch: Tensor) -> Tensor:
        rows = batch[0].shape[0]
        size = self._bucket[rows]
        for buffer, tensor, filling in zip(self._buffers, batch, self._padding, strict=True):
            buffer[:rows].copy_(tensor)
            if filling is not None and size > rows:
                buffer[rows:size].fill_(filling)
        replay = self._graphs.get(size) or self.capture(size)
        replay()
        assert self._output is not None
        return self._output[:rows]

    def capture(self, size: int) -> Callable[[], None]:
        """Capture a graph for ``size`` rows. On a CPU it is a plain call."""
        inputs = marked(tuple(buffer[:size] for buffer in self._buffers), self._largest)
        result = self._fn(*inputs)  # compiles, and lets libraries make their workspaces, outside the capture
        if self._output is None:
            self._output = result.new_empty((self._largest, *result.shape[1:]))
        target = self._output[:size]
        del result
        if self._on_gpu:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                target.copy_(self._fn(*inputs))
            self._pool = graph.pool()
            replay = graph.replay
            HandWritten.captured += 1
        else:

            def replay() -> None:
                target.copy_(self._fn(*inputs))

        self._graphs[size] = replay
        return replay

    def raw(self, size: int) -> Callable[[], None]:
        """A replay of the graph of ``size`` rows and nothing else."""
        return self._graphs[size]


def _buckets(sizes: Sequence[int]) -> list[int]:
    """The capture size of each number of rows: a table, so that the runner looks up and does not search."""
    ordered = sorted(sizes)
    return [next(size for size in ordered if size >= rows) for rows in range(ordered[-1] + 1)]


def _stock_captures() -> int:
    return torch_internals.stock_graph_count(torch.device("cuda", torch.cuda.current_device()))


EAGER = Way("eager", lambda model: model.fn, calls_to_replay=1)
INDUCTOR = Way("inductor", lambda model: torch.compile(model.fn))
STOCK = Way(
    "reduce-overhead",
    lambda model: torch.compile(model.fn, mode="reduce-overhead"),
    captures=_stock_captures,
    calls_to_replay=3,  # it warms up first, and records the second time
    cuda_only=True,
)


# What callers of stock do who want fewer graphs: the topic pads, to sizes that it has chosen, and cuts the result.
HAND_PADDED = Way(
    "hand-padded",
    # Told to be dynamic, Dynamo does not answer it from what stock has compiled for the same code.
    lambda model: torch.compile(model.fn, mode="reduce-overhead", dynamic=True),
    captures=lambda: _stock_captures() if torch.cuda.is_available() else 0,
    calls_to_replay=3,
    note="the caller pads to powers of two and three sizes between two of them, for reduce-overhead",
)


def _size_by_size(model: Model) -> Served:
    """This backend fails for a dynamic size that it meets anew, so each is compiled apart."""
    served = torch.compile(model.fn, backend="cudagraphs", dynamic=False)
    return lambda *batch: served(*(tensor.detach() for tensor in batch))  # new tensors, which are not marked


CUDAGRAPHS = Way(
    "cudagraphs",
    _size_by_size,
    captures=_stock_captures,
    calls_to_replay=3,
    cuda_only=True,
    note="captures eager kernels, each size compiled apart",
)
HANDWRITTEN = Way("hand-written", HandWritten, captures=lambda: HandWritten.captured)
SHAREDGRAPH = Way(
    "sharedgraph",
    lambda model: torch.compile(model.fn, backend="sharedgraph"),
    captures=lambda: sg.stats().captures,
)


def _warmed_up(model: Model) -> Served:
    # The option's value is larger than its default, so that Dynamo does not answer from what was compiled without it.
    served = torch.compile(model.fn, backend="sharedgraph", options={"max_graphs": 1024})
    sg.warmup(served, model.largest, model.sizes)
    return served


WARMED_UP = Way("sharedgraph, warmed up", _warmed_up, captures=lambda: sg.stats().captures)


def runs_on(way: Way, device: torch.device) -> bool:
    return device.type == "cuda" or not way.cuda_only


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The greatest difference as a share of the greatest expected number; infinite where shapes differ or for NaN."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return math.inf
    difference = (result.float() - expected.float()).abs().max().item()
    scale = expected.float().abs().max().item()
    return math.inf if math.isnan(difference) else difference / scale if scale else difference


@contextlib.contextmanager
def own_cache() -> Iterator[None]:
    """Nothing is answered from what another way has compiled. The files stay until the process's folder is removed."""
    with fresh_inductor_cache(delete=False):
        yield


def warm_up_compiler(device: torch.device) -> None:
    """Compile something small: what the process does once only is not to be counted for the first way."""
    with own_cache():
        torch.compile(lambda x: x.sin() @ x.cos())(torch.ones(4, 4, device=device))
    torch._dynamo.reset()


def free_memory(device: torch.device) -> int | None:
    """Free bytes of the GPU once everything that can be given back was given back; ``None`` on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def forget_everything() -> None:
    """Free what was compiled and captured in this process."""
    torch._dynamo.reset()
    sg.reset()
    gc.collect()
