"""After a warm-up calls of all sizes replay what was captured, and nothing of the user's has changed."""

from __future__ import annotations

import logging
import random
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo import mark_dynamic

import cudagraph_backend as sg
from cudagraph_backend.drivers.host import HostDriver, HostGraph
from tests.support.models import Mlp
from tests.support.regions import compiled


def marked(*shape, device, upper=20, dims=(0,)):
    x = torch.randn(*shape, device=device)
    for dim in dims:
        mark_dynamic(x, dim, min=2, max=upper)
    return x


def assert_replays_only(call, batches, expected):
    """Values are right, and no call captures, or runs, anything else than graphs that are there."""
    before = sg.stats()
    for batch in batches:
        torch.testing.assert_close(call(*batch), expected(*batch), rtol=1e-4, atol=1e-5)
    after = sg.stats()
    assert after.captures == before.captures
    assert after.regions == before.regions
    assert after.fallbacks == before.fallbacks == {}
    assert after.replays == before.replays + len(batches)


def test_all_buckets_largest_first(device):
    model = Mlp().to(device)
    served = compiled(model)
    x = marked(3, 24, device=device)
    with torch.no_grad():
        warmed = sg.warmup(served, (x,))
        assert [w.size for w in warmed] == [20, 16, 8, 4, 2]
        assert [w.captures for w in warmed] == [1] * 5
        assert len({w.output_pool_bytes for w in warmed}) == 1  # that of the largest holds all
        assert "buckets: 2, 4, 8, 16, 20" in sg.explain()
        batches = [(torch.randn(n, 24, device=device),) for n in (7, 20, 2, 13, 4, 3)]
        assert_replays_only(served, [*batches, (x,)], model)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_sizes_of_the_option_for_unmarked_inputs(rows, device):
    """Whatever the number of rows that the example has, sizes are captured from the largest on, and 1 apart."""
    served = compiled(lambda x, y: x * 2 + y, capture_sizes=[1, 2, 8, 32])
    with torch.no_grad():
        warmed = sg.warmup(served, (torch.randn(rows, 4, device=device), torch.randn(rows, 4, device=device)))
        assert [w.size for w in warmed] == [32, 8, 2, 1]
        assert [w.captures for w in warmed] == [1] * 4
        batches = [tuple(torch.randn(2, n, 4, device=device)) for n in (5, 1, 32, 2, 9)]
        assert_replays_only(served, batches, lambda x, y: x * 2 + y)
    assert sg.stats().regions == 2  # size 1, and all others


def test_sizes_given(device):
    model = Mlp().to(device)
    served = compiled(model)
    with torch.no_grad():
        warmed = sg.warmup(served, {"x": marked(3, 24, device=device, upper=64)}, (2, 64, 1, 8))
        assert [w.size for w in warmed] == [64, 8, 2, 1]
        assert sg.stats().graphs == 4
        batches = [(torch.randn(n, 24, device=device),) for n in (6, 60, 1)]
        assert_replays_only(served, batches, model)


def test_it_may_be_repeated(device):
    served = compiled(lambda x: x * 2)
    inputs = (marked(3, 4, device=device),)
    sg.warmup(served, inputs)
    assert [w.captures for w in sg.warmup(served, inputs)] == [0] * 5


def test_a_module_that_is_called_by_a_function(device):
    model = Mlp().to(device)
    served = compiled(model)

    def answer(x, *, scale):
        return served(x) * scale

    with torch.no_grad():
        sg.warmup(answer, (marked(3, 24, device=device),), kwargs={"scale": 2.0})
        batches = [(torch.randn(n, 24, device=device),) for n in (7, 2)]
        assert_replays_only(lambda x: answer(x, scale=3.0), batches, lambda x: model(x) * 3)


def test_two_dims(device):
    def function(x, mask):
        return (x * mask.unsqueeze(-1)).softmax(-1) * 2

    served = compiled(function)
    x, mask = marked(3, 5, 4, device=device, dims=(0, 1)), marked(3, 5, device=device, dims=(0, 1))
    with torch.no_grad():
        warmed = sg.warmup(served, (x, mask), [(2, 8), (20, 16), (20, 8)])
        assert [w.size for w in warmed] == [(20, 16), (20, 8), (2, 8)]
        assert sum(w.captures for w in warmed) == 3
        batches = [(torch.randn(n, m, 4), torch.randn(n, m)) for n, m in ((17, 13), (20, 7), (2, 8))]
        assert_replays_only(served, [tuple(t.to(device) for t in batch) for batch in batches], function)


def test_two_dims_by_default_in_all_combinations(device):
    served = compiled(lambda x: x.sin(), capture_sizes=[2, 8])
    with torch.no_grad():
        warmed = sg.warmup(served, (marked(3, 5, device=device, dims=(0, 1)),))
    assert [w.size for w in warmed] == [(8, 8), (8, 2), (2, 8), (2, 2)]
    assert sg.stats().graphs == 4


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, written):
        written.add_(1)
        return nn.functional.dropout(self.linear(x), 0.5)


def test_inputs_gradients_and_random_states_are_as_before(device):
    model = Dropout().to(device)
    served = compiled(model)
    x, written = torch.randn(3, 4, device=device, requires_grad=True), torch.zeros(3, 4, device=device)
    before = x.detach().clone()
    grads = [torch.randn_like(p) for p in (x, *model.parameters())]
    for parameter, grad in zip((x, *model.parameters()), grads, strict=True):
        parameter.grad = grad.clone()
    states = torch.get_rng_state(), random.getstate()

    def draws_everywhere(x, written):
        return served(x, written) * random.random()

    sg.warmup(draws_everywhere, (x, written), [2, 8], backward=True)
    assert torch.equal(x, before)
    assert written.sum() == 0
    assert not hasattr(x, "_dynamo_dynamic_indices")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    for parameter, grad in zip((x, *model.parameters()), grads, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_random_states_are_put_back_after_an_error(device):
    def fails(x):
        torch.rand(3)
        random.random()
        raise KeyError("mine")

    x, states = torch.randn(3, 4, device=device), (torch.get_rng_state(), random.getstate())
    with pytest.raises(KeyError, match="mine"):
        sg.warmup(fails, (x,), [2])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def train(model, x):
    for parameter in model.parameters():
        parameter.grad = None
    out = model(x)
    out.pow(2).sum().backward()
    return [out.detach().clone(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("backward", [True, False])
def test_training(backward, device):
    model = Mlp().to(device)
    served = compiled(model)
    warmed = sg.warmup(served, (marked(3, 24, device=device),), [2, 8, 20], backward=backward)
    assert [w.captures for w in warmed] == [2 if backward else 1] * 3
    captures = sg.stats().captures
    for n in (7, 20, 2, 5):
        x = torch.randn(n, 24, device=device)
        for ours, eager in zip(train(served, x), train(model, x), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    assert (sg.stats().captures == captures) == backward
    assert sg.stats().fallbacks == {}


def test_a_rehearsal_captures_and_counts_nothing(device):
    served = compiled(lambda x: x * 2, strict=True)
    with sg.sharedgraph.rehearsal() as regions:
        x = torch.randn(5, 4, device=device)
        assert torch.equal(served(x), x * 2)
    assert [region.region.number for region in regions] == [r.region.number for r in sg.sharedgraph.regions()]
    stats = sg.stats()
    assert (stats.captures, stats.replays, stats.fallbacks) == (0, 0, {})
    assert torch.equal(served(x), x * 2)
    assert sg.stats().captures == 1


def test_a_masked_region_can_be_rehearsed(device):
    """The number of real rows is one more argument then."""
    function = lambda x: x.softmax(0)
    served = compiled(function)
    x = marked(5, 4, device=device)
    with torch.no_grad(), sg.sharedgraph.rehearsal():
        torch.testing.assert_close(served(x), function(x))


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("sizes", [None, [2, 4]])
@pytest.mark.parametrize("function", [lambda x: x * 2, torch.compile(lambda x: x * 3, backend="eager")])
def test_a_function_that_is_not_ours(function, sizes, device):
    with pytest.raises(sg.WarmupError, match="runs nothing that this backend has compiled"):
        sg.warmup(function, (marked(3, 4, device=device),), sizes)


def test_no_bound(device):
    with pytest.raises(sg.WarmupError, match=r"has no bound; accepted is a list of sizes here, .* capture_sizes"):
        sg.warmup(compiled(lambda x: x * 2), (torch.randn(3, 4, device=device),))
    assert sg.stats().captures == 0


def test_different_capture_sizes(device):
    first, second = compiled(lambda x: x * 2, capture_sizes=[2]), compiled(lambda x: x * 3, capture_sizes=[4])
    with pytest.raises(sg.WarmupError, match="different capture_sizes; accepted is one for all: give sizes"):
        sg.warmup(lambda x: second(first(x)), (torch.randn(3, 4, device=device),))


def test_more_sizes_than_graphs(device):
    served = compiled(lambda x: x * 2, max_graphs=4)
    with pytest.raises(sg.WarmupError, match="there are 5 combinations; accepted are 4"):
        sg.warmup(served, (marked(3, 4, device=device),))


def test_backward_without_gradients(device):
    with torch.no_grad(), pytest.raises(sg.WarmupError, match="backward: got a result without tensors that need"):
        sg.warmup(compiled(Mlp().to(device)), (marked(3, 24, device=device),), [2], backward=True)


# ------------------------------------------------------------------------------------------------ telling


def test_without_tqdm_it_is_logged(device, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with caplog.at_level(logging.INFO, "cudagraph_backend"):
        sg.warmup(compiled(lambda x: x * 2), (marked(3, 4, device=device),), [8, 2])
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("warmup")]
    assert [line.partition(":")[2].partition(":")[0] for line in told] == [" size 8", " size 2"]
    assert all(line.endswith("MiB held, 1 captures") for line in told)


def test_a_bar_tells_sizes_seconds_and_memory(device, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, **settings):
            self.total, self.told, self.closed = total, [], False
            bars.append(self)

        def set_postfix_str(self, text, refresh):
            self.told.append(text)

        def update(self):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.closed = True

    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=Bar))
    sg.warmup(compiled(lambda x: x * 2), (marked(3, 4, device=device),), [8, 2])
    (bar,) = bars
    assert (bar.total, bar.closed) == (2, True)
    assert all(re.fullmatch(r"size [82]: \d+\.\d\d s, \d+\.\d MiB held", told) for told in bar.told)
    assert len(bar.told) == 2


@pytest.mark.host_only("the executables are made up, and of the host driver")
def test_memory_of_executables_is_in_the_records(device, monkeypatch):
    monkeypatch.setattr(HostDriver, "capture", lambda self, run, **of_graph: HostGraph(run, 1000))
    warmed = sg.warmup(compiled(lambda x: x * 2), (marked(3, 4, device=device),), [8, 2])
    assert [w.executable_bytes for w in warmed] == [1000, 2000]
    assert all(w.nbytes == w.output_pool_bytes + w.memory_pool_bytes + w.executable_bytes for w in warmed)
