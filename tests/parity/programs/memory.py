"""What is changed in place, kept, fed back or dropped."""

from __future__ import annotations

import gc

import torch
from torch import nn

from tests.parity.program import Section, calls, copied, fixed, linear, randn

section = Section("Mutation and lifetimes")


@section.program()
def argument_is_changed(device):
    """An argument is changed in place."""

    def function(x):
        x.add_(2)
        return x * 3

    return calls(function, lambda n: (randn(n, 4, device=device),))


@section.program()
def buffer_is_changed(device):
    """A registered buffer counts."""

    class Model(nn.Module):
        total: torch.Tensor

        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(4, device=device))

        def forward(self, x):
            self.total.add_(x.sum(0))
            return self.total + x

    return calls(Model(), lambda n: (randn(n, 4, device=device),))


@section.program()
def attribute_is_changed(device):
    """A plain tensor attribute of a module counts."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.count = torch.ones(4, device=device)

        def forward(self, x):
            self.count += 1
            return x * self.count

    return calls(Model(), lambda n: (randn(n, 4, device=device),))


@section.program(captures=False, leaves=("other memory",))
def parameter_is_masked_through_data(device):
    """``weight.data *= mask`` before each use gives the parameter other memory at each call."""

    class Model(nn.Module):
        mask: torch.Tensor

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(fixed(4, 4, device=device))
            self.register_buffer("mask", torch.ones(4, 4, device=device).tril())

        def forward(self, x):
            with torch.no_grad():
                self.weight.data *= self.mask
            return x @ self.weight + 1

    return calls(Model(), lambda n: (randn(n, 4, device=device),))


@section.program()
def cache_is_written_by_slots(device):
    """A cache is written at positions that are arguments."""
    cache = torch.zeros(16, 4).to(device)

    def function(x, slots):
        cache.index_copy_(0, slots, x * 2)
        return cache.sum(0) + x

    return calls(function, lambda n: (randn(n, 4, device=device), (torch.arange(n) * 2).to(device)))


@section.program()
def result_of_another_is_changed(device):
    """A second function changes the result of the first in place."""

    def flow(compile):
        make, change = compile(lambda x: x + 1), compile(lambda y: y.add_(2) * 3)
        with torch.no_grad():
            for seed in range(5):
                torch.compiler.cudagraph_mark_step_begin()
                torch.manual_seed(seed)
                y = make(randn(4, 4, device=device))
                z = change(y)
                yield copied((y, z))
                del y, z

    return flow


@section.program()
def result_is_fed_back(device):
    """``x = f(x)``."""

    def flow(compile):
        function = compile(lambda x: x * 1.5 - 1)
        for n in (4, 7):
            x = fixed(n, 4, device=device)
            with torch.no_grad():
                for _ in range(5):
                    x = function(x)
                    yield copied(x)

    return flow


@section.program()
def results_feed_another(device):
    """A second function reads the results of the first, and both are read after."""

    def flow(compile):
        first, second = compile(lambda x: (x * 2, x.relu() + 1)), compile(lambda a, b: a @ b.t() + 1)
        with torch.no_grad():
            for seed, n in enumerate((4, 4, 4, 7, 7, 7)):
                torch.compiler.cudagraph_mark_step_begin()
                torch.manual_seed(seed)
                a, b = first(randn(n, 4, device=device))
                yield copied((a, b, second(a, b)))

    return flow


@section.program()
def results_are_cloned_within_marked_steps(device):
    """Step marks; what is to last longer is cloned."""

    def flow(compile):
        function, kept = compile(lambda x: (x @ x.t()).relu() + 1), []
        with torch.no_grad():
            for seed in range(6):
                torch.compiler.cudagraph_mark_step_begin()
                torch.manual_seed(seed)
                kept.append(function(randn(4, 4, device=device)).clone())
        yield kept

    return flow


@section.program()
def results_are_kept(device):
    """Results of several calls are read after all of them; stock forbids that."""

    def flow(compile):
        function, kept = compile(lambda x: x * 2 + 1), []
        with torch.no_grad():
            for seed, n in enumerate((4, 4, 4, 4, 7, 7, 7)):
                torch.manual_seed(seed)
                kept.append(function(randn(n, 4, device=device)))
        yield copied(kept)

    return flow


@section.program()
def memory_is_collected(device):
    """Results die and garbage is collected between calls of three regions."""

    def function(x):
        y = x * 2 + 1
        torch._dynamo.graph_break()
        z = y.relu() @ y.t()
        del y
        torch._dynamo.graph_break()
        return z + 1

    def flow(compile):
        compiled = compile(function)
        with torch.no_grad():
            for seed in range(4):
                torch.manual_seed(seed)
                yield copied(compiled(randn(6, 4, device=device)))
                gc.collect()

    return flow


@section.program()
def parameters_are_replaced(device):
    """The same module gets a new parameter, at another address."""

    def flow(compile):
        model = linear(device)
        function = compile(model)
        with torch.no_grad():
            for step in range(3):
                for seed in range(3):
                    torch.manual_seed(seed)
                    yield copied(function(randn(4, 8, device=device)))
                model.bias = nn.Parameter(fixed(8, device=device) + step)

    return flow


@section.program()
def static_addresses(device):
    """An argument that is marked to stay where it is, and is changed from outside."""

    def flow(compile):
        function, x = compile(lambda x, y: (x @ y).relu() + 1), fixed(4, 4, device=device)
        torch._dynamo.mark_static_address(x)
        with torch.no_grad():
            for seed in range(5):
                torch.manual_seed(seed)
                yield copied(function(x, randn(4, 4, device=device)))
                x.mul_(1.1)

    return flow


@section.program()
def metadata_is_changed(device):
    """An argument is transposed in place, and another gets a dim."""

    def function(x, y):
        z = x * 2 + 1
        x.t_()
        y.unsqueeze_(0)
        return z + y.sum()

    return calls(function, lambda n: (randn(n, 4, device=device), randn(n, device=device)))


@section.program()
def several_functions_take_turns(device):
    """Three compiled functions in changing order."""

    def flow(compile):
        functions = [compile(f) for f in (lambda x: x * 2 + 1, lambda x: x.softmax(-1) + x, lambda x: x @ x.t() + 1)]
        with torch.no_grad():
            for seed, which in enumerate((0, 1, 2, 0, 1, 2, 2, 1, 0, 1, 1, 0, 2)):
                torch.manual_seed(seed)
                yield copied(functions[which](randn(4, 4, device=device)))

    return flow
