"""Custom operators, a user's kernels, and operators that take graphs as arguments."""

from __future__ import annotations

import contextlib
import tempfile

import torch
import torch.distributed as dist
from torch import nn

from tests.parity import custom
from tests.parity.program import Section, calls, fixed, linear, randn

section = Section("Operators of the user, and of higher order")
TRITON = "a Triton kernel"
BRANCHES = ("higher-order",)
READS = {"capture_scalar_outputs": True}  # Inductor makes loops of these, and reads the counter


@section.program()
def custom_operator(device):
    """One without effects, in a forward; then one with two results, and one that takes a list."""

    def function(x):
        a, b = custom.both(custom.affine(x * 2))
        return custom.joined([a, b, x], 2.0) + 1

    return calls(function, lambda n: (randn(n, 4, device=device),))


@section.program()
def custom_operator_in_training(device):
    """Its backward is a custom operator, too."""

    def function(x):
        return custom.affine(x.sin()) * x

    return calls(function, lambda n: (randn(n, 4, device=device, grad=True),), training=True)


@section.program()
def custom_operator_that_writes(device):
    """It changes a tensor made before, and gives a result."""

    def function(x):
        total = x * 2
        return custom.accumulate(x + 1, total) + total

    return calls(function, lambda n: (randn(n, 4, device=device),))


@section.program()
def custom_operator_that_fills(device):
    """It writes to an empty tensor and gives nothing."""

    def function(x):
        out = torch.empty_like(x)
        custom.fill(x * 2, out)
        return out * 3 + 1

    return calls(function, lambda n: (randn(n, 4, device=device),))


@section.program()
def custom_operator_that_writes_to_a_buffer(device):
    """It changes a buffer of a module."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(4, 4, device=device))

        def forward(self, x):
            return custom.accumulate(x * 2, self.total) + 1

    return calls(Model(), lambda n: (randn(4, 4, device=device),))


@section.program()
def custom_operators_with_effects(device):
    """Two operators whose order is an effect."""

    def function(x):
        return custom.ordered(custom.ordered(x * 2) + 1) * 3

    return calls(function, lambda n: (randn(n, 4, device=device),))


@section.program(needs_cuda=TRITON)
def triton_kernel(device):
    """A kernel fills an empty tensor."""
    from tests.parity import kernels

    return calls(
        lambda x, y: kernels.added(x * 2, y) + 1, lambda n: (randn(n, 64, device=device), randn(n, 64, device=device))
    )


@section.program(needs_cuda=TRITON)
def triton_kernel_that_writes_to_its_argument(device):
    """A kernel changes an argument of the compiled function."""
    from tests.parity import kernels

    def function(x):
        kernels.double_(x)
        return x + 1

    return calls(function, lambda n: (randn(n, 64, device=device),))


@section.program(needs_cuda=TRITON)
def triton_kernel_with_autotuning(device):
    """Its configuration is found by measuring."""
    from tests.parity import kernels

    return calls(
        lambda x, y: kernels.added_tuned(x * 2, y) + 1,
        lambda n: (randn(n, 64, device=device), randn(n, 64, device=device)),
    )


@section.program(needs_cuda=TRITON)
def triton_kernel_as_an_operator(device):
    """``triton_op``, in training."""
    from tests.parity import kernels

    return calls(
        lambda x, y: kernels.triton_added(x.sin(), y) * x,
        lambda n: (randn(n, 64, device=device, grad=True), randn(n, 64, device=device, grad=True)),
        training=True,
    )


@section.program(needs_cuda=TRITON, leaves=("mixes devices",))
def triton_kernel_on_both_sides_of_a_round_trip(device):
    """The same kernel before and after a value was on the CPU."""
    from tests.parity import kernels

    def function(x, y):
        first = kernels.added(x, y)
        there = first.cpu() + 1
        return first, kernels.added(there.to(device), y)

    return calls(function, lambda n: (randn(n, 64, device=device), randn(n, 64, device=device)))


@section.program()
def nested_region(device):
    """``nested_compile_region``: a block that is compiled once and called by every layer."""
    layers = nn.ModuleList([linear(device) for _ in range(3)])

    @torch.compiler.nested_compile_region
    def block(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias).relu() + x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            for layer in self.layers:
                x = block(x, layer.weight, layer.bias)
            return x * 2

    return calls(Model(), lambda n: (randn(n, 8, device=device),))


@section.program()
def nested_region_in_training(device):
    """The same, with gradients."""

    @torch.compiler.nested_compile_region
    def block(x, w):
        return (x @ w).sin() + x

    return calls(
        lambda x, w, v: block(block(x, w), v) * 2,
        lambda n: (randn(n, 4, device=device, grad=True), *(randn(4, 4, device=device, grad=True) for _ in range(2))),
        training=True,
    )


@section.program(leaves=BRANCHES, dynamo=READS)
def scan(device):
    """``scan``, amid other operators."""
    from torch._higher_order_ops.scan import scan

    def function(x, w):
        y = (x @ w).relu() + 1
        carry, ys = scan(lambda c, y: (c + y, c * 2), torch.zeros(8, device=device), y, dim=0)
        return (ys @ w).relu() + carry

    return calls(function, lambda n: (randn(n, 8, device=device), fixed(8, 8, device=device)))


@section.program(leaves=BRANCHES, dynamo=READS)
def map_over_rows(device):
    """``map``, amid other operators."""
    from torch._higher_order_ops.map import map as map_rows

    def function(x, w):
        y = (x @ w).relu() + 1
        return (map_rows(lambda row, w: (row @ w).sin(), y, w) @ w).relu() + 1

    return calls(function, lambda n: (randn(n, 8, device=device), fixed(8, 8, device=device)))


def _scores(score, batch, head, q, k):
    return score + (q - k) * 0.1


def _causal(batch, head, q, k):
    return q >= k


@section.program(needs_cuda="FlexAttention's kernels are made for GPUs", tolerance=2e-3)
def flex_attention(device):
    """FlexAttention with a score that depends on positions."""
    from torch.nn.attention.flex_attention import flex_attention

    return calls(
        lambda q, k, v: flex_attention(q, k, v, score_mod=_scores) * 2 + 1,
        lambda n: tuple(randn(n, 2, 128, 32, device=device) for _ in range(3)),
    )


@section.program(needs_cuda="FlexAttention's kernels are made for GPUs", tolerance=5e-3)
def flex_attention_in_training(device):
    """The same with a causal block mask, and its backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(_causal, None, None, 128, 128, device=device.type)
    return calls(
        lambda q, k, v: flex_attention(q, k, v, score_mod=_scores, block_mask=mask) * 2,
        lambda n: tuple(randn(n, 2, 128, 32, device=device, grad=True) for _ in range(3)),
        sizes=(2,),
        training=True,
    )


@contextlib.contextmanager
def _process_group(device):
    """A group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


@section.program(around=_process_group)
def collectives(device):
    """Functional collectives, in a group of one process."""
    import torch.distributed._functional_collectives as functional

    world = dist.group.WORLD
    assert world is not None
    group = world.group_name

    def function(x, w):
        y = functional.all_reduce((x @ w).relu(), "sum", group)
        return functional.all_gather_tensor(y * 2, 0, group) + 1

    return calls(function, lambda n: (randn(n, 8, device=device), fixed(8, 8, device=device)))
