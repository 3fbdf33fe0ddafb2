"""The staging kernel on the device: what it writes equals what ``stage`` writes, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from benchmarks import micro_staging
from cudagraph_backend.drivers.staging_kernel.jobs import MAX_DIMS
from cudagraph_backend.drivers.staging_kernel.kernel import cached_launch, normal_launch
from cudagraph_backend.drivers.staging_kernel.launches import KernelStaging, Launches
from cudagraph_backend.memory.copies import StagedCopy, stage, staged_copy
from tests.support.staging_inputs import DTYPES, Input, ways

LAUNCHERS = {"cached": cached_launch, "normal": normal_launch}


@pytest.fixture
def launches(device: torch.device) -> Launches:
    return Launches(device)


def assert_same(staging: KernelStaging, launches: Launches, inputs: Sequence[Input]) -> None:
    """After ``stage`` filled the first memory of every input, the kernel fills the second one alike."""
    staging([given.argument for given in inputs])
    torch.cuda.synchronize()
    assert launches.works
    for given in inputs:
        assert torch.equal(given.memories[0], given.memories[1]), (given.real, given.fill, given.argument.dtype)


def rows(n: int, bucket: int, dtype: torch.dtype, *more: int, index: int = 0) -> tuple[torch.Tensor, StagedCopy]:
    argument = torch.randint(0, 2, (n, *more), device="cuda").to(dtype)
    buffer = torch.zeros(bucket, *more, dtype=dtype, device="cuda")
    real = tuple(argument.shape), argument.stride()
    return argument, staged_copy(index, buffer, real, (1,) * len(real[0]), "replica")


def assert_replicated(buffer: torch.Tensor, argument: torch.Tensor) -> None:
    n = len(argument)
    assert torch.equal(buffer[:n].view(torch.uint8), argument.contiguous().view(torch.uint8))
    last = argument[-1:].expand(len(buffer) - n, *argument.shape[1:]).contiguous()
    assert torch.equal(buffer[n:].view(torch.uint8), last.view(torch.uint8))


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("seed", range(40))
def test_the_kernel_stages_as_operators_do(device: torch.device, launcher: str, seed: int):
    rng = random.Random(seed)
    inputs = [Input(rng, rng.choice(DTYPES), index, "cuda") for index in range(rng.randint(1, 40))]
    by_operators, by_kernel = ways(rng, inputs)
    stage(*by_operators, [given.argument for given in inputs])
    launches = Launches(device, LAUNCHERS[launcher])
    assert_same(KernelStaging(launches, *by_kernel), launches, inputs)


@pytest.mark.parametrize("dims", [2, MAX_DIMS])
def test_the_launcher_of_the_compiled_kernel_can_be_called(dims: int):
    """If this fails, Triton's launcher has changed, and launches cost ten times the host's time."""
    assert cached_launch(dims).__qualname__.startswith("cached_launch")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_at_decode_shapes(launches: Launches, dtype: torch.dtype):
    argument, copy = rows(100, 104, dtype, 128)
    KernelStaging(launches, [copy], ())([argument])
    assert_replicated(copy.bucket, argument)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 7, 8, 12, 16])
def test_sources_of_any_alignment(launches: Launches, offset: int):
    memory = torch.randint(0, 256, (2000,), dtype=torch.uint8, device="cuda")
    _, copy = rows(100, 104, torch.uint8, 16)
    staging = KernelStaging(launches, [copy], ())
    for first in (0, offset, offset + 16):
        argument = memory[first:][:1600].view(100, 16)
        staging([argument])
        assert_replicated(copy.bucket, argument)


@pytest.mark.parametrize("count", [1, 16, 17, 33])
def test_any_number_of_inputs(launches: Launches, count: int):
    made = [rows(100, 104, torch.int64, index=index) for index in range(count)]
    KernelStaging(launches, [copy for _, copy in made], ())([argument for argument, _ in made])
    for argument, copy in made:
        assert_replicated(copy.bucket, argument)


def test_an_input_that_each_program_moves_several_blocks_of(launches: Launches):
    argument, copy = rows(5000, 8192, torch.float32, 4096)
    KernelStaging(launches, [copy], ())([argument])
    assert_replicated(copy.bucket, argument)


def test_an_argument_of_the_host_is_copied_by_operators(launches: Launches):
    argument, copy = rows(100, 104, torch.int64)
    scalar, buffer = torch.tensor(3.5), torch.zeros((), device="cuda")
    copies = [copy, staged_copy(1, buffer, ((), ()), (), "replica")]
    KernelStaging(launches, copies, ())([argument, scalar])
    assert_replicated(copy.bucket, argument)
    assert buffer.item() == 3.5


def test_calls_on_several_streams(launches: Launches):
    argument, copy = rows(100, 104, torch.float32, 64)
    staging = KernelStaging(launches, [copy], ())
    streams = [torch.cuda.Stream() for _ in range(3)]
    for stream in streams:
        torch.cuda.synchronize()
        argument.normal_()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            staging([argument])
        torch.cuda.current_stream().wait_stream(stream)
        assert_replicated(copy.bucket, argument)


def test_a_call_is_one_kernel_and_no_copy(launches: Launches):
    made = [rows(100, 104, dtype, index=index) for index, dtype in enumerate([torch.int64, torch.bool, torch.bfloat16])]
    staging, args = KernelStaging(launches, [copy for _, copy in made], ()), [argument for argument, _ in made]
    staging(args)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        staging(args)
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in on_device if "stage_kernel" in name or "Memcpy" in name] == ["stage_kernel"]


def test_all_ways_of_the_study_run(device: torch.device):
    """Where the ways are made, their results are compared, too."""
    for way in micro_staging.staging_ways(4, 100, 104, device).values():
        way()
    torch.cuda.synchronize()
