"""Regions of which a part has to run outside of graphs, or that read a little of what is on the CPU."""

from __future__ import annotations

import torch
from torch import nn

from tests.parity import custom
from tests.parity.program import Section, calls, copied, fixed, linear, randn

section = Section("Partitions")
BOTH = "the CPU and the GPU work together"
MIXED = ("mixes devices",)
DEPENDS = ("depends on data",)
BRANCHES = ("higher-order",)


def _round_trip(x, y):
    """Some of it on the CPU, and more on the GPU than depends on that."""
    there = (y + 1).cpu() + 1
    return (x + 1) + (y + 1) + x @ y + there.to(x.device)


@section.program(needs_cuda=BOTH, leaves=MIXED)
def round_trip_to_the_cpu(device):
    """A value is computed on the CPU, between operators on the GPU."""
    return calls(_round_trip, lambda n: (randn(4, 4, device=device), randn(4, 4, device=device)), sizes=(4,))


@section.program(needs_cuda=BOTH, leaves=MIXED)
def round_trip_of_several_sizes(device):
    """The same, with sizes that change."""
    return calls(_round_trip, lambda n: (randn(n, n, device=device), randn(n, n, device=device)), sizes=(3, 4, 5))


@section.program(needs_cuda=BOTH, leaves=MIXED)
def round_trip_of_an_unbacked_size(device):
    """The same, with sizes marked as unbacked."""

    def arguments(n):
        x, y = randn(n, n, device=device), randn(n, n, device=device)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        torch._dynamo.decorators.mark_unbacked(y, 1)
        return x, y

    return calls(_round_trip, arguments)


@section.program(needs_cuda=BOTH, leaves=MIXED)
def round_trip_and_an_int(device):
    """The same, with an int argument that changes."""

    def function(x, y, k):
        return _round_trip(x, y) * k

    return calls(function, lambda n: (randn(4, 4, device=device), randn(4, 4, device=device), n), sizes=(4, 5, 6))


@section.program(needs_cuda=BOTH, leaves=MIXED)
def two_round_trips(device):
    """Two values go to the CPU, one after the other, and buffers are used again in between."""

    def function(x, y):
        there = (y + 1).cpu() + 1
        z = (x + 1) + (y + 1) + x @ y
        again = ((there.to(x.device) + 2) @ y + 3).cpu() + 2
        return z + again.to(x.device)

    return calls(function, lambda n: (randn(4, 4, device=device), randn(4, 4, device=device)))


@section.program(needs_cuda=BOTH, leaves=MIXED)
def kernels_used_in_two_partitions(device):
    """Both sides of a round trip need the same fused kernel."""

    def function(x):
        first = x @ x + 1
        there = first.cpu() + 1
        second = there.to(x.device) @ there.to(x.device) + 1
        return first, second

    return calls(function, lambda n: (randn(n, n, device=device),))


class _Trip(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.linear = linear(device)

    def forward(self, x):
        there = (x * 2).cpu() + 1
        y = there.to(x.device)
        return self.linear(y * y + x @ x.t() @ x)


@section.program(needs_cuda=BOTH, leaves=MIXED)
def round_trip_in_training(device):
    """A forward with a round trip, whose result is saved for the backward."""
    return calls(_Trip(device), lambda n: (randn(n, 8, device=device),), training=True)


@section.program(needs_cuda=BOTH)
def cpu_scalar(device):
    """A scalar on the CPU is read by an operator on the GPU."""
    return calls(lambda x, s: x + s, lambda n: (randn(n, 4, device=device), torch.tensor(float(n))))


@section.program(needs_cuda=BOTH)
def cpu_scalar_first(device):
    """The scalar is the first operand, of two operators."""

    def function(s, x, y):
        return s + x, s * y

    return calls(function, lambda n: (torch.tensor(float(n)), randn(n, 4, device=device), randn(n, 4, device=device)))


@section.program(needs_cuda=BOTH)
def cpu_scalar_that_is_an_integer(device):
    """A float on the GPU plus an integer on the CPU."""
    return calls(
        lambda x, y, s: x + y + s, lambda n: (*(randn(n, 4, device=device) for _ in range(2)), torch.tensor(n))
    )


@section.program(needs_cuda=BOTH)
def cpu_scalar_computed_before_it_is_read(device):
    """The scalar is computed with on the CPU first."""
    return calls(
        lambda x, y, s: x * y + (s + 1) * 2,
        lambda n: (*(randn(n, 4, device=device) for _ in range(2)), torch.tensor(float(n))),
    )


@section.program(needs_cuda=BOTH, leaves=MIXED)
def cpu_scalars(device):
    """Several of them, one of which meets another: that result belongs on the CPU."""

    def function(s, t, x):
        return s + t, s + x, t * x

    return calls(function, lambda n: (torch.tensor(float(n)), torch.tensor(2.0), randn(n, 4, device=device)))


@section.program(needs_cuda=BOTH, leaves=MIXED)
def cpu_scalar_is_written(device):
    """A scalar on the CPU takes what was computed on the GPU."""

    def function(s, x):
        s.copy_(x.sum())
        return x * 2

    return calls(function, lambda n: (torch.tensor(1.0), randn(n, 4, device=device)))


@section.program(needs_cuda=BOTH, leaves=MIXED, captures=False)
def cpu_scalar_goes_there_and_back(device):
    """A scalar is moved to the GPU and back, and nothing else."""
    return calls(lambda s: s.to(device).cpu(), lambda n: (torch.tensor(float(n)),))


class _Scaled(nn.Module):
    def __init__(self, device, by_cpu):
        super().__init__()
        self.linear, self.by_cpu = linear(device), by_cpu
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        y = self.linear(x)
        return y + (y.sum().cpu() * self.scale).to(x.device) if self.by_cpu else y * self.scale


@section.program(needs_cuda=BOTH, leaves=MIXED)
def cpu_scalar_that_is_a_parameter(device):
    """A scalar parameter on the CPU scales what is on the GPU; it gets its gradient."""
    return calls(_Scaled(device, by_cpu=False), lambda n: (randn(n, 8, device=device),), training=True)


@section.program(needs_cuda=BOTH, leaves=MIXED)
def cpu_scalar_parameter_of_a_cpu_operator(device):
    """A scalar parameter on the CPU is read by an operator there."""
    return calls(_Scaled(device, by_cpu=True), lambda n: (randn(n, 8, device=device),), training=True)


@section.program(needs_cuda=BOTH, leaves=MIXED)
def cpu_tensor_apart(device):
    """One result is computed on the GPU, another on the CPU."""
    return calls(lambda x, y: (x + 1, y + 2), lambda n: (randn(10, device=device), torch.randn(20)), sizes=(1,))


@section.program(needs_cuda=BOTH, leaves=MIXED)
def cpu_tensor_of_several_sizes(device):
    """The same, and the sizes of both change, each at its time."""

    def arguments(step):
        rows, others = ((2, 4), (2, 5), (2, 7), (3, 4), (3, 10))[step]
        return randn(rows, 3, device=device), torch.randn(others, 4)

    return calls(lambda x, y: (x + 1, y + 1), arguments, sizes=range(5))


def _interleaved(x, y, z, w, v):
    first = ((x + 1) @ w + x) * 2
    there = (y + 1) @ v + first.cpu()
    second = ((z + 1) @ w + z) * 2
    alone = (y + 5) @ v
    third = ((z + 3) @ w + z) * 2
    return first, there, second, alone, third


@section.program(needs_cuda=BOTH, leaves=MIXED)
def cpu_and_gpu_interleaved(device):
    """Operators of both devices in turn, most of which do not wait for each other."""
    weights = fixed(3, 3, device=device), fixed(3, 3, device=torch.device("cpu"))
    return calls(
        _interleaved,
        lambda n: (randn(n, 3, device=device), torch.randn(n, 3), randn(n, 3, device=device), *weights),
    )


@section.program(needs_cuda=BOTH, leaves=MIXED)
def view_as_another_dtype(device):
    """A view of another dtype crosses from a graph to what is not in it."""

    def function(x):
        bytes_ = (x + 1).view(torch.uint8)
        return bytes_.cpu().to(x.device)

    return calls(function, lambda n: (torch.full((n, 4), n, dtype=torch.int32).to(device),))


@section.program(leaves=DEPENDS, dynamo={"capture_dynamic_output_shape_ops": True})
def sizes_from_data_in_an_index(device):
    """Numbers say how often rows are repeated, and the repeated ones are picked."""

    def function(x, repeats):
        rank = torch.arange(repeats.numel(), device=device)
        index = rank.repeat_interleave(repeats, dim=0)
        return torch.index_select(x, 0, index)

    def arguments(n):
        repeats = (torch.arange(n) + 1).to(device)
        torch._dynamo.mark_dynamic(repeats, 0)
        return randn(16, 8, device=device), repeats

    return calls(function, arguments)


@section.program(dynamo={"capture_scalar_outputs": True})
def number_read_from_a_tensor(device):
    """``item()`` amid other operators, used as a value: the compiler computes with the tensor instead."""

    def function(x, w):
        y = (x @ w).relu()
        return (y + y.sum().item()) @ w + 1

    return calls(function, lambda n: (randn(n, 8, device=device), fixed(8, 8, device=device)))


@section.program(leaves=DEPENDS, dynamo={"capture_scalar_outputs": True})
def number_read_as_a_size(device):
    """``item()`` as the size of a new tensor."""

    def function(x, size):
        k = size.item()
        torch._check(k >= 2)
        return (x * 2).relu() + 1, torch.ones(k, 3, device=device).cos()

    return calls(function, lambda n: (randn(n, 8, device=device), torch.tensor(n).to(device)))


@section.program(leaves=DEPENDS, dynamo={"capture_dynamic_output_shape_ops": True})
def rows_picked_by_a_mask(device):
    """``x[mask]``: the size of the result depends on data."""

    def function(x, mask, w):
        y = (x @ w).relu()
        return y[mask] * 2, (y @ w).tanh()

    def arguments(n):
        return randn(n, 8, device=device), (torch.arange(n) % 2 == 0).to(device), fixed(8, 8, device=device)

    return calls(function, arguments)


def _masked_write(device):
    def arguments(n):
        return (
            randn(4, 8, device=device),
            torch.tensor([True, False, True, False]).to(device),
            randn(2, 8, device=device),
        )

    return arguments


@section.program(leaves=("index_put",))
def write_by_a_mask(device):
    """``index_put_`` by a boolean mask, which waits for the device, at the end."""

    def function(x, mask, values):
        result = x.clone() + 2
        result.index_put_([mask], values)
        return result

    return calls(function, _masked_write(device))


@section.program(leaves=("index_put",))
def write_by_a_mask_between_graphs(device):
    """The same in the middle: what comes after reads what was written."""

    def function(x, mask, values):
        result = x.clone() + 2
        result.index_put_([mask], values)
        return result * 2 + result.sum()

    return calls(function, _masked_write(device))


@section.program()
def write_by_indices(device):
    """``index_put_`` by integers, which is no reason to stop."""

    def function(x, at, values):
        x = torch.zeros_like(x)
        return x.index_put_([at], values, accumulate=True) * 2

    return calls(
        function, lambda n: (randn(8, 4, device=device), torch.arange(n).to(device), randn(n, 4, device=device))
    )


@section.program(leaves=BRANCHES)
def branch_on_data(device):
    """``torch.cond``, amid other operators."""

    def function(p, x, w):
        y = (x @ w).relu()
        z = torch.cond(p.sum() > 0, torch.cos, torch.sin, (y,))
        return (z @ w).relu() + 1

    return calls(
        function, lambda n: (torch.tensor([n - 5.0]).to(device), randn(n, 8, device=device), fixed(8, 8, device=device))
    )


@section.program(leaves=(*BRANCHES, *DEPENDS), dynamo={"capture_scalar_outputs": True})
def branch_on_data_with_results_of_unknown_size(device):
    """``torch.cond`` with two results, whose size was read from a tensor."""

    def function(p, size, x):
        k = size.item()
        torch._check(k >= 2)
        b = torch.ones(k, 3, device=device)
        one, other = torch.cond(p.sum() > 0, lambda b: (b.cos(), b.cos() + 1), lambda b: (b.sin(), b.sin() + 1), (b,))
        return one + other, (x * 2).relu() + 1

    return calls(
        function,
        lambda n: (torch.tensor([n - 5.0]).to(device), torch.tensor(n).to(device), randn(n, 4, device=device)),
    )


@section.program(leaves=BRANCHES)
def loop_on_data(device):
    """``while_loop``, amid other operators."""
    from torch._higher_order_ops.while_loop import while_loop

    def function(x, w):
        y = (x @ w).relu()
        steps, z = while_loop(
            lambda i, y: i < 3, lambda i, y: (i + 1, y * 2), (torch.zeros((), dtype=torch.int64, device=device), y)
        )
        return (z @ w).relu() + steps

    return calls(function, lambda n: (randn(n, 8, device=device), fixed(8, 8, device=device)))


@section.program(leaves=("parity.unsafe",))
def unsafe_operator(device):
    """A custom operator that is tagged as unsafe for graphs."""

    def function(x):
        return custom.unsafe((x + 10) * 2) * 2 + 1

    return calls(function, lambda n: (randn(3, 16, device=device),), sizes=(3,))


@section.program(leaves=("parity.unsafe",))
def unsafe_operator_of_several_sizes(device):
    """The same, with sizes that change."""

    def function(x):
        return custom.unsafe((x + 10) * 2) * 2 + 1

    return calls(function, lambda n: (randn(3, n, n, device=device),), sizes=(16, 5, 11))


@section.program(leaves=("parity.unsafe",))
def two_unsafe_operators_and_a_safe_one(device):
    """Three partitions with graphs around two without; another custom operator is in a graph."""

    def function(x):
        y = custom.unsafe((x + 10) * 2) + 1
        z = custom.affine(y) * 2 + 1
        return custom.unsafe(z) * 3 + 1

    return calls(function, lambda n: (randn(n, 16, device=device),))


@section.program(leaves=("parity.unsafe_sin",))
def unsafe_operator_that_writes(device):
    """An unsafe operator writes to a list of tensors, which is read afterwards."""

    def function(x):
        x = x * 3 + 1
        outs = [torch.empty_like(x)]
        y = custom.unsafe_sin(x, outs)
        return y / 3 + 1, outs[0] * 2

    return calls(function, lambda n: (randn(n, 4, device=device),))


@section.program(leaves=("parity.unsafe_sum",))
def values_freed_late(device):
    """Results of a custom operator that writes are read by two unsafe ones, with much in between."""

    def function(x):
        total = x + 1
        first = custom.accumulate(x, total)
        y = custom.unsafe_sum(first + 1, total + 1)
        z = y + first + total
        second = custom.accumulate(y, z)
        return custom.unsafe_sum(second + z, y) * 2 + 1

    return calls(function, lambda n: (randn(n, 4, device=device),), repeats=5)


@section.program(leaves=("parity.unsafe_sum",))
def written_before_an_unsafe_operator(device):
    """What a custom operator wrote in one partition is read in the next."""

    def function(x):
        total = x + 1
        first = custom.accumulate(x, total)
        y = custom.unsafe_sum(first + 1, total)
        return y + total + first

    return calls(function, lambda n: (randn(n, 4, device=device),), repeats=5)


@section.program(leaves=("parity.unsafe_mask",))
def unsafe_operator_that_waits_for_nothing(device):
    """An unsafe operator needs a size only, so that it can go first."""

    def function(x, w):
        x = torch.relu(x + 1)
        x = x + x.dot(w)
        mask = custom.unsafe_mask(x, 5)
        low, high = (x.masked_fill(mask, value) for value in (float("inf"), -float("inf")))
        return low.min() + high.max() + x

    return calls(function, lambda n: (randn(8, device=device), fixed(8, device=device)))


@section.program(leaves=("parity.unsafe_copy",))
def sizes_in_the_layout_alone(device):
    """After an unsafe operator, a size is seen in an argument's layout, and not in the result's."""

    def function(x):
        return custom.rows32(custom.unsafe_copy(x)) * 2 + 1

    def arguments(n):
        x = randn(n, 16, device=device)
        torch._dynamo.mark_dynamic(x, 0)
        return (x,)

    return calls(function, arguments, sizes=(20, 10, 25))


@section.program(leaves=("parity.unsafe_attention",))
def unsafe_attention_that_writes_its_result(device):
    """An engine's layers: projections in graphs, attention outside, into a buffer made before."""
    layers = nn.ModuleList([nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 48), nn.Linear(16, 16)]).to(device)

    def function(x):
        for project, back in zip(layers[::2], layers[1::2], strict=True):
            q, k, v = project(x).chunk(3, dim=-1)
            out = torch.empty_like(q)
            custom.unsafe_attention(q, k, v, out)
            x = back(out).relu() + x
        return x

    return calls(function, lambda n: (randn(n, 16, device=device),))


@section.program(leaves=("parity.scaled",), inductor={"custom_should_partition_ops": ["parity::scaled"]})
def operator_that_reads_python(device):
    """A custom operator reads a Python object, and Inductor's setting names it to be cut out."""

    def flow(compile):
        function = compile(lambda x: custom.scaled(x * 2 + 1) * 3 + 1)
        for factor in (1.0, 1.0, 1.0, 2.0, 3.0, 4.0):
            custom.Metadata.factor = factor
            with torch.no_grad():
                yield copied(function(fixed(4, 4, device=device)))

    return flow


@section.program(
    leaves=DEPENDS,
    inductor={"cudagraph_unsafe_unbacked_ops": ["parity::count"]},
    dynamo={"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True},
)
def size_from_an_operator(device):
    """A custom operator gives a size, and Inductor's setting names it as unsafe."""

    def function(x):
        y = (x * 2).relu() + 1
        k = torch.ops.parity.count(y)
        torch._check(k >= 1)
        return y @ y.t(), torch.ones(k, 3, device=device) * 2 + 1

    return calls(function, lambda n: (randn(n, 8, device=device),))


@section.program(needs_cuda=BOTH, leaves=MIXED)
def boolean_and_scalar_and_cpu(device):
    """Several reasons at once: a CPU scalar, a value that goes to the CPU, sizes that change."""

    def function(x, s, w):
        y = (x @ w).relu() * s
        there = y.cpu().sin() * 2
        return there, (there.to(device) @ w).relu() + s

    return calls(
        function,
        lambda n: (randn(n, 8, device=device), torch.tensor(float(n)), fixed(8, 8, device=device)),
        sizes=(4, 7, 9),
    )
