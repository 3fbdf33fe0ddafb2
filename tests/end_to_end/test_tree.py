"""Regions that feed one another: what is captured, copied and held, in numbers, and that values stay eager's."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import cudagraph_backend as sg

pytestmark = pytest.mark.usefixtures("no_grad")

BUCKETS = [4, 8, 16, 32]
ALIGNMENT = 512


def rows(function, **options):
    """Compiled for any number of rows, and for the number of columns of its first call."""
    inner = torch.compile(function, backend="sharedgraph", options=options)

    def call(*tensors):
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return inner(*tensors)

    return call


def all_dims(function, **options):
    """Compiled for any sizes. Where a function has graph breaks, this is what makes all of its regions dynamic."""
    return torch.compile(function, backend="sharedgraph", options=options, dynamic=True)


def integers(*size, device):
    """Whole numbers that float32 holds exactly, and so do all functions here."""
    return torch.randint(0, 1009, size, device=device).float()


def stir(x):
    """Bounded, exact, and sensitive to every bit; reads other entries than it writes."""
    return torch.remainder(four_columns(x).flip(1) * 3 + 1, 1009)


def four_columns(x):
    """Compiled code then knows their number: rows alone are dynamic."""
    if x.shape[1] != 4:
        raise ValueError
    return x


def six_regions(x):
    a = stir(x)
    torch._dynamo.graph_break()
    b = four_columns(a) + 1
    torch._dynamo.graph_break()
    c = stir(b)
    torch._dynamo.graph_break()
    d = four_columns(c) * 2
    torch._dynamo.graph_break()
    e = stir(d)
    torch._dynamo.graph_break()
    return four_columns(e) - 3


SIX = (
    lambda x: stir(x),
    lambda x: x + 1,
    lambda x: stir(x) + 0,
    lambda x: x * 2,
    lambda x: stir(x) - 0,
    lambda x: x - 3,
)


def chained(device):
    """The same as six functions, each compiled alone."""
    functions = [rows(function, capture_sizes=BUCKETS) for function in SIX]

    def run(x):
        for function in functions:
            x = function(x)
        return x

    return run


def broken(device):
    return all_dims(six_regions, capture_sizes=BUCKETS)


def counted(attribute):
    return getattr(sg.stats(), attribute)


def pool_bound(nbytes, ranges, device):
    granularity = 1 if device.type == "cpu" else 2 << 20
    return max(ranges * -(-nbytes // ALIGNMENT) * ALIGNMENT, granularity)


# ---- graphs and copies


@pytest.mark.slow
@pytest.mark.parametrize("make", [broken, chained])
def test_graphs_are_as_many_as_regions_and_buckets(make, device):
    function = make(device)
    sizes = random.Random(0).sample(range(2, 33), 20)
    for size in sizes * 3:
        x = integers(size, 4, device=device)
        assert torch.equal(function(x), six_regions(x))
    stats = sg.stats()
    assert stats.regions == 6
    assert stats.fallbacks == {}
    assert stats.graphs <= 6 * len(BUCKETS)
    assert stats.captures <= 6 * len(BUCKETS)


@pytest.mark.slow
@pytest.mark.parametrize("make", [broken, chained])
def test_only_the_first_region_copies_its_input(make, device):
    function = make(device)
    sizes = random.Random(0).sample(range(2, 33), 20)
    for size in sizes:
        function(integers(size, 4, device=device))
    copied, read = counted("staged_copies"), counted("read_in_place")
    for size in sizes:
        x = integers(size, 4, device=device)
        assert torch.equal(function(x), six_regions(x))
    assert counted("staged_copies") - copied == len(sizes)
    assert counted("read_in_place") - read == 5 * len(sizes)
    assert counted("outputs_copied_out") == 0


@pytest.mark.slow
def test_a_second_round_captures_nothing(device):
    function = broken(device)
    captures = []
    for _ in range(4):
        for size in (3, 8, 31, 16, 2):
            function(integers(size, 4, device=device))
        captures.append(counted("captures"))
    assert len(set(captures)) == 1


def test_several_pooled_inputs_are_all_read_in_place(device):
    first, second = rows(lambda x: (x * 2, x + 1)), rows(lambda a, b: a * b - a)
    for size in (5, 12, 5, 31):
        x = integers(size, 4, device=device)
        assert torch.equal(second(*first(x)), (x * 2) * (x + 1) - x * 2)
    copied, read = counted("staged_copies"), counted("read_in_place")
    second(*first(integers(5, 4, device=device)))
    assert (counted("staged_copies") - copied, counted("read_in_place") - read) == (1, 2)


def test_pooled_and_other_inputs_are_told_apart_at_every_call(device):
    """One function, called now with a pooled output, now with the user's own tensor, now with both swapped."""
    produce, add = rows(lambda x: x * 2), rows(lambda a, b: a * 3 - b)
    for size in (5, 12, 5, 31) * 2:
        x, own = integers(size, 4, device=device), integers(size, 4, device=device)
        pooled, expected = produce(x), x * 2
        assert torch.equal(add(pooled, own), expected * 3 - own)
        assert torch.equal(add(own, pooled), own * 3 - expected)
        assert torch.equal(add(own, own), own * 2)
        assert torch.equal(add(pooled, pooled), expected * 2)
        assert torch.equal(pooled, expected)


# ---- repeated layers


class Layer(nn.Module):
    def __init__(self, seed) -> None:
        super().__init__()
        self.register_buffer("weight", (torch.arange(8.0) + seed) % 5)

    def forward(self, x):
        return torch.remainder(x.flip(1) * 3 + self.weight, 1009)


def layers_of(count, device, **options):
    layers = nn.ModuleList(Layer(i) for i in range(count)).to(device)
    for layer in layers:
        layer.compile(backend="sharedgraph", options=options, dynamic=True)
    return layers


def through(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def through_eager(layers, x):
    for layer in layers:
        x = layer.forward(x)
    return x


def test_24_equal_layers_take_the_outputs_of_three(device):
    layers = layers_of(24, device, capture_sizes=[32])
    captures = []
    for size in (5, 32, 17, 5, 9):
        torch.compiler.cudagraph_mark_step_begin()
        x = integers(size, 8, device=device)
        result = through(layers, x)
        assert torch.equal(result, through_eager(layers, x))
        del result
        captures.append(counted("captures"))
    assert sg.stats().regions == 1
    assert sg.stats().fallbacks == {}
    assert len(set(captures)) == 1, captures
    assert counted("output_pool_bytes") <= pool_bound(32 * 8 * 4, 4, device)


def test_layers_copy_only_what_comes_from_outside(device):
    layers = layers_of(24, device, capture_sizes=[32])
    through(layers, integers(32, 8, device=device))
    copied, read = counted("staged_copies"), counted("read_in_place")
    x = integers(9, 8, device=device)
    assert torch.equal(through(layers, x), through_eager(layers, x))
    assert (counted("staged_copies") - copied, counted("read_in_place") - read) == (1, 23)


def test_a_residual_stream_over_layers(device):
    """Two values are alive at a time: the stream, and what a layer adds to it."""
    layers = layers_of(8, device, capture_sizes=[32])
    add = rows(lambda a, b: torch.remainder(a + b, 1009), capture_sizes=[32])
    for size in (5, 32, 17, 5):
        torch.compiler.cudagraph_mark_step_begin()
        x = expected = integers(size, 8, device=device)
        for layer in layers:
            x = add(x, layer(x))
            expected = torch.remainder(expected + layer.forward(expected), 1009)
            assert torch.equal(x, expected)
    assert counted("outputs_copied_out") == 0
    assert counted("output_pool_bytes") <= pool_bound(32 * 8 * 4, 5, device)


# ---- feedback


def test_feedback_alternates_between_two_ranges(device):
    f = rows(stir, capture_sizes=[8, 16, 32])
    starts = 0
    for size in (5, 16, 31):
        x = expected = integers(size, 4, device=device)
        starts += 1
        addresses = set()
        for i in range(1000):
            x, expected = f(x), stir(expected)
            if i >= 2:
                addresses.add(x.data_ptr())
        assert torch.equal(x, expected)
        assert len(addresses) == 2
    stats = sg.stats()
    assert stats.captures <= 2 * 3
    assert stats.outputs_copied_out == 0
    assert stats.staged_copies <= starts
    assert stats.output_pool_bytes <= pool_bound(32 * 4 * 4, 3, device)


def test_feedback_of_two_states(device):
    f = rows(lambda a, b: (stir(b), torch.remainder(a + b, 1009)), capture_sizes=[16])
    a, b = integers(9, 4, device=device), integers(9, 4, device=device)
    ea, eb = a, b
    for _ in range(100):
        a, b = f(a, b)
        ea, eb = stir(eb), torch.remainder(ea + eb, 1009)
        assert torch.equal(a, ea)
        assert torch.equal(b, eb)
    assert counted("outputs_copied_out") == 0
    assert counted("captures") <= 3


def test_feedback_swapped_at_every_other_step(device):
    """``a, b = f(b, a)``: each output is read at the position of the other."""
    f = rows(lambda a, b: (stir(a), b + 1))
    a, b = integers(9, 4, device=device), integers(9, 4, device=device)
    ea, eb = a, b
    for _ in range(20):
        a, b = f(b, a)
        ea, eb = stir(eb), ea + 1
        assert torch.equal(a, ea)
        assert torch.equal(b, eb)


def test_feedback_while_the_values_before_are_kept(device):
    f = rows(stir)
    x = integers(9, 4, device=device)
    kept, expected = [x], [x.clone()]
    for _ in range(12):
        kept.append(f(kept[-1]))
        expected.append(stir(expected[-1]))
        for got, right in zip(kept, expected, strict=True):
            assert torch.equal(got, right)


# ---- what is alive within a step


def states(x):
    a = stir(x)
    torch._dynamo.graph_break()
    b = stir(a)
    torch._dynamo.graph_break()
    c = four_columns(a) + four_columns(b)
    torch._dynamo.graph_break()
    d = stir(c)
    return [a, b, c, d, b[1:]]


@pytest.mark.slow
def test_outputs_alive_in_the_step_are_not_overwritten(device):
    f = all_dims(states, capture_sizes=[16, 32])
    pool = []
    for size in (5, 31, 16, 5, 9, 31):
        x = integers(size, 4, device=device)
        got = f(x)
        for ours, expected in zip(got, states(x), strict=True):
            assert torch.equal(ours, expected)
        del got, ours
        pool.append(counted("output_pool_bytes"))
    assert counted("outputs_copied_out") == 0
    assert pool[2:] == pool[2:3] * 4


def test_dropping_a_step_lets_the_next_one_use_its_memory(device):
    f = all_dims(states, capture_sizes=[16])
    addresses = []
    for _ in range(4):
        got = f(integers(9, 4, device=device))
        addresses.append([out.data_ptr() for out in got])
        del got
    assert addresses[1:] == addresses[1:2] * 3
    assert len(set(addresses[1][:4])) == 4


def test_outputs_of_earlier_steps_stay_and_the_pool_does_not_grow_for_long(device):
    f = all_dims(states, capture_sizes=[16])
    kept, pool = [], []
    for _ in range(6):
        x = integers(9, 4, device=device)
        kept.append((f(x), states(x)))
        for got, expected in kept:
            for ours, right in zip(got, expected, strict=True):
                assert torch.equal(ours, right)
        pool.append(counted("output_pool_bytes"))
    assert counted("outputs_copied_out") > 0
    assert pool[2:] == pool[2:3] * 4


def test_a_loop_keeps_all_its_hidden_states(device):
    """The states of the loop are of one step, as the caller says where steps begin."""
    f = rows(stir, capture_sizes=[16])
    pool = []
    for size in (9, 16, 3):
        torch.compiler.cudagraph_mark_step_begin()
        hidden, expected = [integers(size, 4, device=device)], []
        expected.append(hidden[0].clone())
        for _ in range(6):
            hidden.append(f(hidden[-1]))
            expected.append(stir(expected[-1]))
        for ours, right in zip(hidden, expected, strict=True):
            assert torch.equal(ours, right)
        assert len({h.data_ptr() for h in hidden}) == 7
        del hidden, ours
        pool.append(counted("output_pool_bytes"))
    assert counted("outputs_copied_out") == 0
    assert len(set(pool)) == 1


def test_a_branch_taken_in_some_steps(device):
    """Other regions run at the same place of the step from call to call."""

    def function(x, flag):
        a = stir(x)
        torch._dynamo.graph_break()
        b = four_columns(a) + 1 if flag else stir(a)
        torch._dynamo.graph_break()
        return a, b, stir(b)

    f = all_dims(function)
    for size, flag in [(5, True), (5, False), (9, True), (5, True), (9, False), (5, False)] * 2:
        x = integers(size, 4, device=device)
        for ours, expected in zip(f(x, flag), function(x, flag), strict=True):
            assert torch.equal(ours, expected)


def test_the_same_function_twice_on_one_value(device):
    """Both results and the value itself are alive, and of one step."""
    produce, f = rows(lambda x: x + 1), rows(stir)
    for size in (5, 12, 5):
        torch.compiler.cudagraph_mark_step_begin()
        x = integers(size, 4, device=device)
        y = produce(x)
        one, two = f(y), f(y)
        one += 5
        assert torch.equal(y, x + 1)
        assert torch.equal(one, stir(x + 1) + 5)
        assert torch.equal(two, stir(x + 1))
        assert torch.equal(f(f(y)), stir(stir(x + 1)))


# ---- pieces of pooled outputs as inputs

VIEWS = {
    "all": lambda y: y,
    "first rows": lambda y: y[:3],
    "one row": lambda y: y[:1],
    "last rows": lambda y: y[1:],
    "middle rows": lambda y: y[2:5],
    "every second row": lambda y: y[::2],
    "first columns": lambda y: y[:, :4],
    "last columns": lambda y: y[:, 1:],
    "transposed": lambda y: y.t(),
    "transposed and cut": lambda y: y.t()[:, :3],
    "flat": lambda y: y.reshape(-1),
    "twice as many rows": lambda y: y.view(-1, 3),
    "one more dim": lambda y: y.unsqueeze(1),
    "expanded": lambda y: y[:1].expand(7, 6),
    "no rows": lambda y: y[:0],
}
CONSUMERS = {
    "anything in padded rows": lambda x: x * 2 + 1,
    "replicas in padded rows": lambda x: x.cumsum(0),
    "masks": lambda x: (x.sum(0), x.flip(-1) + 1),
    "padded columns too": lambda x: x * 3 - 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("view", VIEWS)
def test_a_piece_of_a_pooled_output_as_input(view, consumer, device):
    """Padding rows of the piece may be real rows of the output, which must come to no harm."""
    produce, function = rows(lambda x: x + 1), CONSUMERS[consumer]
    consume = all_dims(function) if "columns" in consumer else rows(function)
    for size in (11, 6, 13, 11):
        x = integers(size, 6, device=device)
        y, expected = produce(x), x + 1
        torch.testing.assert_close(consume(VIEWS[view](y)), function(VIEWS[view](expected)), rtol=0, atol=0)
        assert torch.equal(y, expected)
        y[0] += 7  # the user's own change is seen, and lasts
        expected[0] += 7
        torch.testing.assert_close(consume(VIEWS[view](y)), function(VIEWS[view](expected)), rtol=0, atol=0)
        assert torch.equal(y, expected)


def test_a_larger_bucket_in_the_consumer_than_in_the_producer(device):
    produce = rows(lambda x: (x + 1, x - 1), capture_sizes=[8])
    consume = rows(lambda a: a.cumsum(0), capture_sizes=[64])
    for size in (5, 8, 7):
        x = integers(size, 6, device=device)
        low, high = produce(x)
        assert torch.equal(consume(low), (x + 1).cumsum(0))
        assert torch.equal(consume(high), (x - 1).cumsum(0))
        assert torch.equal(low, x + 1)  # what lies behind one output is another one
        assert torch.equal(high, x - 1)


def test_a_smaller_bucket_in_the_consumer_than_in_the_producer(device):
    produce = rows(lambda x: (x + 1, x - 1), capture_sizes=[64])
    consume = rows(lambda a: a.cumsum(0), capture_sizes=[8, 16])
    for size in (5, 8, 7, 12):
        x = integers(size, 6, device=device)
        low, high = produce(x)
        assert torch.equal(consume(low), (x + 1).cumsum(0))
        assert torch.equal(consume(high), (x - 1).cumsum(0))


def test_pieces_that_overlap_in_one_call(device):
    produce, consume = rows(lambda x: x + 1), rows(lambda a, b: a * 2 - b)
    for size in (11, 6, 13):
        x = integers(size, 6, device=device)
        y, expected = produce(x), x + 1
        for first, second in ((slice(0, 4), slice(1, 5)), (slice(0, 4), slice(0, 4)), (slice(2, 5), slice(0, 3))):
            assert torch.equal(consume(y[first], y[second]), expected[first] * 2 - expected[second])
        assert torch.equal(y, expected)


def test_a_piece_of_an_output_that_is_kept(device):
    produce, consume = rows(lambda x: x + 1), rows(lambda x: x.cumsum(0))
    kept = []
    for size in (11, 6, 13, 11):
        x = integers(size, 6, device=device)
        kept.append((produce(x), x + 1))
        for y, expected in kept:
            assert torch.equal(consume(y[1:4]), expected[1:4].cumsum(0))
            assert torch.equal(y, expected)


def test_an_output_whose_rows_lie_between_padded_ones(device):
    """Along the second dim padded rows lie between real ones; the next region must get the real ones."""
    produce, consume = all_dims(lambda x: x + 1), all_dims(lambda x: x * 2 + x.sum(1, keepdim=True))
    for size in (5, 11, 5, 3):
        x = integers(3, size, device=device)
        assert torch.equal(consume(produce(x)), (x + 1) * 2 + (x + 1).sum(1, keepdim=True))


# ---- pooled inputs that are written


def test_a_pooled_input_that_is_changed_in_place(device):
    def change(x):
        x.add_(1)
        return x * 2

    produce, f = rows(lambda x: x * 3), rows(change)
    for size in (5, 12, 5, 31):
        x = integers(size, 4, device=device)
        y = produce(x)
        out = f(y)
        assert torch.equal(y, x * 3 + 1)
        assert torch.equal(out, x * 6 + 2)
        out = f(y)
        assert torch.equal(y, x * 3 + 2)
        assert torch.equal(out, x * 6 + 4)


def test_a_piece_of_a_pooled_input_that_is_changed_in_place(device):
    produce, f = rows(lambda x: x * 3), rows(lambda x: x.mul_(2).sum(1))
    for size in (5, 12, 5, 31):
        x = integers(size, 4, device=device)
        y, expected = produce(x), x * 3
        assert torch.equal(f(y[1:4]), expected[1:4].mul_(2).sum(1))
        assert torch.equal(f(y[:2]), expected[:2].mul_(2).sum(1))
        assert torch.equal(y, expected)


def test_a_pooled_input_that_comes_back_as_output(device):
    produce, f = rows(lambda x: x * 3), rows(lambda x: (x, x[1:], x + 1))
    for size in (5, 12, 5, 31):
        x = integers(size, 4, device=device)
        y = produce(x)
        same, rest, other = f(y)
        assert same is y
        assert rest.data_ptr() == y[1:].data_ptr()
        y += 1
        assert torch.equal(rest, x[1:] * 3 + 1)
        assert torch.equal(other, x * 3 + 1)


def test_a_pooled_output_as_a_state_that_every_step_updates(device):
    """A cache that was made by a compiled function, and then lives on."""

    def update(cache, x):
        cache.copy_(torch.remainder(cache.flip(1) + x, 1009))
        return cache.sum(1)

    make, f = rows(lambda x: x * 2), rows(update)
    x = integers(9, 4, device=device)
    cache, expected = make(x), x * 2
    for i in range(10):
        x = integers(9, 4, device=device)
        assert torch.equal(f(cache, x), update(expected, x))
        assert torch.equal(cache, expected)
        if i % 3 == 0:
            make(x)  # wants the cache's range
            assert torch.equal(cache, expected)
