"""What staging costs per call, way by way, and what a changed parameter of a graph's kernel node costs.

    python -m benchmarks.micro_staging --json micro_staging.json

Host time: calls without waiting for the GPU in between. GPU time: between two events around 20 calls that were enqueued
while the GPU was kept busy, so that the host's part is not in it. Needs a CUDA GPU; takes less than a minute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.timing import Call, enqueue_seconds, interleaved, spread
from cudagraph_backend.drivers.staging_kernel.jobs import MAX_SOURCES
from cudagraph_backend.drivers.staging_kernel.kernel import cached_launch, normal_launch
from cudagraph_backend.drivers.staging_kernel.launches import KernelStaging, Launches
from cudagraph_backend.memory.copies import StagedCopy, stage, staged_copy

CALLS = 20  # per sample: few, so that the driver's queue does not fill up
KINDS = [(torch.bfloat16, (4096,)), (torch.int64, ()), (torch.int64, ()), (torch.bool, ())]
"""Hidden states, ids and positions, a mask; more inputs are more of these."""


def inputs(count: int, n: int, bucket: int, device: torch.device) -> tuple[list[torch.Tensor], list[StagedCopy]]:
    args, copies = [], []
    for index in range(count):
        dtype, more = KINDS[(index + (count == 1)) % len(KINDS)]  # one input alone is ids
        args.append(torch.randint(0, 2, (n, *more), device=device).to(dtype))
        buffer = torch.zeros(bucket, *more, dtype=dtype, device=device)
        real = tuple(args[-1].shape), args[-1].stride()
        copies.append(staged_copy(index, buffer, real, (1,) * len(real[0]), "replica"))
    return args, copies


def staging_ways(count: int, n: int, bucket: int, device: torch.device) -> dict[str, Call]:
    args, copies = inputs(count, n, bucket, device)
    normal = KernelStaging(Launches(device, normal_launch), copies, ())
    launches = Launches(device, cached_launch)
    cached = KernelStaging(launches, copies, ())
    reals = [copy.real for copy in copies]
    ways: dict[str, Call] = {
        "stage()": lambda: stage(copies, (), args),
        "_foreach_copy_ alone": lambda: torch._foreach_copy_(reals, args),
        "kernel, normal launch": lambda: normal(args),
        "kernel, cached launcher": lambda: cached(args),
    }
    for copy in copies:
        copy.bucket.zero_()
    for way in ways.values():
        way()
    assert launches.works
    ways["cached launcher alone"] = bare_launch(launches, cached, args)
    check(copies, args)
    return ways


def bare_launch(launches: Launches, staging: KernelStaging, args: list[torch.Tensor]) -> Call:
    """The launch without what finds its arguments."""
    assert staging._parts is not None
    (part,) = staging._parts
    sources = [arg.data_ptr() for arg in args] + [0] * (MAX_SOURCES - len(args))
    table = part._aligned
    assert table is not None
    launch = launches._by_dims[table.dims]
    stream = torch.cuda.current_stream().cuda_stream
    return lambda: launch(table.programs, stream, table.address, sources)


def check(copies: list[StagedCopy], args: list[torch.Tensor]) -> None:
    """What lies in the buckets, written last by the kernel, is what ``stage`` writes."""
    by_kernel = [copy.bucket.clone() for copy in copies]
    stage(copies, (), args)
    for copy, written in zip(copies, by_kernel, strict=True):
        assert torch.equal(copy.bucket, written)


def gpu_seconds(call: Call) -> float:
    """Per call, of ``CALLS`` calls in a queue."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / CALLS / 1e3


def measured(ways: Mapping[str, Call], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Medians in µs."""
    host = interleaved({k: partial(enqueue_seconds, c, CALLS, device) for k, c in ways.items()}, rounds)
    gpu = interleaved({k: partial(gpu_seconds, c) for k, c in ways.items()}, rounds)
    return {
        k: {"host_us": spread(host[k], 1e6).median, "host_p80_us": spread(host[k], 1e6).p80}
        | {"gpu_us": spread(gpu[k], 1e6).median}
        for k in ways
    }


class Node:
    """A kernel node of a graph, whose parameters can be set again; all through ``cuda.bindings``."""

    def __init__(self, device: torch.device, kernels: int = 20):
        from cuda.bindings import driver

        self._driver = driver
        x = torch.zeros(1024, device=device)
        x.add_(1)
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self.graph):
            for _ in range(kernels):
                x.add_(1)
        self._x = x
        graph = driver.CUgraph(self.graph.raw_cuda_graph())
        self._exec = self._call("cuGraphInstantiate", graph, 0)
        _, count = self._call("cuGraphGetNodes", graph, 0)
        nodes, _ = self._call("cuGraphGetNodes", graph, count)
        kernel = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
        self._node = next(node for node in nodes if self._call("cuGraphNodeGetType", node) == kernel)
        self._params = self._call("cuGraphKernelNodeGetParams", self._node)
        self._stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)

    def _call(self, name: str, *args: Any) -> Any:
        error, *results = getattr(self._driver, name)(*args)
        assert error == self._driver.CUresult.CUDA_SUCCESS, (name, error)
        return results[0] if len(results) == 1 else results

    def ways(self) -> dict[str, Call]:
        set_params, launch = self._driver.cuGraphExecKernelNodeSetParams, self._driver.cuGraphLaunch
        node = self._exec, self._node, self._params
        self._call("cuGraphExecKernelNodeSetParams", *node)
        self._call("cuGraphLaunch", self._exec, self._stream)

        def both() -> None:
            set_params(*node)
            launch(self._exec, self._stream)

        return {
            "graph launch": lambda: launch(self._exec, self._stream),
            "set params": lambda: set_params(*node),
            "set params + graph launch": both,
        }


def node_ways(device: torch.device) -> dict[str, Call] | str:
    """Or why they can't be measured here."""
    try:
        return Node(device).ways()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("micro_staging.json"))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--inputs", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--bucket", type=int, default=104)
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": options.rows,
        "bucket": options.bucket,
        "launcher": cached_launch(2).__qualname__.partition(".")[0],
    }
    ways = {f"{count} inputs": staging_ways(count, options.rows, options.bucket, device) for count in options.inputs}
    result["staging"] = {name: measured(of, options.rounds, device) for name, of in ways.items()}
    of_node = node_ways(device)
    result["graph node"] = of_node if isinstance(of_node, str) else measured(of_node, options.rounds, device)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: v for k, v in result.items() if isinstance(v, (str, int))}))
    for name, table in (*result["staging"].items(), ("20 kernels in a graph", result["graph node"])):
        print(f"\n{name:28}{'host µs':>10}{'p80':>10}{'GPU µs':>10}")
        for way, row in table.items() if isinstance(table, dict) else ():
            print(f"  {way:26}{row['host_us']:10.2f}{row['host_p80_us']:10.2f}{row['gpu_us']:10.2f}")
    if isinstance(of_node, str):
        print(of_node)


if __name__ == "__main__":
    main()
