"""Arguments of every shape in memory come out right, and none of them is changed."""

from __future__ import annotations

import pytest
import torch

import cudagraph_backend as sg

SIZES = (5, 11, 64, 5, 17, 2)


def _misaligned(n, device):
    return torch.randn(n * 4 + 1, device=device)[1:].view(n, 4)


ARGUMENTS = {
    "contiguous": lambda n, device: torch.randn(n, 4, device=device),
    "expanded rows": lambda n, device: torch.randn(1, 4, device=device).expand(n, 4),
    "expanded columns": lambda n, device: torch.randn(n, 1, device=device).expand(n, 4),
    "transposed": lambda n, device: torch.randn(4, n, device=device).t(),
    "columns of a wider tensor": lambda n, device: torch.randn(n, 9, device=device)[:, 2:6],
    "every second row": lambda n, device: torch.randn(2 * n, 4, device=device)[::2],
    "misaligned": _misaligned,
    "overlapping windows": lambda n, device: torch.randn(n + 3, device=device).unfold(0, 4, 1),
    "of ints": lambda n, device: torch.randint(-5, 5, (n, 4), device=device),
    "of bools": lambda n, device: torch.rand(n, 4, device=device) > 0.5,
    "of halves": lambda n, device: torch.randn(n, 4, device=device).half(),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARGUMENTS)
@pytest.mark.parametrize("fill", ["replica", "zero"])
def test_argument(kind, fill, device):
    def function(x):
        return x * 2, x.sum(1)

    compiled = torch.compile(function, backend="sharedgraph", options={"fill": fill})
    with torch.no_grad():
        for n in SIZES:
            x = ARGUMENTS[kind](n, device)
            before = x.clone()
            torch.testing.assert_close(compiled(x), function(x))
            assert torch.equal(x, before)
    assert sg.stats().fallbacks == {}


def test_arguments_that_share_memory(device):
    compiled = torch.compile(lambda x, y, z: (x + y, y * z), backend="sharedgraph")
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(compiled(x, x, x[:, :1]), (x + x, x * x[:, :1]))


def test_sizes_derived_from_one_symbol(device):
    def function(x, y):
        return y.view(x.shape[0], -1) + x

    compiled = torch.compile(function, backend="sharedgraph")
    with torch.no_grad():
        for n in SIZES:
            x, y = torch.randn(n, 4, device=device), torch.randn(2 * n, 2, device=device)
            torch.testing.assert_close(compiled(x, y), function(x, y))


def test_empty_and_single_rows(device):
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    with torch.no_grad():
        for n in (5, 7, 0, 1, 9, 0):
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(compiled(x), x * 2)


def test_static_inputs_that_move_are_noticed(device):
    linear = torch.nn.Linear(4, 4, device=device)
    compiled = torch.compile(linear, backend="sharedgraph")
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(compiled(x), linear(x))
            linear.weight.data = torch.randn(4, 4, device=device)
            torch.testing.assert_close(compiled(x), linear(x))


def test_one_region_for_many_layers(device):
    """Compiled layer by layer, one region is called with every layer's parameters."""
    layers = torch.nn.ModuleList(torch.nn.Linear(4, 4, device=device) for _ in range(6))
    for layer in layers:
        layer.compile(backend="sharedgraph")
    with torch.no_grad():
        for n in SIZES:
            x = expected = torch.randn(n, 4, device=device)
            for layer in layers:
                x, expected = layer(x), torch.nn.functional.linear(expected, layer.weight, layer.bias)
            torch.testing.assert_close(x, expected)


def test_an_int_that_counts_the_rows_of_an_argument(device):
    """As after a graph break. In calls in which it counts something else, nothing is padded."""

    def function(x, n):
        return x[torch.arange(n, device=device)[:, None], torch.arange(4, device=device)] * 2

    compiled = torch.compile(function, backend="sharedgraph", dynamic=True)
    with torch.no_grad():
        for rows, n in ((7, 7), (5, 5), (9, 9), (9, 6), (12, 12), (13, 11), (3, 3)):
            x = torch.randn(rows, 4, device=device)
            assert torch.equal(compiled(x, n), function(x, n))
    assert sg.stats().fallbacks == {}
    assert sg.stats().rows_padded > 0


def test_a_cache_that_is_an_argument_is_changed_in_place(device):
    """Large arguments of a fixed size are read and written where they are, and copied only if they keep moving."""

    def step(cache, x, at):
        cache.index_copy_(0, at, x)
        return cache[:4].sum(0) + x

    compiled = torch.compile(step, backend="sharedgraph")
    caches = [torch.zeros(256, 128, device=device) for _ in range(4)]
    twins = [cache.clone() for cache in caches]
    with torch.no_grad():
        for order in ((0, 0, 0), (1, 0, 1), (2, 3, 0), (3, 2, 1)):
            for i in order:
                for n in (5, 9, 3):
                    x = torch.randn(n, 128, device=device)
                    at = torch.randperm(256, device=device)[:n].clone()
                    for tensor in (x, at):
                        torch._dynamo.mark_dynamic(tensor, 0, min=2, max=64)
                    torch.testing.assert_close(compiled(caches[i], x, at), step(twins[i], x, at))
                    for cache, twin in zip(caches, twins, strict=True):
                        assert torch.equal(cache, twin)
    assert sg.stats().fallbacks == {}
    assert sg.stats().output_pool_bytes < 3 << 20 if device.type == "cpu" else True
