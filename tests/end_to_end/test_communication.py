"""A region that communicates sends what other processes expect, which may replay its graph: its bucket's size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import cudagraph_backend as sg
from cudagraph_backend import sharedgraph
from cudagraph_backend.drivers.host import HostDriver
from cudagraph_backend.errors import CaptureError
from cudagraph_backend.padding import Call, Fact

pytestmark = pytest.mark.usefixtures("no_grad")

sent: list[int] = []
capturing: list[bool] = []


@torch.library.custom_op("communication::exchange", mutates_args=())
def exchange(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """Stands for a collective: by the name of its argument it is one."""
    if capturing:
        raise RuntimeError("not while capturing")
    sent.append(x.shape[0])
    return x + 1


exchange.register_fake(lambda x, group_name: torch.empty_like(x))


@pytest.fixture(autouse=True)
def it_treats_rows_apart(no_rules_left: None) -> None:
    sg.padding_rule("communication::exchange")(row_by_row)
    sent.clear()


def row_by_row(call: Call):
    return call.keep(Fact.REPLICA)


def no_memory(self: HostDriver, run: object, **of_graph: object) -> None:
    raise CaptureError("no memory") from torch.OutOfMemoryError("no memory")


def weighted(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    y = exchange(x * 2, "group") * weight
    return y, y, x.shape[0]


def test_without_a_graph_the_bucket_is_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(HostDriver, "capture", no_memory)
    options = {"capture_sizes": [8, 16]}
    compiled = torch.compile(weighted, backend="sharedgraph", options=options)
    for n in (5, 7, 8, 16, 11):
        x, weight = torch.randn(n, 4), torch.randn(4)
        torch._dynamo.mark_dynamic(x, 0)
        expected = (x * 2 + 1) * weight, (x * 2 + 1) * weight, n
        sent.clear()
        results = compiled(x, weight)
        torch.testing.assert_close(results, expected)
        assert results[0] is results[1]
        assert sent == [8 if n <= 8 else 16], n
    assert set(sg.stats().fallbacks) == {"no memory to capture a graph"}


def test_what_is_written_is_not_padded():
    """Without a graph it would be written to a copy, where it is padded, and twice where that is copied back."""

    def function(x: torch.Tensor) -> torch.Tensor:
        y = exchange(x * 2, "group")
        x.add_(1)
        return y

    compiled = torch.compile(function, backend="sharedgraph", dynamic=True)
    for n in (5, 7, 5):
        ours = torch.randn(n, 4)
        torch._dynamo.mark_dynamic(ours, 0)
        eager = ours.clone()
        torch.testing.assert_close(compiled(ours), eager * 2 + 1)
        torch.testing.assert_close(ours, eager + 1)
    assert sg.stats().rows_padded == 0
    assert "is written in place in a region that communicates" in sg.explain()
    assert sent[0] == 5


def called(compiled: Callable[[torch.Tensor], torch.Tensor], *shapes: tuple[int, int], marked: bool = True) -> None:
    for shape in shapes:
        x = torch.randn(shape)
        for dim in range(2) if marked else ():
            torch._dynamo.mark_dynamic(x, dim)
        torch.testing.assert_close(compiled(x), x * 2 + 1)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return exchange(x * 2, "group")


def test_the_bucket_depends_on_the_size_alone():
    """Neither on buckets that exist (64×80 would do for 60×60) nor on the number of dims (257 of two goes to 288)."""
    compiled = torch.compile(doubled, backend="sharedgraph")
    called(compiled, (60, 78), (60, 60), (257, 60))
    assert sent == [64, 64, 272]
    (replayer,) = sharedgraph.regions()
    assert replayer.state is not None
    assert list(replayer.state.planner.buckets) == [(64, 80), (64, 64), (272, 64)]
    assert sg.stats().padding[0].existing_percent is None


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_dim_that_is_not_marked_is_not_padded(dynamic: bool | None):
    """Where sizes did not change, or two dims were equal at first, another process has compiled something else."""
    compiled = torch.compile(doubled, backend="sharedgraph", dynamic=dynamic)
    called(compiled, (5, 4), (7, 4), (9, 4), marked=False)
    assert sg.stats().rows_padded == 0
    assert "mark the dim with torch._dynamo.mark_dynamic in all of them" in sg.explain()
    assert set(sent) == {5, 7, 9}


def test_a_dim_that_is_not_marked_is_padded_if_the_user_knows_better():
    compiled = torch.compile(doubled, backend="sharedgraph", dynamic=True, options={"pad": "assume"})
    called(compiled, (5, 4), (7, 4), marked=False)
    assert set(sent) == {8}


def test_a_failed_capture_cuts_nothing_out_that_is_sent_padded(monkeypatch: pytest.MonkeyPatch):
    """Cut out, it would send the real rows, where other processes send the bucket's."""

    def fails(self: HostDriver, run: Callable[[], None], **of_graph: object) -> None:
        capturing.append(True)
        try:
            run()
        except RuntimeError as error:
            raise CaptureError(str(error)) from error
        finally:
            capturing.clear()

    monkeypatch.setattr(HostDriver, "capture", fails)
    compiled = torch.compile(doubled, backend="sharedgraph")
    called(compiled, (5, 4), (7, 4), (6, 4))
    assert set(sent) == {8}
    assert len(sg.stats().fallbacks) == 1
