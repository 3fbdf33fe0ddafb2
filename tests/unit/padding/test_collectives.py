"""Collectives: rows stay apart where each process has them at the same places, padded or not; others are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.support.oracle import dynamic, refute, traced

ours, with_grad = torch.ops._c10d_functional, torch.ops._c10d_functional_autograd


@pytest.fixture(autouse=True)
def two_processes() -> Iterator[None]:
    """A group in which the other process has what this one has. This is its last process: it gets the last part."""
    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield
    distributed.destroy_process_group()


def group() -> str:
    return distributed.group.WORLD.group_name


def reducing(op: str) -> Callable[[Tensor], Tensor]:
    return lambda x: ours.wait_tensor(ours.all_reduce(x, op, group()))


def gathered(x: Tensor) -> Tensor:
    return ours.wait_tensor(ours.all_gather_into_tensor(x, 2, group()))


def scattering(op: str) -> Callable[[Tensor], Tensor]:
    return lambda x: ours.wait_tensor(ours.reduce_scatter_tensor(x, op, 2, group()))


def exchanged(x: Tensor) -> Tensor:
    half = 3
    return ours.wait_tensor(ours.all_to_all_single(x, [half, half], [half, half], group()))


reduced, scattered = reducing("sum"), scattering("sum")


def waited(tensors: list[Tensor]) -> list[Tensor]:
    return [ours.wait_tensor(tensor) for tensor in tensors]


#: A function of one tensor, the tensor's shape, and the dims along which padding must be judged safe.
CASES: dict[str, tuple[Callable[[Tensor], object], tuple[int, ...], set[int]]] = {
    **{f"all_reduce {op}": (reducing(op), (6, 7), {0, 1}) for op in ("sum", "avg", "max", "min", "product")},
    "all_reduce, summed up over rows": (lambda x: reduced(x).sum(0), (6, 7), {1}),
    "all_reduce of a joined batch": (lambda x: reduced(torch.cat([x, x])), (6, 7), {1}),
    "all_reduce_coalesced": (
        lambda x: waited(ours.all_reduce_coalesced([x, x.t(), torch.ones(3)], "sum", group())),
        (6, 7),
        {0, 1},
    ),
    "broadcast": (lambda x: ours.wait_tensor(ours.broadcast(x, 0, group())), (6, 7), {0, 1}),
    "all_gather": (gathered, (6, 7), {1}),
    "all_gather along columns": (lambda x: torch.cat(gathered(x).chunk(2), 1), (6, 7), {0}),
    "all_gather, one process's part": (lambda x: gathered(x).view(2, *x.shape)[1] * 1, (6, 7), {0, 1}),
    "all_gather of equal rows": (lambda x: gathered(x.new_ones(3).expand(x.shape[0], 3)) * 1, (6,), set()),
    "all_gather_coalesced": (
        lambda x: waited(ours.all_gather_into_tensor_coalesced([x, x.exp()], 2, group())),
        (6, 7),
        {1},
    ),
    "all_gather with grad": (
        lambda x: torch.cat(ours.wait_tensor(with_grad.all_gather_into_tensor(x, 2, group())).chunk(2), 1),
        (6, 7),
        {0},
    ),
    "reduce_scatter": (scattered, (6, 7), {1}),
    "reduce_scatter avg": (scattering("avg"), (6, 7), {1}),
    "reduce_scatter along columns": (lambda x: scattered(torch.cat(x.chunk(2, 1))), (6, 8), {0}),
    "reduce_scatter_coalesced": (
        lambda x: waited(ours.reduce_scatter_tensor_coalesced([x, x.exp()], "sum", 2, group())),
        (6, 7),
        {1},
    ),
    "reduce_scatter with grad": (
        lambda x: ours.wait_tensor(with_grad.reduce_scatter_tensor(x, "sum", 2, group())),
        (6, 7),
        {1},
    ),
    "all_to_all": (exchanged, (6, 7), {1}),
    "all_to_all with grad": (
        lambda x: ours.wait_tensor(with_grad.all_to_all_single(x, [3, 3], [3, 3], group())),
        (6, 7),
        {1},
    ),
    "all_to_all of all rows": (
        lambda x: ours.wait_tensor(ours.all_to_all_single(torch.cat([x, x]), [x.shape[0]] * 2, [x.shape[0]] * 2, "0")),
        (6, 7),
        {1},
    ),
}


@pytest.mark.parametrize("fill", ["replica", "zero"])
@pytest.mark.parametrize("name", CASES)
def test_rows_along_each_dim(name: str, fill: str):
    function, shape, expected = CASES[name]
    safe = set()
    for dim in range(len(shape)):
        found = traced(function, dynamic(torch.randn(shape), dim), decompose=False)
        if not found.symbols():
            continue  # the operator fixed the size
        verdict = found.prove(fill=fill)
        if verdict.refusal is None:
            safe.add(dim)
            assert refute(found, verdict, fill) is None, f"rows along dim {dim}"
    if fill == "replica":
        assert safe == expected


@pytest.mark.parametrize("function", [reduced, reducing("product"), lambda x: ours.broadcast(x, 1, "0")])
@pytest.mark.parametrize(("fill", "read"), [("zero", lambda x: x.sum(0)), ("replica", lambda x: x.amax(0))])
def test_what_padded_rows_hold_they_hold_everywhere(function, fill, read):
    found = traced(lambda x: read(function(x)), dynamic(torch.randn(5, 4)), decompose=False)
    verdict = found.prove(fill=fill)
    assert verdict.refusal is None
    assert verdict.needs_fill
    assert refute(found, verdict, fill) is None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (gathered, "padded rows come between the real rows of an output"),
        (scattered, "gives processes other rows than at the exact size"),
        (exchanged, "exchanges rows with other processes"),
    ],
)
def test_reasons(function: Callable[[Tensor], Tensor], reason: str):
    verdict = traced(function, dynamic(torch.randn(6, 4)), decompose=False).prove(masked=True)
    assert verdict.refusal is not None
    assert reason in verdict.refusal.reason
