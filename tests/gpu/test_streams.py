"""Streams, threads with streams of their own, and captures by somebody else. The caller syncs as eager demands."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import cudagraph_backend as sg
from tests.support.regions import compiled

pytestmark = pytest.mark.usefixtures("no_grad")

SIZES = (64, 5, 33, 17, 64, 2)
WIDTH = 256


def slow(x):
    """Long enough on the GPU that a replay which doesn't wait is seen."""
    for _ in range(20):
        x = torch.softmax(x @ x.t(), 1) @ x
    return x


def warm(*functions, device):
    """Captured on the current stream, for all sizes."""
    for function in functions:
        for n in SIZES:
            function(torch.randn(n, WIDTH, device=device))
    torch.cuda.synchronize()


def side_stream():
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def test_producer_and_consumer_on_two_streams(device):
    """The replays order themselves; the result is awaited by the caller."""
    produce, consume = compiled(slow), compiled(lambda x: x * 2 + 1)
    warm(produce, consume, device=device)
    for n in SIZES * 3:
        x = torch.randn(n, WIDTH, device=device)
        producer, consumer = side_stream(), side_stream()
        with torch.cuda.stream(producer):
            y = produce(x)
        with torch.cuda.stream(consumer):
            z = consume(y)
        torch.cuda.current_stream().wait_stream(producer)
        torch.cuda.current_stream().wait_stream(consumer)
        torch.testing.assert_close(y, slow(x), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(z, y * 2 + 1, rtol=1e-3, atol=1e-3)


def test_replays_of_one_function_on_alternating_streams(device):
    """They share staging and scratch memory: the second must not start while the first one runs."""
    f = compiled(slow)
    warm(f, device=device)
    streams = [side_stream(), side_stream()]
    given = [torch.randn(n, WIDTH, device=device) for n in SIZES * 2]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    results = []
    for i, x in enumerate(given):
        with torch.cuda.stream(streams[i % 2]):
            results.append(f(x).clone())
    torch.cuda.synchronize()
    for x, result in zip(given, results, strict=True):
        torch.testing.assert_close(result, slow(x), rtol=1e-3, atol=1e-3)


def test_feedback_over_alternating_streams(device):
    f = compiled(lambda x: torch.remainder(x.flip(1) * 3 + 1, 1009))
    x = expected = torch.randint(0, 1009, (33, WIDTH), device=device).float()
    streams = [side_stream(), side_stream()]
    for i in range(50):
        with torch.cuda.stream(streams[i % 2]):
            x = f(x)
        streams[(i + 1) % 2].wait_stream(streams[i % 2])
        expected = torch.remainder(expected.flip(1) * 3 + 1, 1009)
    torch.cuda.synchronize()
    assert torch.equal(x, expected)


def test_outputs_kept_by_another_stream(device):
    """A copy waits for the replay that it is of, and the next replay for the copy."""
    f = compiled(slow)
    warm(f, device=device)
    for n in SIZES:
        x = torch.randn(n, WIDTH, device=device)
        first, second = side_stream(), side_stream()
        kept = []
        for i in range(6):
            with torch.cuda.stream((first, second)[i % 2]):
                kept.append(f(x * (i - 2)))
        torch.cuda.synchronize()
        for i, out in enumerate(kept):
            torch.testing.assert_close(out, slow(x * (i - 2)), rtol=1e-3, atol=1e-3)


def test_captured_first_on_a_side_stream(device):
    f = compiled(lambda x: x * 2)
    with torch.cuda.stream(side_stream()) as _:
        for n in SIZES:
            f(torch.randn(n, WIDTH, device=device))
    torch.cuda.synchronize()
    for n in SIZES:
        x = torch.randn(n, WIDTH, device=device)
        torch.testing.assert_close(f(x), x * 2)
    assert sg.stats().fallbacks == {}


def test_training_on_a_side_stream(device):
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 4)).to(device)
    f = compiled(model)
    with torch.enable_grad():
        for n in SIZES * 2:
            x = torch.randn(n, WIDTH, device=device)
            stream = side_stream()
            with torch.cuda.stream(stream):
                got = torch.autograd.grad(f(x).square().sum(), list(model.parameters()))
            torch.cuda.current_stream().wait_stream(stream)
            expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("is_warm", [False, True])
def test_a_chain_inside_an_outer_capture(is_warm, device):
    """It runs uncaptured, becomes part of the outer graph, and leaves the backend as it was."""
    first, second = compiled(lambda x: x * 2 + 1), compiled(lambda x: x.flip(1) - 3)
    x = torch.randn(8, WIDTH, device=device)
    second(first(x))  # compiled; a capture can't hold that
    if is_warm:
        warm(first, second, device=device)
    pooled = first(x)
    captures = sg.stats().captures
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = second(first(x))
        of_pooled = second(pooled)
    assert sg.stats().captures == captures
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        torch.testing.assert_close(out, torch.full_like(x, 2 * value - 2))
        torch.testing.assert_close(of_pooled, pooled.flip(1) - 3)
        torch.testing.assert_close(second(first(x)), out)
    assert set(sg.stats().fallbacks) == {"called inside somebody else's capture"}


def test_two_threads_on_two_streams(device):
    functions = [compiled(slow), compiled(lambda x: slow(x) + 1)]
    eager = [slow, lambda x: slow(x) + 1]
    warm(*functions, device=device)
    errors = []

    def work(i):
        try:
            stream = torch.cuda.Stream()
            with torch.no_grad(), torch.cuda.stream(stream):
                for n in SIZES * 5:
                    x = torch.randn(n, WIDTH).to(
                        device
                    )  # the GPU's generator may be taken by the other thread's capture
                    kept = functions[i](x), eager[i](x)
                    stream.synchronize()
                    torch.testing.assert_close(*kept, rtol=1e-3, atol=1e-3)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_nothing_of_the_private_pool_is_left_after_a_reset(device):
    """The allocator's segments that captures used are ordinary ones again, or gone."""

    def private():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]

    before = len(private())
    f = compiled(slow)
    warm(f, device=device)
    assert len(private()) > before
    torch._dynamo.reset()
    del f
    assert len(private()) <= before
