"""Arguments that are no ordinary tensors: jagged ones, tensors on ``meta``, views that are computed when read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import cudagraph_backend as sg
from tests.support.regions import assert_as_eager, kinds, two

# Rows per sequence; the number of sequences changes last, which Dynamo then takes for dynamic, too.
LENGTHS = ((3, 2), (5, 1), (2, 7), (5, 1), (4, 4, 1), (3, 2, 9, 1), (4, 4, 1))


def jagged(lengths: Sequence[int], device: torch.device, *, requires_grad: bool = False) -> torch.Tensor:
    rows = [torch.randn(n, 16, device=device) for n in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=requires_grad)


def pointwise(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, w).sin() * 2


def attention(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    q, k = (torch.nn.functional.linear(x, m).unflatten(-1, (2, 8)).transpose(1, 2) for m in (w, w.t()))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(-2)
    return torch.nn.functional.layer_norm(out, (16,))


JAGGED = {"pointwise": pointwise, "attention": attention}


@pytest.mark.slow
@pytest.mark.parametrize("name", JAGGED)
def test_jagged_tensors(name, device):
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).to(device) / 4
    compiled = torch.compile(JAGGED[name], backend="sharedgraph")
    with torch.no_grad():
        for lengths in LENGTHS:
            x = jagged(lengths, device)
            result, expected = compiled(x, weight), JAGGED[name](x, weight)
            assert torch.equal(result.offsets(), x.offsets())
            assert result.shape == expected.shape
            torch.testing.assert_close(result.values(), expected.values(), rtol=1e-4, atol=1e-4)
    assert sg.stats().replays > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", JAGGED)
def test_jagged_tensors_in_training(name, device):
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).to(device) / 4
    weight.requires_grad_()
    compiled = torch.compile(JAGGED[name], backend="sharedgraph")
    for lengths in LENGTHS:
        x = jagged(lengths, device, requires_grad=True)
        found = []
        for function in (compiled, JAGGED[name]):
            values = function(x, weight).values()
            found.append((values.detach(), *torch.autograd.grad(values.square().sum(), (weight, x))))
        (ours, ours_w, ours_x), (theirs, theirs_w, theirs_x) = found
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours_w, theirs_w, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours_x.values(), theirs_x.values(), rtol=1e-4, atol=1e-4)
    assert sg.stats().replays > 0


def test_tensors_on_meta(device):
    """What is computed of them has a shape and no memory, so that it neither mixes devices nor needs a graph."""

    def function(t, y):
        return t * 2, y * 3 + 1, torch.empty(y.shape[0], 3, device="meta").t() + 1, t.expand(2, -1, -1)

    compiled = torch.compile(function, backend="sharedgraph")
    with torch.no_grad():
        for n, m in ((6, 6), (7, 8), (9, 11), (9, 11), (10, 12), (30, 12)):
            t, y = torch.empty(m, 16, device="meta"), torch.randn(n, 8, device=device)
            for result, expected in zip(compiled(t, y), function(t, y), strict=True):
                assert (result.device, result.shape, result.stride()) == (
                    expected.device,
                    expected.shape,
                    expected.stride(),
                )
                if result.device == device:
                    torch.testing.assert_close(result, expected)
    stats = sg.stats()
    assert stats.fallbacks == {}
    assert stats.replays == 6
    assert stats.rows_padded > 0


def test_what_reads_a_view_that_is_computed_when_read_is_cut_out(device):
    """Of the two kinds Inductor itself reads negative ones wrong."""

    def make(n: int) -> list[torch.Tensor]:
        return [torch.randn(n, 8, dtype=torch.complex64, device=device).conj(), torch.randn(n, 8, device=device)]

    def function(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return two(torch.relu(two(x)) + (z * 2).real)

    compiled = torch.compile(function, backend="sharedgraph", dynamic=True)
    assert_as_eager(compiled, function, make, (5, 7, 30, 3, 7))
    stats = sg.stats()
    assert "c" in kinds()
    assert "." in kinds()
    (reason,) = stats.fallbacks
    assert "is a lazy conjugate or negative view" in reason
    assert stats.replays > 0
    assert "test_uncommon_inputs.py" in sg.explain()
