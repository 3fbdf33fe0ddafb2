"""Bugs that once were, each with the program that showed it."""

from __future__ import annotations

import dataclasses
import random
import threading

import pytest
import torch
from torch import nn

import cudagraph_backend as sg
from cudagraph_backend.runtime.allocations import Allocations
from tests.support.regions import check, compiled


def test_an_output_that_is_saved_for_backward_must_not_be_changed_in_place(device):
    """The output and the saved tensor are one object, with one version counter."""
    x = torch.ones(4, device=device, requires_grad=True)
    y = compiled(lambda x: x.exp())(x)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_views_of_parameters_that_share_a_storage(device):
    """One region for several modules whose weights are slices of one flat tensor; backward needs views of them."""
    flat = torch.arange(64.0, device=device) / 64

    class Layer(nn.Module):
        def __init__(self, i):
            super().__init__()
            self.register_buffer("weight", flat[16 * i : 16 * i + 16].view(4, 4))

        def forward(self, x):
            return x @ self.weight[1:3].t()

    layers = [Layer(i) for i in range(4)]
    expected_layers = [Layer(i) for i in range(4)]
    for layer in layers:
        layer.compile(backend="sharedgraph")
    for _ in range(3):
        for layer, expected in zip(layers, expected_layers, strict=True):
            grads = []
            for module in (layer, expected):
                x = torch.ones(3, 4, device=device, requires_grad=True)
                module(x).sum().backward()
                grads.append(x.grad)
            torch.testing.assert_close(*grads)


def test_an_argument_written_in_place_that_overlaps_another(device):
    """The overlap may come later than the compilation; staging must not take apart what compiled code sees as one.

    Compared with what Inductor alone makes of such a call, as AOTAutograd has no guard against it.
    """

    def function(a, b):
        a.mul_(2)
        return b.flip(0)

    results = []
    with torch.no_grad():
        for backend in ("sharedgraph", "inductor"):
            f = torch.compile(function, backend=backend, dynamic=False)
            x = torch.arange(12.0, device=device).view(4, 3)
            f(x[1:].clone(), x[1:].clone())
            results.append((f(x[1:], x[:-1]).clone(), x))
    torch.testing.assert_close(*results)
    assert list(sg.stats().fallbacks) == ["an argument that is written in place shares memory with another argument"]


@pytest.mark.parametrize("pad", ["prove", "assume"])
@pytest.mark.parametrize(
    "function",
    [lambda x, k: x * k, lambda x, k: x.roll(k, 1), lambda x, k: x.narrow(0, 0, 1).expand(abs(k) + 2, 4) + 1],
)
def test_int_arguments_are_values_not_dims(function, pad, device):
    f = torch.compile(function, backend="sharedgraph", dynamic=True, options={"pad": pad})
    with torch.no_grad():
        for n, k in ((3, 2), (3, 5), (3, -4), (3, 0), (3, 7)):
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(f(x, k), function(x, k))


def test_a_guard_on_a_size_that_the_region_does_not_receive(device):
    def function(x, y):
        z = x * 2
        torch._dynamo.graph_break()
        return z + 1 if y.shape[0] > z.shape[0] else z - 1

    f = compiled(function)
    with torch.no_grad():
        for n, m in ((3, 5), (4, 6), (6, 4), (7, 9), (9, 2)):
            x, y = torch.randn(n, 4, device=device), torch.randn(m, device=device)
            torch.testing.assert_close(f(x, y), function(x, y))


def test_large_bounds_take_no_memory_in_advance(device):
    f = compiled(lambda x: x * 2)
    with torch.no_grad():
        for n in (3, 5):
            x = torch.randn(n, 4, 1024, device=device)
            for dim in (0, 1):
                torch._dynamo.mark_dynamic(x, dim, min=2, max=8192)
            torch.testing.assert_close(f(x), x * 2)
    assert sg.stats().staging_bytes < 10 << 20
    assert sg.stats().replays == 2


def test_an_empty_output_under_another_default_device(device):
    f = compiled(lambda x: (x[:0] * 1, x * 2))
    x = torch.randn(3, 4, device=device)
    with torch.no_grad(), torch.device("meta"):
        empty, doubled = f(x)
    assert empty.device == doubled.device == x.device
    torch.testing.assert_close(doubled, x * 2)


def test_parameters_that_move_at_every_call_are_not_captured_for_ever(device):
    linear = nn.Linear(4, 4, device=device)
    f = compiled(linear)
    x = torch.randn(3, 4, device=device)
    held = []
    with torch.no_grad():
        for _ in range(60):
            held.append(linear.weight.data)  # or the allocator hands out the same address again
            linear.weight.data = torch.randn(4, 4, device=device)
            torch.testing.assert_close(f(x), linear(x))
        captures = sg.stats().captures
        assert captures < 40
        for _ in range(5):  # and once they stay, graphs are used again
            torch.testing.assert_close(f(x), linear(x))
    assert sg.stats().captures == captures + 1


def test_sizes_beyond_max_graphs_hold_nothing(device):
    f = torch.compile(lambda x: x.median(0).values, backend="sharedgraph", options={"max_graphs": 2}, dynamic=True)
    with torch.no_grad():
        for n in range(5, 40):
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(f(x), x.median(0).values, rtol=1e-4, atol=1e-5)
    (region,) = sg.sharedgraph.regions()
    assert len(region.state.planner.buckets) == 2
    assert sum(sg.stats().fallbacks.values()) == 33


def test_a_view_of_one_of_two_parameters_that_may_be_tied(device):
    """Which parameter a returned view belongs to can't be told while both share their memory."""

    class Tied(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.register_buffer("first", first)
            self.register_buffer("second", second)

        def forward(self, x):
            return x @ self.first + (x @ self.second.t()).sum()

    flat = torch.randn(16, device=device)
    pairs = [
        (flat.view(4, 4), flat[:16].view(4, 4)),
        (torch.randn(4, 4, device=device), torch.randn(4, 4, device=device)),
    ]
    for order in (pairs, pairs[::-1]):
        torch._dynamo.reset()
        modules = [Tied(*pair) for pair in order]
        expected = [Tied(*pair) for pair in order]
        for module in modules:
            module.compile(backend="sharedgraph")
        for _ in range(3):
            for ours, eager in zip(modules, expected, strict=True):
                grads = []
                for module in (ours, eager):
                    x = torch.ones(3, 4, device=device, requires_grad=True)
                    module(x).sum().backward()
                    grads.append(x.grad)
                torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_a_failing_capture_under_strict_writes_back_first(device, monkeypatch):
    def fail(self, run, **of_graph):
        raise sg.CaptureError("no")

    monkeypatch.setattr(type(sg.sharedgraph.device(device).driver), "capture", fail)
    f = compiled(lambda x: x.add_(1), strict=True)
    x = torch.zeros(3, device=device)
    with torch.no_grad(), pytest.raises(sg.RefusalError, match="capture failed: no"):
        f(x)
    assert x.tolist() == [1, 1, 1]


def test_another_layout_in_one_bucket_is_refused(device):
    """All graphs of a bucket share one layout; a capture that observes another one must not replace it."""
    linear = nn.Linear(4, 4, device=device)
    f = compiled(linear)
    x = torch.randn(3, 4, device=device)
    with torch.no_grad():
        f(x)
        (bucket,) = sg.sharedgraph.regions()[0].state.planner.buckets.values()
        bucket.layout = dataclasses.replace(bucket.layout, entries=())
        linear.weight.data = torch.randn(4, 4, device=device)
        torch.testing.assert_close(f(x), linear(x))
    assert any("outputs lie elsewhere" in reason for reason in sg.stats().fallbacks)


needs_move = pytest.mark.skipif(
    not hasattr(torch.UntypedStorage, "_swap_data_ptr_"), reason="torch before 2.12 can't move a live output"
)


def rows(n, device):
    x = torch.randn(n, 64, device=device)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
    return x


@needs_move
def test_no_memory_to_move_an_output_out(device, monkeypatch):
    f, x = compiled(lambda x: x * 2), rows(6, device)

    def full(self):
        raise torch.OutOfMemoryError("full")

    with torch.no_grad():
        y = f(x)
        with monkeypatch.context() as patch:
            patch.setattr(torch.UntypedStorage, "clone", full)
            torch.testing.assert_close(f(rows(6, device)).shape, y.shape)
        f(rows(6, device))
    torch.testing.assert_close(y, x * 2)


def test_outputs_of_another_thread_stay_where_they_are(device):
    """It may be reading them at this moment, and steps are counted for all threads together."""
    f, x = compiled(lambda x: x * 2), rows(6, device)
    with torch.no_grad():
        f(rows(6, device))
        y = f(x)
        address = y.data_ptr()

        def other():
            with torch.no_grad():
                for _ in range(3):
                    z = rows(6, device)
                    torch.testing.assert_close(f(z), z * 2)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert y.data_ptr() == address
    torch.testing.assert_close(y, x * 2)
    assert sg.stats().outputs_copied_out == 0


@pytest.mark.host_only("tensors on a GPU stay where they are when they are shared")
def test_an_output_whose_memory_was_shared_with_other_processes(device):
    f, g = compiled(lambda x: x * 2), compiled(lambda x: x + 1)
    with torch.no_grad():
        for _ in range(3):
            x = rows(6, device)
            y = f(x)
            y.share_memory_()
            torch.testing.assert_close(y, x * 2)
            z = rows(6, device)
            torch.testing.assert_close(f(z), z * 2)
            torch.testing.assert_close(g(y), x * 2 + 1)
            torch.testing.assert_close(y, x * 2)


def test_an_empty_output_that_the_user_resizes(device):
    f = compiled(lambda x: (x * 2, x.new_zeros(0)))
    with torch.no_grad():
        kept = []
        for _ in range(4):
            x = rows(6, device)
            y, empty = f(x)
            torch.testing.assert_close(y, x * 2)
            assert empty.shape == (0,)
            if device.type == "cpu":
                kept.append(empty.resize_(10).fill_(3))
    assert all((tensor == 3).all() for tensor in kept)


def test_outputs_that_share_memory_share_it_when_they_are_padded(device):
    def function(a):
        b = a + 7
        return b, b.t()

    f = compiled(function)
    with torch.no_grad():
        for n in (5, 6, 5, 9):
            a = torch.randn(4, n, device=device).t()
            torch._dynamo.maybe_mark_dynamic(a, 0)
            b, transposed = f(a)
            torch.testing.assert_close(b, a + 7)
            b.add_(1)
            torch.testing.assert_close(transposed, b.t())


def test_nothing_is_invalidated_for_a_graph_that_is_not_captured(device):
    options = {"on_overwrite": "error", "max_graphs": 2}
    f = torch.compile(lambda x: x + 1, backend="sharedgraph", options=options, dynamic=True)
    with torch.no_grad():
        f(torch.randn(5, 64, device=device))
        f(torch.randn(20, 64, device=device))
        x = torch.randn(20, 64, device=device)
        older = f(x)
        torch.compiler.cudagraph_mark_step_begin()
        kept = f(torch.randn(5, 64, device=device))
        for _ in range(2):
            y = torch.randn(5, 64, device=device)
            torch.testing.assert_close(f(y), y + 1)  # one is alive in this step: there is no graph for it
        torch.testing.assert_close(older, x + 1)
    assert kept.shape == (5, 64)
    assert sg.stats().graphs == 2


def test_no_memory_for_a_backward_that_has_used_up_its_arguments(device, monkeypatch):
    """It can't be run again on what it has overwritten."""
    linear = nn.Linear(64, 4, device=device)
    f = compiled(lambda x: linear(x).tanh().sin())
    bound_to, is_short = Allocations.bound_to, [True]

    def failing(self, compiled, device_type):
        run = bound_to(self, compiled, device_type)

        def late(inputs):
            results = run(inputs)
            if is_short:
                raise torch.OutOfMemoryError("late")
            return results

        return late

    y = f(rows(6, device))
    monkeypatch.setattr(Allocations, "bound_to", failing)
    with pytest.raises(torch.OutOfMemoryError, match="late"):
        y.sum().backward()
    is_short.clear()
    x = rows(6, device)
    (got,) = torch.autograd.grad(f(x).sum(), [linear.weight])
    (expected,) = torch.autograd.grad(linear(x).tanh().sin().sum(), [linear.weight])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_gradients_accumulate_under_on_overwrite_error(device):
    """What autograd holds is no output that the user could clone."""
    ours, eager = nn.Linear(64, 4, device=device), nn.Linear(64, 4, device=device)
    eager.load_state_dict(ours.state_dict())
    f = torch.compile(lambda x: ours(x).tanh(), backend="sharedgraph", options={"on_overwrite": "error"})
    for _ in range(3):
        x = rows(6, device)
        f(x).sum().backward()
        eager(x).tanh().sum().backward()
    torch.testing.assert_close(ours.weight.grad, eager.weight.grad, rtol=1e-4, atol=1e-5)


def test_an_output_that_blocks_many_places(device):
    """Places share bytes, so that one output that a caller keeps blocks several."""
    rng, f = random.Random(0), compiled(lambda x, y: (x * 2 + y, x.sum(1)))
    memory, out = torch.randn(1 << 16, device=device), None
    with torch.no_grad():
        for _ in range(150):
            n = rng.choice([33, 35, 36, 40])
            x = memory[rng.choice([0, 1, 2, 64, 4096]) :][: n * 16].view(n, 16)
            y = torch.randn(n, 16, device=device)
            if out is not None and len(out) == n:
                y = out
            for tensor in (x, y):
                torch._dynamo.mark_dynamic(tensor, 0, min=2, max=64)
            expected = x * 2 + y
            out, _ = f(x, y)
            torch.testing.assert_close(out, expected)
    assert sg.stats().fallbacks == {}
    assert sg.stats().read_in_place


def test_outputs_of_many_steps_are_kept(device):
    f, kept = compiled(lambda x: x * 2), []
    with torch.no_grad():
        for n in (5, 6, 7, 8) * 4:
            x = rows(n, device)
            kept.append((f(x), x * 2))
    for got, expected in kept:
        torch.testing.assert_close(got, expected)
    assert sg.stats().fallbacks == {}


def test_sizes_that_fall_as_rows_are_added(device):
    """What is left of a queue, of which as many entries go as come: a bucket's padded rows would take real ones."""

    def step(queue, x):
        left = queue[x.shape[0] :] * 2
        queue.copy_(torch.cat([left, x]))
        return left, left.sum(0) + x

    check(step, lambda n: [torch.randn(70, 4, device=device), torch.randn(n, 4, device=device)])
    assert "a size is not a multiple of the rows" in sg.explain()
