"""Random numbers: drawn once per call, in the order of eager, and the same again where a backward needs them."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tests.parity.program import Section, calls, copied, fixed, gradients, linear, randn

section = Section("Random numbers and checkpointing")


@section.program(draws=True)
def draws(device):
    """Uniform and normal numbers, of the shape of an argument."""
    return calls(
        lambda x: (torch.rand_like(x) + x, torch.randn_like(x) * 2 + x), lambda n: (randn(n, 4, device=device),)
    )


@section.program(draws=True)
def draws_without_arguments(device):
    """Numbers of a fixed shape: each call gives others, and the same ones for the same seed."""

    def flow(compile):
        function = compile(lambda: torch.rand(20, device=device) * 2 + 1)
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            for _ in range(4):
                yield copied(function())

    return flow


@section.program(draws=True)
def permutation(device):
    """``randperm``, and what is computed from it."""
    return calls(
        lambda x: x + torch.randperm(x.shape[0], device=device)[:, None] * 2, lambda n: (randn(n, 4, device=device),)
    )


@section.program()
def draws_of_the_compiler(device):
    """Inductor's own numbers: within bounds, others at each call, the same for the same seed."""

    def flow(compile):
        function = compile(lambda x: torch.rand_like(x) * x)
        for n in (4, 4, 4, 7, 7, 7):
            ones, drawn = torch.ones(n, 100, device=device), []
            for seed in (n, n, n + 1):
                torch.manual_seed(seed)
                drawn += [function(ones).clone(), function(ones).clone()]
            yield all(bool(((d >= 0) & (d < 1)).all()) for d in drawn)
            yield [torch.equal(drawn[0], other) for other in drawn[1:]]
            yield abs(float(torch.cat(drawn).mean()) - 0.5) < 0.1

    return flow


@section.program(draws=True)
def dropout(device):
    """Dropout in a forward without gradients."""
    model = nn.Sequential(linear(device), nn.Dropout(0.5), linear(device))
    return calls(model, lambda n: (randn(n, 8, device=device),))


@section.program()
def dropout_in_training(device):
    """The backward drops what the forward dropped."""

    def flow(compile):
        function = compile(lambda x: torch.nn.functional.dropout(x * 2, 0.5) + 0)
        for n in (4, 4, 4, 7, 7, 7):
            x = torch.ones(n, 16, device=device, requires_grad=True)
            out = function(x)
            kept = out.detach().clone()
            out.sum().backward()
            grad = x.grad
            assert grad is not None
            yield torch.equal(kept == 0, grad == 0), torch.equal(kept * 1, grad * 1), 0 < float(kept.mean()) < 4
            del out

    return flow


class _Drops(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.first, self.second = linear(device), linear(device)

    def block(self, x):
        return torch.sigmoid(torch.rand_like(x) * self.second(x)) * x

    def forward(self, x):
        return self.first(checkpoint(self.block, torch.sin(x), use_reentrant=self.reentrant)).sin()

    reentrant = False


class _DropsReentrant(_Drops):
    reentrant = True


# The graph that recomputes has its generators as arguments only if this ignores `fallback_random`.
_GENERATORS = {"test_configs.graphsafe_rng_func_ignores_fallback_random": True}
# On a CPU the graph reads and sets the state of the generator, a tensor of a size that no argument gives.
_STATES = ("a size is known only when it has run",)


@section.program(draws=True, inductor=_GENERATORS, leaves=_STATES)
def checkpoint_that_draws(device):
    """What is computed again in the backward draws the numbers of the forward."""
    return calls(_Drops(device), lambda n: (randn(n, 8, device=device, grad=True),), training=True)


@section.program(draws=True, inductor=_GENERATORS, leaves=_STATES)
def checkpoint_that_draws_reentrant(device):
    """The same, with the reentrant kind of checkpoint."""
    return calls(_DropsReentrant(device), lambda n: (randn(n, 8, device=device, grad=True),), training=True)


@section.program(draws=True, inductor=_GENERATORS, leaves=_STATES)
def checkpoints_out_of_order(device):
    """Backwards in another order than their forwards, each with its own numbers."""

    def flow(compile):
        model = _Drops(device)
        function = compile(model)
        for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)):
            torch.manual_seed(sum(order) + order[0])
            given = [randn(4, 8, device=device, grad=True) for _ in order]
            results = [function(x) for x in given]
            for at in order:
                yield from gradients(results[at], [given[at], *model.parameters()])

    return flow


@section.program(
    needs_cuda="a draw on the CPU and one on the GPU",
    draws=True,
    leaves=("mixes devices", *_STATES),
    inductor=_GENERATORS,
)
def checkpoints_that_draw_on_both_devices(device):
    """One checkpoint draws on the CPU, another on the GPU."""

    def function(x, z):
        x = checkpoint(lambda x: torch.sigmoid(torch.rand_like(x)) * x, torch.sin(x), use_reentrant=False)
        z = checkpoint(lambda z: z * torch.rand_like(z) + z.sin(), z, use_reentrant=False)
        return torch.sin(x) * z.to(x.device)

    return calls(
        function,
        lambda n: (randn(n, 4, device=device, grad=True), torch.randn(n, 4, requires_grad=True)),
        training=True,
    )


@section.program()
def checkpoint_without_draws(device):
    """A checkpoint around layers that draw nothing."""
    inner, outer = nn.Sequential(linear(device), nn.GELU(), linear(device)), linear(device)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = inner, outer

        def forward(self, x):
            return self.outer(checkpoint(self.inner, x, use_reentrant=False))

    return calls(Model(), lambda n: (randn(n, 8, device=device, grad=True),), training=True)


def _save_products(ctx, operator, *args, **kwargs):
    save = operator is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


_saving_products = partial(create_selective_checkpoint_contexts, _save_products)


@section.program()
def selective_checkpoint(device):
    """Products are saved, the rest is computed again."""

    def block(x, w):
        return ((x @ w).sigmoid() @ w).sin() * x

    def function(x, w):
        return checkpoint(block, x, w, use_reentrant=False, context_fn=_saving_products) + 1

    return calls(
        function,
        lambda n: (randn(n, 8, device=device, grad=True), randn(8, 8, device=device, grad=True)),
        training=True,
    )


@section.program(draws=True, inductor=_GENERATORS, leaves=_STATES)
def selective_checkpoint_that_draws(device):
    """The same, with numbers drawn in what is computed again."""

    def block(x, w):
        return ((x @ w).sigmoid() * torch.rand_like(x) @ w).sin() * x

    def function(x, w):
        return checkpoint(block, x, w, use_reentrant=False, context_fn=_saving_products) + 1

    return calls(
        function,
        lambda n: (randn(n, 8, device=device, grad=True), randn(8, 8, device=device, grad=True)),
        training=True,
    )


@section.program(draws=True)
def draws_in_two_regions(device):
    """Two regions draw, with a graph break and a draw of eager's between."""

    def function(x):
        y = torch.rand_like(x) + x * 2
        torch._dynamo.graph_break()
        return torch.randn_like(y) * y + 1

    def flow(compile):
        compiled = compile(function)
        torch.manual_seed(3)
        for n in (4, 4, 4, 7, 7, 7):
            yield copied(compiled(fixed(n, 4, device=device)))
            yield torch.rand(3, device=device)

    return flow
