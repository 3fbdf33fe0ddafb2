"""Kernels of the users', which run nowhere but on a GPU, and a collective of a process group of its own."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed._functional_collectives as collectives
import triton
import triton.language as tl
from torch import distributed

import cudagraph_backend as sg
from tests.support.operators import wave
from tests.support.regions import SIZES, Kept, check, kinds, two


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=inside) + tl.load(y_ptr + at, mask=inside), mask=inside)


@triton.jit
def increment_kernel(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=inside) + 1, mask=inside)


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), 256),)](x, y, out, x.numel(), BLOCK=256)
    return out


def increment(x: torch.Tensor) -> None:
    increment_kernel[(triton.cdiv(x.numel(), 256),)](x, x.numel(), BLOCK=256)


def test_a_users_kernel_is_captured_at_every_size(device, weight):
    stats = check(lambda x, w: add(two(x @ w), x).relu() @ w, lambda n: [torch.randn(n, 8, device=device), weight])
    assert stats.fallbacks == {}
    assert stats.graphs == len(set(SIZES))
    assert "triton_kernel_wrapper_functional" in sg.explain()  # why nothing is padded


def test_a_users_kernel_that_no_row_reaches_does_not_keep_from_padding(device, weight):
    stats = check(lambda x, w: x @ add(w, w) + 1, lambda n: [torch.randn(n, 8, device=device), weight])
    assert stats.fallbacks == {}
    assert stats.rows_padded > 0


def test_results_of_a_users_kernel_are_kept_and_fed_back(device):
    def function(x):
        y = x * 0.5
        increment(y)
        return add(y, x)

    compiled = torch.compile(function, backend="sharedgraph")
    ours = eager = torch.randn(6, 8, device=device)
    kept = Kept()
    with torch.no_grad():
        for _ in range(6):
            ours, eager = compiled(ours), function(eager)
            kept.keep(ours, eager)
    assert sg.stats().fallbacks == {}
    assert sg.stats().graphs > 0


def test_an_argument_and_a_buffer_that_a_users_kernel_writes(device):
    total = torch.zeros(8, device=device)
    torch._dynamo.mark_static_address(total)

    def function(x, total):
        increment(total)
        increment(x)
        return x * total

    compiled = torch.compile(function, backend="sharedgraph")
    with torch.no_grad():
        for calls, n in enumerate(SIZES, start=1):
            ours = torch.randn(n, 8, device=device)
            expected = ours + 1
            torch._dynamo.mark_dynamic(ours, 0)
            torch.testing.assert_close(compiled(ours, total), expected * calls)
            torch.testing.assert_close(ours, expected)
            torch.testing.assert_close(total, torch.full_like(total, calls))
    assert sg.stats().fallbacks == {}


def test_users_kernels_around_an_operator_that_is_cut_out(device, weight):
    check(
        lambda x, w: add(two(wave(add(two(x @ w), x)) @ w), x),
        lambda n: [torch.randn(n, 8, device=device), weight],
    )
    assert kinds() == "[c.c]"


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    yield
    torch._dynamo.reset()
    distributed.destroy_process_group()


def test_a_collective_is_captured_with_its_wait(device, weight, one_process):
    def function(x, w):
        return collectives.all_reduce(two(x @ w), "sum", distributed.group.WORLD) + 1

    stats = check(function, lambda n: [torch.randn(n, 8, device=device), weight])
    assert stats.fallbacks == {}
    assert stats.graphs == len(set(SIZES))
