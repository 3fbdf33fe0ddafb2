"""Launches of the staging kernel: on which stream and device, with which table; the kernel itself needs a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cudagraph_backend.drivers.staging_kernel import launches as launches_module
from cudagraph_backend.drivers.staging_kernel.jobs import FEW_DIMS, MAX_SOURCES
from cudagraph_backend.drivers.staging_kernel.launches import DeviceTable, KernelStaging, Launches
from cudagraph_backend.memory.copies import staged_copy

Launched = list[tuple[int, int, int, Sequence[int], int]]


class Gpu:
    """A GPU as far as launches ask for it: its memory is the host's, and its kernel keeps how it was launched."""

    def __init__(self) -> None:
        self.device: Any = SimpleNamespace(index=0)
        self.current, self.stream = 0, 7
        self.kernels: list[int] = []
        self.launched: Launched = []

    @contextlib.contextmanager
    def on(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    def launcher(self, dims: int) -> Any:
        self.kernels.append(dims)
        return lambda *given: self.launched.append((*given, self.current))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(launches_module, "raw_stream", lambda index: made.stream)
    monkeypatch.setattr(launches_module, "current_device_index", lambda: made.current)
    monkeypatch.setattr(torch.cuda, "device", made.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream", made.stream))
    to, zeros = torch.Tensor.to, torch.zeros
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args: self if args == (made.device,) else to(self, *args))
    monkeypatch.setattr(torch, "zeros", lambda *args, device=None, **kwargs: zeros(*args, **kwargs))
    return made


def staged(launches: Launches, argument: torch.Tensor) -> KernelStaging:
    bucket = torch.empty(8, 2)
    staging = KernelStaging(launches, [staged_copy(0, bucket, ((6, 2), (2, 1)), (1, 1), "replica")], ())
    staging([argument])
    return staging


def test_a_table_is_launched_with_the_addresses_of_the_call(gpu: Gpu):
    launches, first, second = Launches(gpu.device, gpu.launcher), torch.randn(6, 2), torch.randn(6, 2)
    staging = staged(launches, first)
    staging([second])
    staging([torch.randn(13)[1:].view(6, 2)])
    assert gpu.kernels == [FEW_DIMS], "one kernel for all tables of so many dims"
    (programs, stream, table, sources, device), later, unaligned = gpu.launched
    assert unaligned[2] != table, "one for each alignment"
    assert programs > 0
    assert (stream, device) == (7, 0)
    assert sources == [first.data_ptr(), *[0] * (MAX_SOURCES - 1)]
    assert later == (programs, 7, table, [second.data_ptr(), *[0] * (MAX_SOURCES - 1)], 0)


def test_a_launch_goes_to_the_device_of_the_memory(gpu: Gpu):
    gpu.current = 1
    staged(Launches(gpu.device, gpu.launcher), torch.randn(6, 2))
    assert [launched[-1] for launched in gpu.launched] == [0]
    assert gpu.current == 1


def test_the_allocator_knows_each_stream_that_reads_a_table_once(gpu: Gpu):
    recorded: list[Any] = []
    table = DeviceTable(SimpleNamespace(record_stream=recorded.append), 0, 1, FEW_DIMS, {7})  # type: ignore[arg-type]
    launches = Launches(gpu.device, gpu.launcher)
    for gpu.stream in (7, 8, 8, 7, 9):
        assert launches.keep(table) == gpu.stream
    assert recorded == [("stream", 8), ("stream", 9)]


def test_the_table_that_does_nothing_is_made_once(gpu: Gpu):
    launches = Launches(gpu.device, gpu.launcher)
    idle = launches.idle()
    assert idle is not None
    assert (idle.programs, idle.dims) == (1, FEW_DIMS)
    assert not idle.words.any()
    assert launches.idle() is idle


def test_there_is_none_without_a_kernel(gpu: Gpu, caplog: pytest.LogCaptureFixture):
    def fail(dims: int) -> Any:
        raise RuntimeError("no compiler")

    launches = Launches(gpu.device, fail)
    assert launches.idle() is None
    assert not launches.works
    assert "inputs are copied one by one, as the staging kernel fails: RuntimeError: no compiler" in caplog.text


def test_without_memory_for_a_table_inputs_are_copied_and_the_next_one_is_tried(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
):
    launches, argument, bucket = Launches(gpu.device, gpu.launcher), torch.randn(6, 2), torch.empty(8, 2)
    copies = [staged_copy(0, bucket, ((6, 2), (2, 1)), (1, 1), "replica")]

    def full(listed: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(launches_module, "table", full)
        KernelStaging(launches, copies, ())([argument])
    assert gpu.launched == []
    assert torch.equal(bucket, torch.cat([argument, argument[-1:], argument[-1:]]))
    assert launches.works
    staged(launches, argument)
    assert len(gpu.launched) == 1
