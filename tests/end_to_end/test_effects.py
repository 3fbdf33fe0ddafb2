"""Every side effect of a call happens exactly once: in-place changes, buffers, caches, random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cudagraph_backend as sg

SIZES = (5, 11, 3, 64, 5, 17, 11, 2, 40)


def test_argument_changed_in_place(device):
    def function(x, y):
        x.add_(y)
        return x * 2

    compiled = torch.compile(function, backend="sharedgraph")
    with torch.no_grad():
        for n in SIZES:
            wide = torch.zeros(n + 2, 6, device=device)
            x, y = wide[1:-1, 1:5], torch.randn(n, 4, device=device)
            for calls in (1, 2, 3):
                out = compiled(x, y)
                torch.testing.assert_close(x, y * calls)
                torch.testing.assert_close(out, y * calls * 2)
            assert torch.equal(wide[0], torch.zeros(6, device=device))
            assert torch.equal(wide[-1], torch.zeros(6, device=device))
            assert torch.equal(wide[:, ::5], torch.zeros(n + 2, 2, device=device))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        self.calls += 1
        self.total += x[0]
        return x + self.calls


def test_buffers(device):
    ours, eager = Counting().to(device), Counting().to(device)
    compiled = torch.compile(ours, backend="sharedgraph")
    with torch.no_grad():
        for n in SIZES * 2:
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(compiled(x), eager(x))
            assert ours.calls == eager.calls
            torch.testing.assert_close(ours.total, eager.total)
    assert sg.stats().fallbacks == {}


class SlotCache(nn.Module):
    """A key-value cache with a slot per request: each call writes one position of the slots it serves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(70, 8, 4))
        self.proj = nn.Linear(4, 4)

    def forward(self, x, slots, position):
        self.cache[slots, position] = self.proj(x)
        return self.cache[slots].sum(1)


def test_slot_indexed_cache(device):
    torch.manual_seed(1)
    ours, eager = SlotCache().to(device), SlotCache().to(device)
    eager.load_state_dict(ours.state_dict())
    compiled = torch.compile(ours, backend="sharedgraph")
    with torch.no_grad():
        for n in SIZES * 2:
            x = torch.randn(n, 4, device=device)
            slots = torch.randperm(70, device=device)[:n]
            position = torch.randint(0, 8, (n,), device=device)
            torch.testing.assert_close(compiled(x, slots, position), eager(x, slots, position), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours.cache, eager.cache, rtol=1e-5, atol=1e-5)


def test_accumulating_writes_count_every_row_once(device):
    def function(table, index, x):
        table.index_add_(0, index, x)
        return x * 2

    compiled = torch.compile(function, backend="sharedgraph")
    with torch.no_grad():
        ours, eager = (torch.zeros(10, 4, device=device) for _ in range(2))
        for n in SIZES:
            x, index = torch.randn(n, 4, device=device), torch.randint(0, 10, (n,), device=device)
            compiled(ours, index, x)
            eager.index_add_(0, index, x)
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_random_numbers_are_drawn_once_per_call(device):
    """The generator stands after every call where the compiled region alone leaves it, and no draw repeats."""

    def function(x):
        return x + torch.rand_like(x)

    results = {}
    for backend in ("inductor", "sharedgraph"):
        torch._dynamo.reset()
        torch.manual_seed(3)
        compiled = torch.compile(function, backend=backend)
        with torch.no_grad():
            results[backend] = [compiled(torch.zeros(n, 4, device=device)).clone() for n in (5, 7, 7, 9, 5, 7)]
    for ours, theirs in zip(results["sharedgraph"], results["inductor"], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(results["sharedgraph"][1], results["sharedgraph"][2])


def test_dropout_differs_between_calls(device):
    dropout = torch.compile(nn.Dropout(0.5), backend="sharedgraph")
    x = torch.ones(64, 64, device=device)
    first, second = dropout(x), dropout(x)
    assert not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 2.0}


def test_a_bad_index_is_an_error_and_leaves_the_backend_usable():
    """On the CPU only: on a GPU an index out of range ends the process's CUDA context, as it does in eager."""

    def function(table, index):
        return table[index]

    compiled = torch.compile(function, backend="sharedgraph")
    table = torch.randn(10, 4)
    with torch.no_grad():
        for index in ([1, 2, 3], [4, 5]):
            torch.testing.assert_close(compiled(table, torch.tensor(index)), table[index])
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            compiled(table, torch.tensor([1, 99]))
        torch.testing.assert_close(compiled(table, torch.tensor([7, 8])), table[[7, 8]])


def test_a_parameter_gets_other_memory_at_each_call(device):
    """``weight.data = …`` in what is compiled: a replay would leave the parameter where it was."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))
            self.register_buffer("mask", torch.tensor([0.5, 1.0, 2.0, 1.0]))

        def forward(self, x):
            with torch.no_grad():
                self.weight.data *= self.mask
            return x @ self.weight + 1

    ours, eager = Masked().to(device), Masked().to(device)
    compiled = torch.compile(ours, backend="sharedgraph")
    for n in (4, 4, 4, 7, 7):
        x = torch.randn(n, 4, device=device)
        torch.testing.assert_close(compiled(x), eager(x))
        torch.testing.assert_close(ours.weight, eager.weight)
    assert sg.stats().fallbacks == {"it gives a tensor other memory, which a replay does not": 5}
