"""Could one executable serve several buckets, and what would that save and cost? A script of its own.

A captured graph is launched through its *executable*, memory that the CUDA driver takes per graph, outside of all
allocators. ``cuGraphExecUpdate`` writes the parameters of another graph into an executable, if both have the same nodes
and edges. Buckets of one region mostly have (cuBLAS may pick other kernels, or more of them, at another size), so one
executable could be switched from bucket to bucket. Measured, for a stack of Linear, GELU and residual sum:

- per size, the bytes and seconds of instantiating a graph, and of its first launch, which may take memory of its own;
- per step between neighbouring sizes, up and down, whether the update succeeds, whether the result is then right, and
  how long update and launch keep the host busy, next to a launch alone;
- from both, the bytes saved and the time lost per switch if executables were shared as far as updates succeed.

Needs a CUDA GPU that nobody else uses (free memory is compared), torch 2.11 or later and cuda-bindings. Takes seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MIB = 2**20
TOLERANCE = 0.1  # of bf16 values around 10; the kernels are the same, so that a greater one is another size's result


@dataclass(frozen=True, slots=True)
class Executable:
    """What one size's executable took: bytes of the device, and seconds until the call had returned and finished."""

    size: int
    nodes: int
    instantiate_bytes: int
    instantiate_s: float
    first_launch_bytes: int
    first_launch_s: float

    @property
    def nbytes(self) -> int:
        return self.instantiate_bytes + self.first_launch_bytes


@dataclass(frozen=True, slots=True)
class Switch:
    """From one size's executable to another size's graph.

    ``result`` is CUDA's word for it. The rest is ``None`` where the update failed. Times are medians in µs of host
    time: of the update, of update and launch, and of the launch of an executable of its own. ``wall_us`` and
    ``own_wall_us`` last until the GPU has finished. ``error``: the greatest difference from the module's own result.
    """

    start: int
    end: int
    result: str
    update_us: float | None = None
    host_us: float | None = None
    own_host_us: float | None = None
    wall_us: float | None = None
    own_wall_us: float | None = None
    error: float | None = None

    @property
    def succeeded(self) -> bool:
        return self.error is not None and self.error <= TOLERANCE


@dataclass(frozen=True, slots=True)
class Summary:
    """All sizes with an executable each, against one per group of sizes between which updates succeed both ways."""

    executables: int
    groups: tuple[tuple[int, ...], ...]
    separate_bytes: int
    shared_bytes: int
    switch_host_us: float | None
    switch_wall_us: float | None


def summarise(executables: Sequence[Executable], switches: Sequence[Switch]) -> Summary:
    """A shared executable is counted as large as the largest that it replaces; a switch costs the median of all."""
    works = {(s.start, s.end) for s in switches if s.succeeded}
    groups: list[list[Executable]] = []
    for executable in sorted(executables, key=lambda e: e.size):
        last = groups[-1][-1].size if groups else None
        if (last, executable.size) in works and (executable.size, last) in works:
            groups[-1].append(executable)
        else:
            groups.append([executable])
    return Summary(
        len(executables),
        tuple(tuple(e.size for e in group) for group in groups),
        sum(e.nbytes for e in executables),
        sum(max(e.nbytes for e in group) for group in groups),
        _median([s.host_us - s.own_host_us for s in switches if s.host_us is not None and s.own_host_us is not None]),
        _median([s.wall_us - s.own_wall_us for s in switches if s.wall_us is not None and s.own_wall_us is not None]),
    )


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


# ---- what is captured


class Stack(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x))
        return x


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph that writes to ``output``; ``expected`` is the module's own result."""

    size: int
    graph: torch.cuda.CUDAGraph
    output: Tensor
    expected: Tensor


def capture_all(sizes: Sequence[int], layers: int, width: int) -> list[Captured]:
    """Largest first, in one pool, all reading one input buffer and writing one output buffer."""
    module = Stack(layers, width).to("cuda", torch.bfloat16)
    source = torch.randn(max(sizes), width, device="cuda", dtype=torch.bfloat16)
    target, pool = torch.empty_like(source), torch.cuda.graph_pool_handle()
    captured = []
    for size in sorted(sizes, reverse=True):
        expected = module(source[:size]).clone()  # makes lazy handles and workspaces, too
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)  # the graph stays, and is not instantiated
        with torch.cuda.graph(graph, pool=pool):
            target[:size].copy_(module(source[:size]))
        captured.append(Captured(size, graph, target[:size], expected))
    return captured[::-1]


# ---- the driver


class Driver:
    """The few calls of CUDA's driver that are measured, on one stream."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)

    def graph(self, captured: Captured) -> Any:
        return self._driver.CUgraph(captured.graph.raw_cuda_graph())

    def node_count(self, graph: Any) -> int:
        return int(self._call("cuGraphGetNodes", graph, 0)[-1])

    def instantiate(self, graph: Any) -> Any:
        return self._call("cuGraphInstantiate", graph, 0)[0]

    def launch(self, executable: Any) -> None:
        self._call("cuGraphLaunch", executable, self._stream)

    def destroy(self, executable: Any) -> None:
        self._call("cuGraphExecDestroy", executable)

    def update(self, executable: Any, graph: Any) -> str:
        """CUDA's word for the result: ``"SUCCESS"``, or why the executable can't become this graph."""
        error, info = self._driver.cuGraphExecUpdate(executable, graph)
        if error == self._driver.CUresult.CUDA_SUCCESS:
            return "SUCCESS"
        if error != self._driver.CUresult.CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE:
            raise RuntimeError(f"cuGraphExecUpdate failed with {error.name}")
        # Some releases of the bindings give no details of a failure.
        return "FAILURE" if info is None else str(info.result.name).removeprefix("CU_GRAPH_EXEC_UPDATE_")

    def _call(self, name: str, *args: Any) -> list[Any]:
        error, *results = getattr(self._driver, name)(*args)
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name} failed with {error.name}")
        return results


# ---- measuring


def taken(call: Callable[[], Any]) -> tuple[Any, int, float]:
    """The call's result, the bytes of the device that it took, and its seconds."""
    torch.cuda.synchronize()
    before, began = torch.cuda.mem_get_info()[0], time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return result, before - torch.cuda.mem_get_info()[0], seconds


def measure_executable(driver: Driver, captured: Captured) -> tuple[Executable, Any]:
    """The record, and the executable itself."""
    graph = driver.graph(captured)
    executable, nbytes, seconds = taken(lambda: driver.instantiate(graph))
    _, launch_nbytes, launch_seconds = taken(lambda: driver.launch(executable))
    nodes = driver.node_count(graph)
    return Executable(captured.size, nodes, nbytes, seconds, launch_nbytes, launch_seconds), executable


def times_us(call: Callable[[], object], prepare: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Medians of the call's host time and of the time until the GPU has finished; ``prepare`` comes before, untimed."""
    host, wall = [], []
    for _ in range(repeats):
        prepare()
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        host.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        wall.append(time.perf_counter() - began)
    return statistics.median(host) * 1e6, statistics.median(wall) * 1e6


def measure_switch(driver: Driver, start: Captured, end: Captured, own: Any, repeats: int) -> Switch:
    """From ``start``'s graph to ``end``'s and back, ``repeats`` times; ``own`` is ``end``'s own executable."""
    first, second = driver.graph(start), driver.graph(end)
    shared = driver.instantiate(first)
    try:
        driver.launch(shared)
        result = driver.update(shared, second)
        if result != "SUCCESS":
            return Switch(start.size, end.size, result)
        end.output.zero_()
        driver.launch(shared)
        error = (end.output.float() - end.expected.float()).abs().max().item()
        if (back := driver.update(shared, first)) != "SUCCESS":
            return Switch(start.size, end.size, f"there, but not back: {back}")

        def go_back() -> None:
            driver.update(shared, first)
            driver.launch(shared)

        def switch() -> None:
            driver.update(shared, second)
            driver.launch(shared)

        update_us, _ = times_us(lambda: driver.update(shared, second), go_back, repeats)
        switched = times_us(switch, go_back, repeats)
        alone = times_us(lambda: driver.launch(own), go_back, repeats)
    finally:
        torch.cuda.synchronize()
        driver.destroy(shared)
    return Switch(start.size, end.size, result, update_us, switched[0], alone[0], switched[1], alone[1], error)


# ---- telling


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def told(executables: Sequence[Executable], switches: Sequence[Switch], summary: Summary) -> str:
    """Two tables and the upshot."""

    def number(value: float | None, digits: int = 1) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    first = table(
        ("size", "nodes", "instantiate MiB", "ms", "first launch MiB", "ms"),
        [
            (
                e.size,
                e.nodes,
                number(e.instantiate_bytes / MIB, 2),
                number(e.instantiate_s * 1e3, 2),
                number(e.first_launch_bytes / MIB, 2),
                number(e.first_launch_s * 1e3, 2),
            )
            for e in executables
        ],
    )
    second = table(
        ("from", "to", "update", "update µs", "+ launch µs", "own launch µs", "wall µs", "own wall µs", "error"),
        [
            (
                s.start,
                s.end,
                s.result,
                *map(number, (s.update_us, s.host_us, s.own_host_us, s.wall_us, s.own_wall_us)),
                "" if s.error is None else f"{s.error:.1e}",
            )
            for s in switches
        ],
    )
    groups = "; ".join(", ".join(map(str, group)) for group in summary.groups)
    saved = (summary.separate_bytes - summary.shared_bytes) / MIB
    return (
        f"{first}\n\n{second}\n\n"
        f"{summary.executables} executables of {summary.separate_bytes / MIB:.2f} MiB could be "
        f"{len(summary.groups)} of {summary.shared_bytes / MIB:.2f} MiB ({groups}).\n"
        f"Saved: {saved:.2f} MiB. Lost per switch: {number(summary.switch_host_us) or '?'} µs of host time, "
        f"{number(summary.switch_wall_us) or '?'} µs until the GPU has finished."
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [8, 16, 32, 64, 128, 256, 384, 512]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, metavar="N", help=f"rows (default: {sizes})")
    parser.add_argument("--layers", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=50, help="per switch (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA GPU here; this measures CUDA graphs and nothing else")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.manual_seed(0)
    with torch.inference_mode():
        captured, driver = capture_all(sorted(set(args.sizes)), args.layers, args.width), Driver()
        # Largest first, as a server captures them. What the first one takes may hold room for those that follow.
        measured = [measure_executable(driver, one) for one in captured[::-1]][::-1]
        pairs = [pair for i in range(len(captured) - 1) for pair in ((i, i + 1), (i + 1, i))]
        switches = [
            measure_switch(driver, captured[start], captured[end], measured[end][1], args.repeats)
            for start, end in pairs
        ]
    executables = [record for record, _ in measured]
    summary = summarise(executables, switches)
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}, {args.layers} layers of width {args.width}, bf16\n")
    print(told(executables, switches, summary))
    if args.json is not None:
        numbers = {
            "gpu": gpu,
            "torch": torch.__version__,
            "settings": {key: value for key, value in vars(args).items() if key != "json"},
            "executables": [dataclasses.asdict(e) for e in executables],
            "switches": [dataclasses.asdict(s) for s in switches],
            "summary": dataclasses.asdict(summary),
        }
        args.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
