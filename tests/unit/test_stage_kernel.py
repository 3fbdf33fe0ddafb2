"""The staging kernel, in Triton's interpreter: it does what ``stage`` does, bit for bit, and writes nothing else."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cudagraph_backend.drivers.staging_kernel import jobs as jobs_module
from cudagraph_backend.drivers.staging_kernel.jobs import (
    ADDRESS,
    BLOCK,
    CONSTANT,
    FEW_DIMS,
    MAX_DIMS,
    MAX_SOURCES,
    Dim,
    Job,
    jobs,
    table,
)
from cudagraph_backend.drivers.staging_kernel.launches import DeviceTable, KernelStaging
from cudagraph_backend.memory.copies import stage, staged_copy
from cudagraph_backend.memory.strides import extent
from tests.support.staging_inputs import DTYPES, Input, ways

triton = pytest.importorskip("triton")
micro_staging = pytest.importorskip("benchmarks.micro_staging")  # which imports Triton, too


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """The kernel's module once more, interpreted; the one that others import stays as it is."""
    if triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton's interpreter before 3.7 makes numbers of arrays as NumPy 2.4 does not allow")
    from cudagraph_backend.drivers.staging_kernel import kernel as original

    spec = importlib.util.spec_from_file_location("interpreted_stage", original.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module


class InterpretedLaunches:
    """``Launches`` on the CPU, by the interpreter; counts them."""

    works = True

    def __init__(self, module: ModuleType):
        self._kernel = module.stage_kernel
        self.count = 0
        self.tables: list[jobs_module.Table] = []

    def table(self, listed: Sequence[Job]) -> DeviceTable:
        made = table(listed)
        self.tables.append(made)
        words = torch.tensor(made.words)
        return DeviceTable(words, words.data_ptr(), made.programs, made.dims)

    def launch(self, table: DeviceTable, sources: Sequence[int]) -> None:
        self.count += 1
        sources = [*sources, *[0] * (MAX_SOURCES - len(sources))]
        self._kernel[(table.programs,)](table.address, *sources, DIMS=table.dims, BLOCK=BLOCK)

    def keep(self, table: DeviceTable) -> int:
        return 0


class InterpretedNode:
    """The first node of a graph; ``replay`` is the graph's launch."""

    def __init__(self, launches: InterpretedLaunches, dims: int):
        self.dims = dims
        self._launches = launches
        self._told: tuple[DeviceTable, Sequence[int]] | None = None
        self._is_told = False
        self.staged = 0

    def stage(self, table: DeviceTable, sources: Sequence[int]) -> None:
        assert table.dims == self.dims
        assert table.programs
        self._told, self._is_told = (table, sources), True

    def skip(self) -> None:
        self._told, self._is_told = None, True

    def replay(self) -> None:
        assert self._is_told, "the node would do what it did for the call before"
        self._is_told = False
        if self._told is not None:
            count, self.staged = self._launches.count, self.staged + 1
            self._launches.launch(*self._told)
            self._launches.count = count


@pytest.fixture
def launches(interpreted: ModuleType) -> InterpretedLaunches:
    return InterpretedLaunches(interpreted)


def staged_by_kernel(launches: Any, copies: Any, in_place: Any, args: Sequence[Any]) -> KernelStaging:
    staging = KernelStaging(launches, copies, in_place)
    staging(args)
    return staging


@pytest.mark.parametrize("seed", range(60))
def test_the_kernel_stages_as_operators_do(launches: InterpretedLaunches, seed: int):
    rng = random.Random(seed)
    inputs = [Input(rng, rng.choice(DTYPES), index) for index in range(rng.randint(1, 6))]
    args = [given.argument for given in inputs]
    by_operators, by_kernel = ways(rng, inputs)
    stage(*by_operators, args)
    staged_by_kernel(launches, *by_kernel, args)
    for given in inputs:
        assert torch.equal(given.memories[0], given.memories[1]), (given.real, given.fill, given.argument.dtype)
    assert launches.count <= 1


@pytest.mark.parametrize("dims", [FEW_DIMS, MAX_DIMS])
@pytest.mark.parametrize("seed", range(20))
def test_a_node_and_what_runs_before_it_stage_as_operators_do(launches: InterpretedLaunches, seed: int, dims: int):
    rng = random.Random(seed)
    node = InterpretedNode(launches, dims)
    for _ in range(3):  # routes of one graph
        inputs = [Input(rng, rng.choice(DTYPES), index) for index in range(rng.randint(0, 6))]
        args = [given.argument for given in inputs]
        by_operators, by_kernel = ways(rng, inputs)
        stage(*by_operators, args)
        KernelStaging(launches, *by_kernel)(args, node)
        node.replay()
        for given in inputs:
            assert torch.equal(given.memories[0], given.memories[1]), (given.real, given.fill, given.argument.dtype)


def test_typical_inputs_are_staged_by_the_node_alone(launches: InterpretedLaunches):
    argument, bucket = torch.randn(100, 64), torch.zeros(104, 64)
    staging = KernelStaging(launches, [staged_copy(0, bucket, ((100, 64), (64, 1)), (1, 1), "replica")], ())
    node = InterpretedNode(launches, FEW_DIMS)
    for values in (argument, torch.randn(100, 64), argument):
        bucket.fill_(-1)
        staging([values], node)
        node.replay()
        assert torch.equal(bucket, torch.cat([values, values[-1:].expand(4, 64)]))
    assert (node.staged, launches.count) == (3, 0)


def test_typical_inputs_are_few_wide_jobs(launches: InterpretedLaunches):
    """Ids, positions, a mask and hidden states of 100 rows in a bucket of 104: rows in sequence move in eight bytes."""
    args = [torch.arange(100), torch.arange(100), torch.ones(100, dtype=torch.bool), torch.randn(100, 64).bfloat16()]
    buckets = [torch.zeros(104, *arg.shape[1:], dtype=arg.dtype) for arg in args]
    shapes = [(tuple(arg.shape), arg.stride()) for arg in args]
    copies = [
        staged_copy(i, bucket, shape, (1,) * len(shape[0]), "replica")
        for i, (bucket, shape) in enumerate(zip(buckets, shapes, strict=True))
    ]
    staged_by_kernel(launches, copies, (), args)
    for bucket, arg in zip(buckets, args, strict=True):
        assert torch.equal(bucket, torch.cat([arg, arg[-1:].expand(4, *arg.shape[1:])]))
    assert [job.unit for job in jobs(copies[3], args[3].stride(), 0) or ()] == [8, 8]
    assert (launches.tables[0].dims, launches.count) == (2, 1)


def test_later_calls_bring_other_addresses_of_any_alignment(launches: InterpretedLaunches):
    memory, bucket = torch.randn(64).view(torch.uint8), torch.zeros(12, 2, dtype=torch.uint8)
    staging = KernelStaging(launches, [staged_copy(0, bucket, ((10, 2), (2, 1)), (1, 1), "replica")], ())
    for offset in (0, 16, 1, 2, 4, 8, 12, 1, 32):
        argument = memory[offset:][:20].view(10, 2)
        staging([argument])
        assert torch.equal(bucket, torch.cat([argument, argument[-1:], argument[-1:]]))
    assert len(launches.tables) == 5


def test_a_route_has_few_tables_and_is_staged_right_beyond_them(launches: InterpretedLaunches):
    memories = [torch.randn(32).view(torch.uint8) for _ in range(2)]
    buckets = [torch.zeros(12, dtype=torch.uint8) for _ in range(2)]
    copies = [staged_copy(i, bucket, ((10,), (1,)), (1,), "zero") for i, bucket in enumerate(buckets)]
    staging = KernelStaging(launches, copies, ())
    for first, second in [*((a, b) for a in (1, 2, 4, 8) for b in (1, 2, 4, 8)), (0, 0), (16, 0)]:
        args = [memories[0][first:][:10], memories[1][second:][:10]]
        staging(args)
        for bucket, arg in zip(buckets, args, strict=True):
            assert torch.equal(bucket, torch.cat([arg, torch.zeros(2, dtype=torch.uint8)]))
    assert (len(launches.tables), launches.count) == (9, 10)


def test_more_inputs_than_a_launch_takes_are_several_launches(launches: InterpretedLaunches):
    count = 2 * MAX_SOURCES + 1
    args = [torch.randn(3, 2) for _ in range(count)]
    buckets = [torch.zeros(5, 2) for _ in args]
    copies = [staged_copy(i, b, ((3, 2), (2, 1)), (1, 1), "zero") for i, b in enumerate(buckets)]
    staged_by_kernel(launches, copies, (), args)
    assert launches.count == 3
    for bucket, arg in zip(buckets, args, strict=True):
        assert torch.equal(bucket, torch.cat([arg, torch.zeros(2, 2)]))


def test_the_study_launches_the_kernel_as_it_is_compiled(
    launches: InterpretedLaunches, monkeypatch: pytest.MonkeyPatch
):
    argument, bucket = torch.randn(3, 2), torch.zeros(5, 2)
    staging = staged_by_kernel(launches, [staged_copy(0, bucket, ((3, 2), (2, 1)), (1, 1), "zero")], (), [argument])
    launched: list[tuple[Any, ...]] = []
    launches._by_dims = {FEW_DIMS: lambda *given: launched.append(given)}  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    micro_staging.bare_launch(launches, staging, [argument])()  # type: ignore[arg-type]
    table = staging._parts[0]._aligned  # type: ignore[index]
    assert launched == [(table.programs, 7, table.address, [argument.data_ptr(), *[0] * (MAX_SOURCES - 1)])]


def test_long_inputs_are_shared_out(launches: InterpretedLaunches, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs_module, "_PROGRAMS", 3)
    argument, bucket = torch.randn(5000), torch.zeros(20000)
    staged_by_kernel(launches, [staged_copy(0, bucket, ((5000,), (1,)), (1,), "replica")], (), [argument])
    assert torch.equal(bucket, torch.cat([argument, argument[-1:].expand(15000)]))
    assert launches.tables[0].programs <= 5


@pytest.mark.parametrize("conjugated", [False, True])
def test_values_that_memory_holds_negated_are_resolved(launches: InterpretedLaunches, conjugated: bool):
    values = torch.randn(3, 2, dtype=torch.complex64)
    argument = values.conj() if conjugated else values.conj().imag
    bucket = torch.zeros(4, 2, dtype=argument.dtype)
    real = tuple(argument.shape), argument.stride()
    staged_by_kernel(launches, [staged_copy(0, bucket, real, (1, 1), "replica")], (), [argument])
    assert torch.equal(bucket[:3], argument.resolve_conj().resolve_neg())


def test_what_does_not_fit_is_staged_one_by_one(launches: InterpretedLaunches):
    size = (2,) * (MAX_DIMS + 1)
    stride = tuple(3**dim for dim in range(MAX_DIMS + 1))
    odd = torch.randn(extent(size, stride)).as_strided(size, stride)
    numbers = torch.randn(3, dtype=torch.complex128)
    fits, args = torch.randn(3), [odd, numbers]
    args.append(fits)
    buckets = [torch.zeros_like(odd), torch.zeros(4, dtype=torch.complex128), torch.zeros(4)]
    copies = [
        staged_copy(0, buckets[0], (size, stride), (1,) * len(size), "replica"),
        staged_copy(1, buckets[1], ((3,), (1,)), (1,), 2.0),
        staged_copy(2, buckets[2], ((3,), (1,)), (1,), 2.0),
    ]
    staged_by_kernel(launches, copies, (), args)
    assert torch.equal(buckets[0], odd)
    assert torch.equal(buckets[1], torch.cat([numbers, torch.tensor([2.0])]))
    assert torch.equal(buckets[2], torch.cat([fits, torch.tensor([2.0])]))
    assert launches.count == 1


def test_nothing_to_do_launches_nothing(launches: InterpretedLaunches):
    buffer = torch.randn(4, 2)
    exact = staged_copy(0, buffer, ((4, 2), (2, 1)), (1, 1), "replica")
    empty = staged_copy(1, torch.zeros(0, 2), ((0, 2), (2, 1)), (1, 1), "replica")
    staged_by_kernel(launches, [empty], [exact], [buffer, torch.zeros(0, 2)])
    assert (launches.count, launches.tables) == (0, [])


def test_a_kernel_that_fails_is_done_without(launches: InterpretedLaunches, caplog: pytest.LogCaptureFixture):
    def fail(listed: Sequence[Job]) -> DeviceTable:
        raise RuntimeError("no compiler")

    launches.table = fail  # type: ignore[method-assign]
    argument, bucket = torch.randn(3), torch.zeros(4)
    copies = [staged_copy(0, bucket, ((3,), (1,)), (1,), "zero")]
    for _ in range(2):
        staged_by_kernel(launches, copies, (), [argument])
    assert torch.equal(bucket, torch.cat([argument, torch.zeros(1)]))
    assert caplog.text.count("no compiler") == 1


def test_jobs_of_rows_in_sequence_are_merged():
    bucket = torch.zeros(8, 3, 4, dtype=torch.int16)
    copy = staged_copy(0, bucket, ((6, 3, 4), (12, 4, 1)), (1, 1, 1), "replica")
    real, replica = jobs(copy, (12, 4, 1), 2) or ()
    address = bucket.data_ptr()
    assert real == Job(address, 2, 0, 8, (Dim(18, 8, 8),))
    assert replica == Job(address + 6 * 24, 2, 5 * 24, 8, (Dim(3, 8, 8), Dim(2, 24, 0)))
    assert jobs(copy, None) == (Job(address + 144, ADDRESS, address + 120, 8, (Dim(3, 8, 8), Dim(2, 24, 0))),)
    ones = staged_copy(0, bucket, ((6, 3, 4), (12, 4, 1)), (1, 1, 1), 1)
    assert jobs(ones, None) == (Job(address + 144, CONSTANT, 0x1000100010001, 8, (Dim(6, 8, 8),)),)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dims", [2, MAX_DIMS])
def test_the_kernel_compiles_for_gpus(capability: int, dims: int):
    from triton.backends.compiler import GPUTarget

    from cudagraph_backend.drivers.staging_kernel.kernel import SOURCES, stage_kernel

    signature = dict.fromkeys(("table", *SOURCES), "i64") | dict.fromkeys(("DIMS", "BLOCK"), "constexpr")
    source = triton.compiler.ASTSource(stage_kernel, signature, {"DIMS": dims, "BLOCK": BLOCK})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared == 0
