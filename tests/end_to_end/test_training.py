"""Forward and backward: gradients equal eager's; nothing saved for a pending backward is lost."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import cudagraph_backend as sg


def _model(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)).to(device)


@pytest.mark.slow
def test_training_steps(device):
    ours = _model(device)
    eager = copy.deepcopy(ours)
    compiled = torch.compile(ours, backend="sharedgraph")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ours, eager)]
    for n in (5, 11, 3, 20, 5, 11, 2):
        x, y = torch.randn(n, 8, device=device), torch.randn(n, 4, device=device)
        for model, optimizer in zip((compiled, eager), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        for a, b in zip(ours.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert sg.stats().fallbacks == {}


@pytest.mark.slow
def test_two_forwards_before_their_backwards_in_any_order(device):
    model = _model(device)
    compiled = torch.compile(model, backend="sharedgraph")
    for first, second in [(5, 9), (9, 5), (6, 6), (6, 6)]:
        inputs = [torch.randn(n, 8, device=device) for n in (first, second)]
        for order in ((0, 1), (1, 0)):
            outs = [compiled(x).square().sum() for x in inputs]
            for i in order:
                (got,) = torch.autograd.grad(outs[i], [model[0].weight])
                (expected,) = torch.autograd.grad(model(inputs[i]).square().sum(), [model[0].weight])
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_gradient_accumulation_and_forward_without_backward(device):
    model = _model(device)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="sharedgraph")
    for n in (5, 11, 3):
        for _ in range(3):
            x = torch.randn(n, 8, device=device)
            compiled(x)  # never followed by its backward
            compiled(x).sum().backward()
            eager(x).sum().backward()
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_input_gradients(device):
    compiled = torch.compile(lambda x: (x * x).sum(1), backend="sharedgraph")
    for n in (5, 11, 3):
        x = torch.randn(n, 8, device=device, requires_grad=True)
        compiled(x).sum().backward()
        torch.testing.assert_close(x.grad, 2 * x)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"verify": "capture"}])
def test_results_in_the_memory_of_saved_activations(device, options):
    """A backward may use what its forward saved as memory for a gradient, also where that was copied to be read.

    The probe runs it more than once, so not on what the call was given.
    """
    linear = nn.Linear(4, 4, device=device)

    def function(x, y):
        return linear(x) * y

    compiled = torch.compile(function, backend="sharedgraph", options=options)
    for n in (5, 11, 3):
        first, second = ([torch.randn(n, 4, device=device, requires_grad=True) for _ in range(2)] for _ in range(2))
        out = compiled(*first)
        later = compiled(*second)  # needs the memory that the first forward's activations are in
        for result, arguments in ((out, first), (later, second)):
            got = torch.autograd.grad(result.square().sum(), arguments)
            expected = torch.autograd.grad(function(*arguments).square().sum(), arguments)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_large_activations_of_a_fixed_size_in_any_order_of_backwards(device):
    """They are large enough to be taken for caches, and a backward may use their memory for its results."""
    first, second = nn.Linear(256, 256, device=device), nn.Linear(256, 256, device=device)

    def function(x, y):
        return second(torch.tanh(first(x))) * y

    compiled = torch.compile(function, backend="sharedgraph", dynamic=False)
    parameters = [*first.parameters(), *second.parameters()]
    for order in itertools.permutations(range(3)):
        calls = [[torch.randn(128, 256, device=device, requires_grad=True) for _ in range(2)] for _ in range(3)]
        outs = [compiled(*arguments) for arguments in calls]
        for k in order:
            tangent = torch.randn(128, 256, device=device)
            got = torch.autograd.grad(outs[k], calls[k] + parameters, tangent)
            expected = torch.autograd.grad(function(*calls[k]), calls[k] + parameters, tangent)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
