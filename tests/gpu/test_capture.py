"""Capture, memory and streams on a real GPU."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import cudagraph_backend as sg

SIZES = (64, 48, 33, 17, 8, 5, 2)


def _serve(compiled, device, sizes=SIZES, width=256):
    with torch.no_grad():
        for n in sizes:
            x = torch.randn(n, width, device=device)
            torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
            yield n, x, compiled(x)


def test_further_buckets_add_nothing_to_output_pool_and_scratch(device):
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)).to(device)
    compiled = torch.compile(model, backend="sharedgraph")
    held = []
    for _, x, out in _serve(compiled, device):
        torch.testing.assert_close(out, model(x), rtol=1e-2, atol=1e-2)
        held.append((sg.stats().output_pool_bytes, sg.stats().memory_pool_bytes))
    assert sg.stats().graphs == len(SIZES)
    assert len(set(held)) == 1, held


def test_replay_is_one_graph_launch(device):
    compiled = torch.compile(nn.Linear(256, 256).to(device), backend="sharedgraph")
    list(_serve(compiled, device, (64, 40)))
    x = torch.randn(64, 256, device=device)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        with torch.no_grad():
            compiled(x)
        torch.cuda.synchronize()
    launches = [e for e in profile.events() if e.name == "cudaGraphLaunch"]
    assert len(launches) == 1


def test_a_capture_that_synchronises_is_aborted_cleanly(device):
    @torch.library.custom_op("sharedgraph_test::syncs", mutates_args=())
    def syncs(x: torch.Tensor) -> torch.Tensor:
        torch.cuda.synchronize()
        return x * 2

    @syncs.register_fake
    def _(x):
        return torch.empty_like(x)

    compiled = torch.compile(lambda x: syncs(x) + 1, backend="sharedgraph")
    other = torch.compile(lambda x: x * 3, backend="sharedgraph")
    with torch.no_grad():
        for n in (5, 5, 7, 9, 7):
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(compiled(x), x * 2 + 1)
            torch.testing.assert_close(other(x), x * 3)
        first, second = torch.randn(100, device=device), torch.randn(100, device=device)
    assert not torch.equal(first, second)
    assert any("capture failed" in reason for reason in sg.stats().fallbacks)
    assert sg.stats().captures > 0  # the other region is captured all the same


@torch.library.custom_op("sharedgraph_test::reads_back", mutates_args=())
def reads_back(x: torch.Tensor) -> torch.Tensor:
    return x * float(x.sum().item() > 0) + x


@reads_back.register_fake
def _(x):
    return torch.empty_like(x)


def test_what_cannot_be_captured_is_found_and_cut_out(device):
    """It told nobody that it reads a value back; what is around it has graphs from the second call on."""

    def function(x, w):
        y = reads_back((x @ w).relu())  # the line
        return (y @ w).softmax(-1)

    weight = torch.randn(8, 8, device=device)
    compiled = torch.compile(function, backend="sharedgraph", dynamic=True)
    with torch.no_grad():
        for n in (5, 7, 30, 5, 7, 6):
            x = torch.randn(n, 8, device=device)
            torch.testing.assert_close(compiled(x, weight), function(x, weight))
        assert not torch.equal(torch.rand(100, device=device), torch.rand(100, device=device))
    stats = sg.stats()
    assert stats.replays >= 2 * 5
    assert 0 < stats.captures <= 2 * 4
    assert any(reason.startswith("its capture failed") for reason in stats.fallbacks)
    assert "reads_back((x @ w).relu())  # the line" in sg.explain()


@torch.library.custom_op("sharedgraph_test::short_of_memory", mutates_args=())
def short_of_memory(x: torch.Tensor) -> torch.Tensor:
    if short and torch.cuda.is_current_stream_capturing():
        short.pop()
        raise torch.OutOfMemoryError("none left")
    return x * 2


@short_of_memory.register_fake
def _(x):
    return torch.empty_like(x)


short: list[int] = []


def test_a_capture_without_memory_is_tried_again_in_the_same_pool(device):
    compiled = torch.compile(lambda x: short_of_memory(x) + 1, backend="sharedgraph")

    def serve(n):
        x = torch.randn(n, 4, device=device)
        torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), x * 2 + 1)

    serve(40)
    pool = sg.sharedgraph.device(device).driver._memory
    assert pool is not None
    short[:] = [1]
    serve(20)
    assert (sg.stats().graphs, sg.stats().fallbacks, short) == (2, {}, [])
    short[:] = [1, 1]
    for n in (10, 10, 40, 20):
        serve(n)
    assert sg.stats().fallbacks == {"no memory to capture a graph": 2}
    assert sg.stats().graphs == 2
    assert sg.sharedgraph.device(device).driver._memory is pool


def test_called_inside_an_outer_capture(device):
    compiled = torch.compile(lambda x: x * 2 + 1, backend="sharedgraph")
    x = torch.randn(8, 4, device=device)
    with torch.no_grad():
        compiled(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = compiled(x)
        x.fill_(3)
        graph.replay()
    torch.testing.assert_close(out, torch.full_like(x, 7))
    assert sg.stats().fallbacks == {"called inside somebody else's capture": 1}


def test_a_scalar_on_the_cpu_is_moved_to_the_graph(device):
    compiled = torch.compile(lambda x, s: x * s, backend="sharedgraph")
    with torch.no_grad():
        for n, scale in ((5, 2.0), (7, 3.0), (5, 4.0)):
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(compiled(x, torch.tensor(scale)), x * scale)
    assert sg.stats().fallbacks == {}
    assert sg.stats().replays == 3


@pytest.mark.alone
def test_memory_of_executables_is_what_the_device_lost(device):
    weight = torch.randn(256, 256, device=device) / 16

    def function(x):
        for _ in range(300):
            x = x @ weight
        return x

    compiled = torch.compile(function, backend="sharedgraph")
    for _ in _serve(compiled, device, SIZES[:1]):  # modules, workspaces, pools
        pass

    def taken():
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info(device)
        stats = sg.stats()
        outside = total - free - torch.cuda.memory_reserved(device) - stats.output_pool_bytes
        return outside, stats.executable_bytes

    before = taken()
    for _ in _serve(compiled, device, SIZES[1:]):
        pass
    after = taken()
    assert sg.stats().graphs == len(SIZES)
    # The driver takes memory in pieces of 2 MiB or more, and some of it only when a graph is launched first.
    assert 0 <= after[1] - before[1] <= after[0] - before[0] + (2 << 20)
    assert after[1] > 0


@pytest.mark.alone
def test_memory_is_given_back(device):
    def reserved():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[0]

    def serve():
        model = nn.Linear(2048, 2048, device=device)
        compiled = torch.compile(model, backend="sharedgraph")
        kept = [out for _, _, out in _serve(compiled, device, width=2048)]
        torch._dynamo.reset()
        return kept[-1].clone()

    serve()
    before = reserved()
    for _ in range(3):
        serve()
    after = reserved()
    assert after[0] <= before[0]
    assert before[1] - after[1] < 32 << 20


def test_pool_grows_without_moving(device):
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    address = None
    with torch.no_grad():
        for n in (10, 1000, 100_000, 3_000_000, 10):
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(compiled(x), x * 2)
            pool = sg.output_pool(device).tensor
            address = address or pool.data_ptr()
            assert pool.data_ptr() == address
    assert sg.output_pool(device).nbytes >= 3_000_000 * 16


def test_values_on_a_side_stream(device):
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    x = torch.randn(64, 4, device=device)
    with torch.no_grad():
        compiled(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = compiled(x)
        torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(out, x * 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype, device):
    linear = nn.Linear(256, 256, device=device, dtype=dtype)
    compiled = torch.compile(linear, backend="sharedgraph")
    with torch.no_grad():
        for n in (64, 5, 33, 17):
            x = torch.randn(n, 256, device=device, dtype=dtype)
            torch.testing.assert_close(compiled(x), linear(x), rtol=2e-2, atol=2e-2)
    assert sg.stats().rows_padded > 0
