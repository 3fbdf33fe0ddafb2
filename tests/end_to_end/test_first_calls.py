"""The call that finds a size to be no use to a graph still gives eager's results, and happens once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cudagraph_backend as sg
from cudagraph_backend import torch_internals
from cudagraph_backend.drivers.host import HostDriver, HostMemory
from cudagraph_backend.runtime.allocations import Allocations
from cudagraph_backend.runtime.places import Places

CPU = torch.device("cpu")
NO_POOL = "no memory for the output pool: full"


def dynamic(n: int, width: int = 4) -> torch.Tensor:
    x = torch.randn(n, width)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
    return x


@pytest.fixture
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is staged finds room in the output pool, the outputs none."""

    def full(self: HostMemory, nbytes: int) -> None:
        raise torch.OutOfMemoryError("full")

    provide = Places.provide

    def provide_in_vain(self: Places, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(HostMemory, "grow", full)
            return provide(self, *args)

    monkeypatch.setattr(Places, "provide", provide_in_vain)


@pytest.fixture
def no_memory_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets can't be run as they are before they are captured; plain calls can."""

    def bound_to(self: Allocations, compiled: Any, device_type: str) -> Callable[..., Any]:
        def run(inputs: list[Any]) -> Any:
            raise torch.OutOfMemoryError("none to run it")

        return run

    monkeypatch.setattr(Allocations, "bound_to", bound_to)


def writes(x: torch.Tensor, total: torch.Tensor) -> tuple[Any, ...]:
    doubled = x * 2
    total.add_(1)
    return doubled, doubled, total, x.size(0), None


@pytest.mark.usefixtures("small_pool", "no_grad")
def test_what_a_run_has_written_is_written_once_where_its_results_find_no_room():
    compiled = torch.compile(writes, backend="sharedgraph")
    for calls, n in enumerate((5, 5, 7, 5), start=1):
        x, ours, eager = dynamic(n), torch.zeros(3), torch.zeros(3)
        results, expected = compiled(x, ours), writes(x, eager)
        torch.testing.assert_close(results, expected)
        torch.testing.assert_close(ours, torch.ones(3))
        assert results[0] is results[1], "one tensor is returned twice"
        assert results[2] is ours
        assert sg.stats().fallbacks == {NO_POOL: calls}
    assert (sg.stats().captures, sg.stats().replays) == (0, 0)


@pytest.mark.usefixtures("small_pool")
def test_a_backward_runs_once_where_its_results_find_no_room():
    weight = torch.randn(4, 4, requires_grad=True)
    compiled = torch.compile(lambda x: (x @ weight).tanh().sin(), backend="sharedgraph")
    for n in (5, 5, 7):
        x = dynamic(n)
        result, expected = compiled(x), (x @ weight).tanh().sin()
        torch.testing.assert_close(result, expected)
        ours, eager = (torch.autograd.grad(y.square().sum(), weight) for y in (result, expected))
        torch.testing.assert_close(ours, eager)
    assert set(sg.stats().fallbacks) == {NO_POOL}
    assert sg.stats().captures == 0


@pytest.mark.usefixtures("small_pool")
def test_a_forward_that_writes_hands_its_arguments_on_to_the_backward_as_they_came():
    """They are read there at the sizes of the call, not of its bucket."""
    weight, calls = torch.randn(4, 4, requires_grad=True), torch.zeros(3)

    def function(x: torch.Tensor, calls: torch.Tensor) -> torch.Tensor:
        calls.add_(1)
        return (x @ weight).tanh()

    compiled = torch.compile(function, backend="sharedgraph")
    for number, n in enumerate((5, 5, 7), start=1):
        x = dynamic(n)
        result, expected = compiled(x, calls), (x @ weight).tanh()
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(calls, torch.full((3,), float(number)))
        ours, eager = (torch.autograd.grad(y.square().sum(), weight) for y in (result, expected))
        torch.testing.assert_close(ours, eager)
    assert set(sg.stats().fallbacks) == {NO_POOL}


@pytest.mark.usefixtures("no_memory_to_run", "no_grad")
def test_without_memory_to_run_a_bucket_the_call_runs_at_its_own_size():
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    for n in (5, 5, 7):
        x = dynamic(n)
        torch.testing.assert_close(compiled(x), x * 2)
    assert sg.stats().fallbacks == {"no memory to run a padded bucket": 3}
    assert sg.stats().captures == 0


@pytest.mark.usefixtures("no_memory_to_run", "no_grad")
def test_without_memory_to_run_a_bucket_that_may_have_written_something_the_error_is_the_callers():
    compiled = torch.compile(writes, backend="sharedgraph")
    with pytest.raises(torch.OutOfMemoryError, match="none to run it"):
        compiled(dynamic(5), torch.zeros(3))


@pytest.mark.usefixtures("no_grad")
def test_results_that_lie_otherwise_than_inductor_states_go_to_no_pool(monkeypatch: pytest.MonkeyPatch):
    """Where the rows of another size are would be a guess."""
    monkeypatch.setattr(torch_internals, "output_strides", lambda compiled: [("1", "8")])
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    for n in (5, 7):
        x = dynamic(n)
        torch.testing.assert_close(compiled(x), x * 2)
    assert sg.stats().fallbacks == {"output 0 has strides (4, 1) where Inductor states (1, 8)": 2}
    assert sg.stats().captures == 0


@pytest.mark.usefixtures("no_grad")
def test_results_of_a_size_that_the_graph_does_not_state_go_to_no_pool(monkeypatch: pytest.MonkeyPatch):
    bound_to = Allocations.bound_to

    def cut(self: Allocations, compiled: Any, device_type: str) -> Callable[..., Any]:
        run = bound_to(self, compiled, device_type)
        return lambda inputs: [result[1:] for result in run(inputs)]

    monkeypatch.setattr(Allocations, "bound_to", cut)
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    for n in (5, 7):
        x = dynamic(n)
        torch.testing.assert_close(compiled(x), x * 2)
    assert sg.stats().fallbacks == {"output 0 has size (7, 4), which the graph does not state": 2}
    assert sg.stats().captures == 0


@pytest.mark.usefixtures("no_grad")
def test_inside_a_capture_of_the_users_own_the_region_runs_as_it_is(monkeypatch: pytest.MonkeyPatch):
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    for is_capturing in (False, True, False):
        monkeypatch.setattr(HostDriver, "is_capturing", lambda self, answer=is_capturing: answer)
        x = dynamic(5)
        torch.testing.assert_close(compiled(x), x * 2)
    assert list(sg.stats().fallbacks.values()) == [1]
    assert (sg.stats().captures, sg.stats().replays) == (1, 2)
