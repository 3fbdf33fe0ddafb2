"""Sizes, views and results: what a graph is made of when nothing is in its way."""

from __future__ import annotations

import torch
from torch import nn

from tests.parity.program import Section, calls, copied, fixed, linear, randn

section = Section("Sizes, views and results")


@section.program()
def several_sizes(device):
    """One operator, sizes from 1 on."""
    return calls(lambda x: x + 1, lambda n: (randn(n, device=device),), sizes=(1, 2, 3, 5))


@section.program()
def two_sizes_that_change(device):
    """Both dims of the argument change, apart from each other."""
    return calls(
        lambda x: (x.softmax(1) * 2, x.t() + 1), lambda n: (randn(n % 10, n // 10, device=device),), sizes=(34, 37, 59)
    )


@section.program()
def a_size_becomes_a_value(device):
    """The number of rows is computed with."""
    return calls(lambda x: x / x.shape[0] + x.shape[0] // 2, lambda n: (randn(n, 4, device=device),))


@section.program()
def an_int_argument_picks_an_entry(device):
    """An int argument is where an entry is written, which recompiles for a negative one."""

    def function(x, at):
        x = x + 1
        x[at] = -1
        return x * 2

    return calls(function, lambda n: (randn(8, device=device), n), sizes=(2, 3, 5, -8))


@section.program()
def an_index_on_the_device(device):
    """A tensor of one number says where to slice, after a graph break."""

    def function(x):
        x = x * 20
        y = x * 10
        torch._dynamo.graph_break()
        at = torch.tensor(2, device=device)
        return x, x[0], x.index_select(0, at + torch.arange(2, device=device)), y[0] + 1

    return calls(function, lambda n: (randn(n, 8, device=device),))


@section.program()
def joined_rows_in_training(device):
    """The backward of rows put together, of sizes that change."""

    def function(x, w):
        z = torch.cat([x, x], dim=0) @ w
        return z @ z.t()

    return calls(function, lambda n: (randn(n, 4, device=device), randn(4, 4, device=device, grad=True)), training=True)


@section.program()
def lists_of_operators(device):
    """``_foreach`` operators, whose results are lists."""

    def function(a, b):
        first, second = torch._foreach_abs([a, b])
        torch._foreach_add_([first, second], 1.0)
        return first * a, second

    return calls(function, lambda n: (randn(n, 3, device=device), randn(n, 3, device=device)))


@section.program()
def result_of_a_given_dtype(device):
    """``out=`` of another dtype than the operator's."""

    def function(x, y, out):
        return torch.logical_xor(x, y, out=out) * 2

    return calls(
        function,
        lambda n: (*(randn(n, 3, device=device) for _ in range(2)), torch.zeros(n, 3, dtype=torch.float16).to(device)),
    )


@section.program()
def no_arguments(device):
    """A function of nothing but constants."""

    def function():
        return torch.arange(8, device=device) * 2, torch.ones(3, 4, device=device).cumsum(0)

    return calls(function, lambda n: ())


@section.program()
def constants(device):
    """Tensors that are written in the code, which Inductor may fold."""
    table = fixed(8, device=device)

    def function(x):
        scale = torch.tensor([1.0, 2.0, 4.0, 8.0], device=device)
        return x * scale + torch.eye(4, device=device).sum(0) + table[:4]

    return calls(function, lambda n: (randn(n, 4, device=device),))


@section.program(inductor={"freezing": True})
def frozen_weights(device):
    """Inductor takes parameters as constants and folds them."""
    model = nn.Sequential(linear(device), nn.ReLU(), nn.BatchNorm1d(8).to(device), linear(device)).eval()
    return calls(model, lambda n: (randn(n, 8, device=device),))


@section.program()
def views_of_results(device):
    """Results that share memory with each other, one of them twice."""

    def function(x):
        y = x * 2
        return y, y[1:], y.view(-1), y, y.t()

    return calls(function, lambda n: (randn(n, 4, device=device),))


@section.program()
def views_of_arguments(device):
    """Results that are views of arguments, next to one that is computed."""
    return calls(lambda x: (x[1:], x.t(), x.detach(), x * 2 + 1), lambda n: (randn(n, 4, device=device),))


@section.program()
def a_change_through_a_view(device):
    """A result of the first region is a view; the second changes it."""

    def function(x):
        y = x * 2
        torch._dynamo.graph_break()
        rest = y[1:]
        rest.add_(1)
        return y, rest * 2

    return calls(function, lambda n: (randn(n, 4, device=device),))


@section.program()
def results_of_every_kind(device):
    """Nested results, numbers, ``None``, no entries, a bool and a half."""

    def function(x):
        return {"a": (x + 1, [x.half()]), "b": x > 0}, x.shape[0] * 2, None, x[:0] * 2, x.sum()

    return calls(function, lambda n: (randn(n, 4, device=device),))


@section.program()
def a_result_with_strides(device):
    """A transposed argument, an expanded one, and channels that are last."""

    def function(x, y, z):
        return x * 2, y + 1, torch.nn.functional.avg_pool2d(z, 2) + 1

    def arguments(n):
        image = randn(n, 3, 4, 4, device=device).to(memory_format=torch.channels_last)
        return randn(5, n, device=device).t(), randn(n, 1, device=device).expand(n, 6), image

    return calls(function, arguments)


@section.program()
def misaligned_arguments(device):
    """Arguments that begin anywhere in their storage."""

    def arguments(n):
        return tuple(randn(n * 5 + k, device=device)[k:].view(n, 5) for k in (1, 2))

    return calls(lambda x, y: x * y + 1, arguments)


@section.program()
def complex_numbers(device):
    """Complex arguments and results."""

    def function(x, y):
        return torch.complex(x, y) * 1j, torch.view_as_real(torch.complex(x, y)) + 1

    return calls(function, lambda n: (randn(n, 4, device=device), randn(n, 4, device=device)))


@section.program()
def meta_tensor(device):
    """An argument without data, next to one with."""
    return calls(
        lambda t, x: (t * 2, x * 3 + 1), lambda n: (torch.empty(1, 16, 8, device="meta"), randn(n, 4, device=device))
    )


@section.program()
def containers_of_arguments(device):
    """Tensors in a dict and a list."""

    def function(batch):
        return {"sum": batch["x"] + batch["more"][0] * 2, "last": batch["more"][1].relu() + 1}

    def arguments(n):
        return ({"x": randn(n, 4, device=device), "more": [randn(n, 4, device=device), randn(n, 4, device=device)]},)

    return calls(function, arguments)


@section.program()
def graph_breaks(device):
    """Three regions, each reading the results of those before."""

    def function(x):
        y = x * 2 + 1
        torch._dynamo.graph_break()
        z = y.relu() @ y.t()
        torch._dynamo.graph_break()
        return z @ x + y

    return calls(function, lambda n: (randn(n, 4, device=device),))


@section.program()
def a_region_called_twice(device):
    """A function with a graph break is called twice, the second time with its own result."""

    def cube(x):
        torch._dynamo.graph_break()
        return x * x * x

    def function(x):
        y = cube(x)
        return y + cube(y)

    return calls(function, lambda n: (randn(n, 4, device=device),))


@section.program()
def a_branch_in_python(device):
    """Python reads a value and calls one region or the other."""

    def function(x):
        y = x + x
        return y * 10 + 1 if y.sum() > 0 else y * 2 - 10

    return calls(function, lambda n: (randn(n, 4, device=device).abs() * (-1) ** n,))


@section.program()
def attention(device):
    """Scaled dot product attention, causal."""

    def function(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True) + 1

    return calls(function, lambda n: tuple(randn(2, 2, n, 16, device=device) for _ in range(3)))


@section.program()
def convolution(device):
    """Convolution and batch norm, not in training."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).to(device).eval()
    return calls(model, lambda n: (randn(n, 3, 8, 8, device=device),))


@section.program(captures=False, leaves=("layout",))
def sparse_argument(device):
    """A sparse matrix as argument."""

    def function(a, x):
        return (a @ x).relu() + 1

    return calls(function, lambda n: (fixed(4, n, device=device).relu().to_sparse(), randn(n, 3, device=device)))


@section.program()
def jagged_tensor(device):
    """A nested tensor of rows of several lengths."""

    def flow(compile):
        function = compile(lambda x: (x * 2).sin() + 1)
        for n in (2, 2, 2, 3, 3, 3):
            rows = [fixed(k + 2, 4, device=device) for k in range(n)]
            with torch.no_grad():
                yield copied(function(torch.nested.nested_tensor(rows, layout=torch.jagged)).values())

    return flow
