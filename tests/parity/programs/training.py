"""Forwards and backwards, and the modes that surround them."""

from __future__ import annotations

import torch
from torch import nn

from tests.parity.program import Section, calls, copied, gradients, linear, randn

section = Section("Training and modes")


def _mlp(device):
    return nn.Sequential(linear(device, 8, 16), nn.Tanh(), linear(device, 16, 4))


@section.program()
def forward_and_backward(device):
    """Gradients of parameters and of the argument."""
    return calls(_mlp(device), lambda n: (randn(n, 8, device=device, grad=True),), training=True)


@section.program()
def training_steps(device):
    """An optimizer changes the parameters after each backward."""

    def flow(compile):
        model = _mlp(device)
        function, optimizer = compile(model), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for seed, n in enumerate((4, 4, 4, 4, 7, 7, 7)):
            torch.manual_seed(seed)
            loss = nn.functional.cross_entropy(function(randn(n, 8, device=device)), torch.arange(n).to(device) % 4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield float(loss.detach()), copied(list(model.parameters()))

    return flow


@section.program()
def optimizer_compiled(device):
    """The optimizer's step itself is compiled."""

    def flow(compile):
        model = _mlp(device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=torch.tensor(0.05).to(device), capturable=device.type == "cuda"
        )
        step = compile(lambda: optimizer.step())
        for seed in range(5):
            torch.manual_seed(seed)
            model(randn(4, 8, device=device)).square().sum().backward()
            step()
            optimizer.zero_grad()
            yield copied(list(model.parameters()))

    return flow


@section.program()
def batch_norm_in_training(device):
    """Running statistics are buffers that the forward changes."""
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()).to(device)
    return calls(model, lambda n: (randn(n, 3, 8, device=device),), training=True)


@section.program()
def embedding_in_training(device):
    """The backward of a look-up adds rows by their numbers."""
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4)).to(device)
    return calls(model, lambda n: (torch.randint(0, 10, (n, 3)).to(device),), training=True)


@section.program()
def backward_not_called(device):
    """Of two regions only one is followed by a backward."""

    def function(x, y):
        a = x * x * x
        torch._dynamo.graph_break()
        return a, y * y * y

    def flow(compile):
        compiled = compile(function)
        for seed in range(4):
            torch.manual_seed(seed)
            x, y = (randn(5, 5, device=device, grad=True) for _ in range(2))
            a, b = compiled(x, y)
            yield copied((a, b))
            yield from gradients(a, [x])
            del a, b

    return flow


@section.program()
def backward_with_a_strided_gradient(device):
    """The gradient that comes in is expanded, not dense."""

    def flow(compile):
        compiled = compile(lambda x: x * x * x + 1)
        for seed in range(4):
            torch.manual_seed(seed)
            x = randn(5, 5, device=device, grad=True)
            out = compiled(x)
            out.backward(torch.ones(5, device=device).as_strided((5, 5), (0, 1)))
            yield copied((out, x.grad))
            del out

    return flow


@section.program()
def backward_through_graph_breaks(device):
    """Two regions forward, two backward."""
    first, second = linear(device), linear(device)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            y = self.first(x).relu()
            torch._dynamo.graph_break()
            return self.second(y) + y

    return calls(Model(), lambda n: (randn(n, 8, device=device, grad=True),), training=True)


@section.program()
def gradients_accumulate(device):
    """Several backwards add to the same gradients."""

    def flow(compile):
        model = _mlp(device)
        function = compile(model)
        for _ in range(3):
            for seed in range(3):
                torch.manual_seed(seed)
                function(randn(4, 8, device=device)).square().sum().backward()
            yield [copied(parameter.grad) for parameter in model.parameters()]
            model.zero_grad()

    return flow


@section.program()
def training_and_evaluation_in_turn(device):
    """The same module with and without gradients."""

    def flow(compile):
        model = nn.Sequential(linear(device), nn.BatchNorm1d(8).to(device), nn.ReLU())
        function = compile(model)
        for seed in range(6):
            torch.manual_seed(seed)
            x = randn(4, 8, device=device)
            yield from gradients(function(x), list(model.parameters()))
            model.eval()
            with torch.no_grad():
                yield copied(function(x))
            model.train()

    return flow


class _Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x * x + 1  # not the true one, so that it is seen to be used


@section.program()
def backward_of_the_user(device):
    """``autograd.Function``."""
    return calls(lambda x: _Cubed.apply(x * 2) + 1, lambda n: (randn(n, 4, device=device, grad=True),), training=True)


@section.program(tolerance=2e-2)
def autocast(device):
    """Products in bfloat16, in training."""
    dtype = torch.bfloat16
    return calls(
        _mlp(device),
        lambda n: (randn(n, 8, device=device),),
        training=True,
        context=lambda: torch.autocast(device.type, dtype=dtype),
    )


@section.program()
def inference_mode(device):
    """Tensors that were made in inference mode."""
    model = _mlp(device)

    def flow(compile):
        function = compile(model)
        for seed, n in enumerate((4, 4, 4, 7, 7, 7)):
            torch.manual_seed(seed)
            with torch.inference_mode():
                yield function(randn(n, 8, device=device)).clone()

    return flow


@section.program()
def gradient_penalty_within(device):
    """A derivative is part of what is compiled (``torch.func.grad``)."""

    def function(x, w):
        slope = torch.func.grad(lambda x: ((x @ w).tanh() ** 2).sum())(x)
        return slope * 2 + x

    return calls(function, lambda n: (randn(n, 4, device=device), randn(4, 4, device=device)))
