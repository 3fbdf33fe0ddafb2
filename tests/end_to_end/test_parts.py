"""Regions with operators that can't be captured: captured in the parts around them, with the values of eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import cudagraph_backend as sg
from cudagraph_backend import sharedgraph, torch_internals
from tests.support.regions import BUCKETS, SIZES, check, kinds, two

UNSAFE = {"tags": (torch.Tag.cudagraph_unsafe,)}
calls: list[torch.Size] = []


@torch.library.custom_op("parts_e2e::wave", mutates_args=(), **UNSAFE)
def wave(x: torch.Tensor) -> torch.Tensor:
    calls.append(x.shape)
    return x.sin() * 2


@torch.library.custom_op("parts_e2e::wave_backward", mutates_args=(), **UNSAFE)
def wave_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return grad * x.cos() * 2


@torch.library.custom_op("parts_e2e::halves", mutates_args=(), **UNSAFE)
def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[:, :4].clone(), x[:, 4:].clone()


@torch.library.custom_op("parts_e2e::triple", mutates_args=("x",), **UNSAFE)
def triple(x: torch.Tensor) -> None:
    x.mul_(3)


wave.register_fake(torch.empty_like)
wave_backward.register_fake(lambda grad, x: torch.empty_like(grad))
halves.register_fake(lambda x: (x.new_empty(x.shape[0], 4), x.new_empty(x.shape[0], 4)))
wave.register_autograd(
    lambda ctx, grad: wave_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.fixture(autouse=True)
def data_dependent():
    calls.clear()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        yield


STRUCTURES = {
    "middle": (lambda x, w: (wave((x @ w).relu()) @ w).softmax(-1), "[c.c]"),
    "two in a row": (lambda x, w: (wave(wave((x @ w).relu())) @ w).relu(), "[c.c]"),
    "two apart": (lambda x, w: (wave((wave((x @ w).relu()) @ w).relu()) @ w).relu(), "[c.c.c]"),
    "start": (lambda x, w: (wave(x) @ w).softmax(-1), "[.c]"),
    "end": (lambda x, w: wave((x @ w).softmax(-1)), "[c.]"),
    "branch": (lambda x, w: (wave(x @ w), (x @ w).relu() @ w), "[c.]"),
    "two branches": (lambda x, w: wave((x @ w).relu()) @ w + (wave(x - 1) @ w).relu(), "[c.c]"),
    "several results": (lambda x, w: [h.relu() @ w[:4] for h in halves((x @ w).relu())], "[c.c]"),
    "views": (lambda x, w: ((x @ w).t()[2:] + 1, wave((x @ w)[:, 2:6]).t() @ (x @ w).relu() @ w), "[c.c]"),
    "choice": (lambda x, w: torch.cond((x @ w).sum() > 0, torch.sin, torch.cos, (x @ w,)).relu() @ w, "[c.c]"),
    "next to nothing": (lambda x, w: (wave(wave((x @ w).relu()) + 1) @ w).relu(), "[c.c]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES)
def test_operators_around_one_that_cannot_be_captured(name, device, weight):
    function, structure = STRUCTURES[name]
    stats = check(function, lambda n: [torch.randn(n, 8, device=device), weight])
    assert kinds() == structure
    captured = structure.count("c")
    assert stats.graphs == captured * len(BUCKETS)
    assert stats.replays == captured * len(SIZES)
    assert stats.rows_padded > 0
    assert sum(stats.fallbacks.values()) == structure.count(".") * len(SIZES)


def test_an_uncapturable_part_runs_once_per_call_at_the_real_size(device, weight):
    compiled = torch.compile(STRUCTURES["middle"][0], backend="sharedgraph", options={"capture_sizes": BUCKETS})
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 8, device=device)
            torch._dynamo.mark_dynamic(x, 0)
            compiled(x, weight)
    assert calls == [(n, 8) for n in SIZES]


def test_the_operator_and_its_line_are_told(device, weight, caplog):
    def function(x, w):
        x, w = two(x), two(w)
        return two(wave(x @ w) @ w)  # the line

    check(function, lambda n: [torch.randn(n, 8, device=device), weight], sizes=(5, 9, 5))
    assert sg.stats().fallbacks == {"the operator is tagged unsafe for CUDA graphs": 3}
    for text in (sg.explain(), caplog.text):
        assert "part 2 of 3" in text
        assert "wave(x @ w) @ w)  # the line" in text
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"RefusalError.*wave.*the line"):
        check(function, lambda n: [torch.randn(n, 8, device=device), weight], strict=True)


# ------------------------------------------------------------------------------------------------ what depends on data


def test_a_number_read_from_a_tensor(device, weight):
    def function(x, k, w):
        most, total = k.max().item(), k.sum().item()
        return ((x @ w) * most + torch.full((1,), total, device=device)) @ w, most

    check(function, lambda n: [torch.randn(n, 8, device=device), torch.randint(0, 5, (n,), device=device), weight])
    assert kinds() == "[c.c]"


@pytest.mark.slow
def test_a_size_that_depends_on_data(device, weight):
    def function(x, w):
        y = (x @ w).relu()
        rows = y[:, 0].nonzero().squeeze(-1)
        return (y + y[rows].sum(0)).softmax(-1) @ w, rows, rows.shape[0]

    check(function, lambda n: [torch.randn(n, 8, device=device), weight])
    assert kinds() == "[c.c]"


def test_rows_picked_by_data_are_padded_and_captured_when_met_again(device, weight):
    """The number of rows is known in the middle of a call: what comes behind is one graph for all of a bucket."""

    def function(x, mask, w):
        rows = mask.nonzero().squeeze(-1)
        return (x[rows] @ w).relu() * 2, rows.shape[0]

    compiled = torch.compile(function, backend="sharedgraph", dynamic=True)
    w, x = weight, torch.randn(32, 8, device=device)
    none = [0] if device.type == "cpu" else []  # Inductor's own launcher on GPUs divides by zero there
    with torch.no_grad():
        for picked in (11, 14, 16, 9, 12, *none, 20):
            mask = torch.zeros(32, dtype=torch.bool, device=device)
            mask[torch.randperm(32, device=device)[:picked]] = True
            (got, count), (expected, _) = compiled(x, mask, w), function(x, mask, w)
            assert count == picked
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    stats = sg.stats()
    assert stats.fallbacks["a size that depends on data is met for the first time"] == 2 + len(none)  # 16 rows, 24
    assert stats.replays == 4


def test_a_check_of_a_size_that_depends_on_data_holds_for_its_bucket(device):
    """A bucket that the user's own check refuses would raise where eager does not."""

    def function(x, mask):
        rows = mask.nonzero().squeeze(-1)
        torch._check(rows.shape[0] % 3 == 0)
        return x[rows].relu() * 2 + 1

    compiled = torch.compile(function, backend="sharedgraph", dynamic=True)
    x = torch.randn(32, 8, device=device)
    with torch.no_grad():
        for picked in (9, 12, 9, 12, 15, 9):
            mask = torch.arange(32, device=device) < picked
            torch.testing.assert_close(compiled(x, mask), function(x, mask), rtol=1e-4, atol=1e-5)


def test_checks_of_one_program_are_not_those_of_another(device):
    """What reads the size is the same graph in both, and only the operators before it say what is checked."""

    def bounded_by(most):
        def function(x, table):
            y = x[x[:, 0] > 0]
            n = y.shape[0]
            torch._check(n <= most)
            return (y.relu() * 2 + table[:n]).exp()

        return function

    table = torch.randn(32, 4, device=device)
    with torch.no_grad():
        for most, picked in ((10, (3, 9, 9)), (30, (17, 25, 25, 9))):
            function = bounded_by(most)
            compiled = torch.compile(function, backend="sharedgraph", dynamic=True)
            for n in picked:
                x = torch.full((32, 4), -1.0, device=device)
                x[:n] = 1.0
                torch.testing.assert_close(compiled(x, table), function(x, table), rtol=1e-4, atol=1e-5)
            torch._dynamo.reset()


def test_rows_picked_by_data_are_written_back(device, weight):
    def function(x, w):
        mask = x[:, 0] > 0
        picked = x[mask].relu() * 2
        z = (x @ w).tanh()
        z[mask] = picked
        return z + 1, picked.exp()

    check(function, lambda n: [torch.randn(n, 8, device=device), weight])
    assert "c" in kinds()


def test_dims_of_which_nothing_is_known(device):
    """Marked as unbacked, and found equal while compiling: torch 2.11 then reads a size that a part does not get."""

    def function(x, y):
        return (x + 1) + (y + 1) + x @ y + wave(y + 1)

    compiled = torch.compile(function, backend="sharedgraph")
    with torch.no_grad():
        for n in (4, 4, 7, 7, 5):
            x, y = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
            torch._dynamo.decorators.mark_unbacked(x, 0)
            torch._dynamo.decorators.mark_unbacked(y, 1)
            torch.testing.assert_close(compiled(x, y), function(x, y), rtol=1e-4, atol=1e-4)


def test_a_value_with_a_size_that_depends_on_data_passes_an_uncapturable_operator(device, weight):
    def function(x, w):
        rows = (x @ w)[:, 0].nonzero()
        z = wave((x @ w).softmax(-1) + rows.shape[0])
        return x[rows.squeeze(-1)].sum(0) + (z @ w).sum(0), rows.shape[0]

    check(function, lambda n: [torch.randn(n, 8, device=device), weight])
    assert "." in kinds()


def test_a_view_of_a_size_that_depends_on_data(device, weight):
    def function(x, k, w):
        n = k.sum().item()
        torch._check(n >= 1)
        torch._check(n < 8)
        y = x @ w
        return (y.expand(n, *y.shape).sum(0) @ w).relu(), y[0].narrow(0, 0, n)

    check(function, lambda n: [torch.randn(n, 8, device=device), torch.tensor([1, 0, 2, 1], device=device), weight])
    assert kinds() == "[c.c]"


# ------------------------------------------------------------------------------------------------ effects


def test_arguments_and_buffers_are_changed_once(device, weight):
    def function(x, total, seen, w):
        y = wave(x @ w)
        before = x * 3
        total.add_(y.sum(0))
        seen += 1
        x.mul_(2)
        return (y @ w) + total, before, x

    total, seen = torch.zeros(8, device=device), torch.zeros((), dtype=torch.long, device=device)
    check(function, lambda n: [torch.randn(n, 8, device=device), total.clone(), seen.clone(), weight])
    assert kinds() == "[c.c]"


def test_a_view_that_is_read_after_the_operator_is_that_of_before_the_change(device, weight):
    def function(x, w):
        left, right = x[:, :4], x[:, 4:]
        y = wave(left @ w[:4])
        z = (y @ w[:, :4]) * left + right
        x.add_(1)
        return z

    check(function, lambda n: [torch.randn(n, 8, device=device), weight])
    assert kinds() == "[c.c]"


class Cached(nn.Module):
    """A key-value cache that is written at a position, read by an operator that can't be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(40, 8, 4))
        self.proj, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, slots, position):
        self.cache[slots, position] = self.proj(x)
        return self.out(wave(self.cache[slots].sum(1))).relu()


def test_a_cache(device):
    ours = Cached().to(device)
    eager = copy.deepcopy(ours)
    compiled = torch.compile(ours, backend="sharedgraph")
    with torch.no_grad():
        for step, n in enumerate(SIZES):
            slots = torch.randperm(40, device=device)[:n]
            arguments = torch.randn(n, 4, device=device), slots, torch.full((n,), step % 8, device=device)
            torch.testing.assert_close(compiled(*arguments), eager(*arguments), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.cache, eager.cache)
    assert kinds().endswith("[c.c]")
    assert sg.stats().replays == 2 * len(SIZES)


def test_an_operator_that_writes(device, weight):
    def function(x, w):
        y = two(x @ w)
        triple(y)
        triple(x)
        return (y @ w).relu() + x

    check(function, lambda n: [torch.randn(n, 8, device=device), weight])
    assert kinds() == "[c.c]"


def test_random_numbers_are_drawn_in_order(device, weight):
    """As eager draws them, which Inductor alone does not on a GPU."""

    def function(x, w):
        y = wave(torch.rand_like(x) + x) @ w
        z = wave(torch.rand_like(y) * y)
        return z * torch.rand_like(x)

    ours = torch.compile(function, backend="sharedgraph", options={"inductor": {"fallback_random": True}})
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 8, device=device)
            results = []
            for call in (function, ours):
                torch.manual_seed(n)
                results.append((call(x, weight), torch.rand(3, device=device)))
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert kinds().endswith("[c.c.c]")


# ------------------------------------------------------------------------------------------------ training


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        return self.last(self.norm(wave(self.first(x).relu())))


def train(model: Callable, parameters: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    grads = []
    for n in SIZES:
        x = torch.randn(n, 8, device=device, requires_grad=True)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), torch.randn(n, 4, device=device)).backward()
        grads += [x.grad, *(p.grad.clone() for p in parameters)]
        optimizer.step()
    return grads


@pytest.mark.slow
def test_training(device):
    ours = Trained().to(device)
    eager = copy.deepcopy(ours)
    grads = train(torch.compile(ours, backend="sharedgraph"), list(ours.parameters()), device)
    torch.testing.assert_close(grads, train(eager, list(eager.parameters()), device), rtol=1e-4, atol=1e-5)
    assert ours.steps == eager.steps == len(SIZES)
    assert kinds() == "[c.c]" * 4  # forward and backward, of a fixed and of any batch size
    statics = [i for r in sharedgraph.regions() for i in r.region.inputs if i.role == "static"]
    assert statics
    stats = sg.stats()
    if hasattr(torch.UntypedStorage, "_swap_data_ptr_"):  # torch 2.11 can't make room for what is kept here
        assert stats.replays == 4 * len(SIZES)
    assert stats.rows_padded > 0


@pytest.mark.slow
def test_a_second_compilation_finds_all_parts_in_the_cache(device):
    """Inductor's cache checks guards on sizes when it finds an entry: each part must be given what they need."""
    ours = Trained().to(device)
    results = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        fresh = copy.deepcopy(ours)
        results.append(train(torch.compile(fresh, backend="sharedgraph"), list(fresh.parameters()), device))
        assert kinds() == "[c.c]" * 4
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert counters["inductor"]["fxgraph_cache_hit"] >= 8
    torch.testing.assert_close(*results)


# ----------------------------------------------------------------------------------------------- outputs and failures


def test_outputs_of_every_kind(device, weight):
    def function(x, w):
        y = two(x @ w)
        z = wave(y)
        return x, None, 3, y, two(z @ w), y, x.shape[0] * 2, x.t(), y.view(-1, 2, 4)[:, 1], z[1:], w[0]

    check(function, lambda n: [torch.randn(n, 8, device=device), weight], sizes=(5, 7, 30, 3, 7))
    assert kinds() == "[c.c]"


def test_outputs_stay_as_they_were_returned(device, weight):
    function = STRUCTURES["branch"][0]
    compiled = torch.compile(function, backend="sharedgraph")
    kept = []
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 8, device=device)
            kept.append((compiled(x, weight), function(x, weight)))
    for ours, eager in kept:
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def test_after_a_reset(device, weight):
    function = STRUCTURES["middle"][0]
    compiled = torch.compile(function, backend="sharedgraph")
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 8, device=device)
            torch.testing.assert_close(compiled(x, weight), function(x, weight), rtol=1e-4, atol=1e-4)
            sg.reset()
        compiled(x, weight)
    assert kinds() == "[c.c]"


def test_a_part_that_does_not_compile(device, weight, monkeypatch, unexpected):
    """The region is compiled whole then, and runs uncaptured."""
    compile_region, compilations = torch_internals.compile_region, []

    def fail_once(gm, example_inputs, **kwargs):
        compilations.append(gm)
        if len(compilations) == 2:
            raise RuntimeError("no code for this part")
        return compile_region(gm, example_inputs, **kwargs)

    monkeypatch.setattr(torch_internals, "compile_region", fail_once)
    stats = check(STRUCTURES["middle"][0], lambda n: [torch.randn(n, 8, device=device), weight])
    assert len(compilations) == 3
    (told,) = unexpected
    unexpected.clear()
    assert "no code for this part" in told
    assert (stats.regions, stats.graphs) == (1, 0)
    assert stats.fallbacks == {"the operator is tagged unsafe for CUDA graphs": len(SIZES)}


@pytest.mark.parametrize("why", ["other strides", "nothing computed"])
def test_a_part_that_the_others_do_not_fit(why, device, weight, monkeypatch, caplog):
    """Its results would be read where they are not, or never be made: the region runs whole, and uncaptured."""
    compile_region, compilations = torch_internals.compile_region, []

    def count(gm, example_inputs, **kwargs):
        compilations.append(gm)
        return compile_region(gm, example_inputs, **kwargs)

    output_strides, is_compiled_graph = torch_internals.output_strides, torch_internals.is_compiled_graph
    monkeypatch.setattr(torch_internals, "compile_region", count)
    if why == "other strides":
        told = "Inductor lays out what a part reads with strides ('1', '8')"
        monkeypatch.setattr(
            torch_internals, "output_strides", lambda c: [("1", "8")] if len(compilations) == 1 else output_strides(c)
        )
    else:
        told = "a part computes nothing"
        monkeypatch.setattr(
            torch_internals, "is_compiled_graph", lambda c: len(compilations) != 2 and is_compiled_graph(c)
        )
    stats = check(STRUCTURES["middle"][0], lambda n: [torch.randn(n, 8, device=device), weight])
    assert f"is not captured in parts: {told}" in caplog.text
    assert (stats.regions, stats.graphs) == (1, 0)
    assert stats.fallbacks == {"the operator is tagged unsafe for CUDA graphs": len(SIZES)}
