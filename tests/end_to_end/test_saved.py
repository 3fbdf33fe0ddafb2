"""What a forward saves keeps the strides of its bucket: a backward reads it there, and nobody else is misled by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import cudagraph_backend as sg
from cudagraph_backend import sharedgraph
from cudagraph_backend.compile import region_compile
from cudagraph_backend.runtime import compacting, finder
from tests.support.regions import compiled

LONGER = [(3, 5), (4, 7), (6, 9), (2, 11), (8, 16)]
SIZES = [*LONGER, (3, 1), (1, 6)]


@torch.library.custom_op("saved_e2e::cube", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def cube(x: Tensor, grad: Tensor) -> Tensor:
    assert x.is_contiguous()  # as code may that was not made for strides
    return x.square().mul(grad).contiguous()


@cube.register_fake
def _(x: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


class Cubed(torch.autograd.Function):
    """Has a backward that no graph can hold."""

    @staticmethod
    def forward(ctx, x):
        h = x.exp().contiguous()
        ctx.save_for_backward(h)
        return h.sin()

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        return cube(h, grad.contiguous()) * h


def layer(x: Tensor, w: Tensor) -> Tensor:
    h = (x @ w).tanh()
    return (h.softmax(-1) @ w).relu().sum(-1)


def transposed(x: Tensor, w: Tensor) -> Tensor:
    return ((x @ w).transpose(1, 2).softmax(1) @ x.cos()).sum((1, 2))


def shifted(x: Tensor, w: Tensor) -> Tensor:
    h = (x @ w).tanh()
    return (F.pad(h[:, :-1], (0, 0, 1, 0)) @ w).exp() * h


def two_parts(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    first, second = (x @ torch.cat([w, w.sin()], 1)).split(8, -1)
    return first.softmax(-1) @ w, second.square() @ w


def views_of_a_result(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = (x @ w).exp()
    return h, h[:, :, 2:], h.view(h.shape)


def views_of_what_is_inside(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = (x @ w).exp()
    return h[..., 1:], h.transpose(0, 1)


def in_parts(x: Tensor, w: Tensor) -> Tensor:
    return (Cubed.apply((x @ w) / 8) @ w).tanh()


FUNCTIONS = [layer, transposed, shifted, two_parts, views_of_a_result, views_of_what_is_inside, in_parts]


def arguments(b: int, s: int, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(10 * b + s)
    x, w = torch.randn(b, s, 8, device=device), torch.randn(8, 8, device=device) / 4
    return x.requires_grad_(), w.requires_grad_()


def run(call: Callable[..., object], given: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
    results = call(*given)
    results = list(results) if isinstance(results, tuple) else [results]
    return [result.detach() for result in results], sum(result.sin().sum() for result in results)


def outcome(call: Callable[..., object], given: tuple[Tensor, ...]) -> list[Tensor]:
    results, loss = run(call, given)
    return [*results, *torch.autograd.grad(loss, given)]


def check(
    function: Callable[..., object],
    device: str,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    sizes: Iterable[tuple[int, int]] = LONGER * 2,
    **options: object,
) -> None:
    """Compare values and gradients; the context is around what we do alone."""
    call = torch.compile(function, backend="sharedgraph", dynamic=True, options=options)
    for b, s in sizes:
        given = arguments(b, s, device)
        with around():
            results, loss = run(call, given)
            got = [*results, *torch.autograd.grad(loss, given)]
        expected = outcome(function, given)
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-4)
        assert [result.stride() for result in results] == [result.stride() for result in expected[: len(results)]]


@pytest.fixture
def compacted(monkeypatch) -> list[torch.Size]:
    """The sizes of what a backward was given with the strides of a bucket, and had to be copied for it."""
    sizes: list[torch.Size] = []
    compact = finder.compact

    def noted(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
        sizes.append(tensor.shape)
        return compact(tensor, stride)

    monkeypatch.setattr(finder, "compact", noted)
    monkeypatch.setattr(compacting, "compact", noted)
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_and_gradients(function, device):
    check(function, device)
    assert sg.stats().captures > 0


@pytest.mark.slow
def test_sizes_of_one(device):
    check(transposed, device, sizes=SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("function", [layer, transposed, two_parts])
def test_it_is_read_where_it_lies(function, device, compacted):
    check(function, device)
    forward, backward = sharedgraph.regions()
    assert not any(dim.refusal for dim in (*forward.region.dims, *backward.region.dims))
    saved = sum(getattr(output, "visible", True) is False for output in forward.region.outputs)
    assert saved > 0
    assert backward.counters.read_in_place >= saved * backward.counters.replays
    assert compacted == []


@pytest.mark.slow
def test_a_backward_chooses_the_bucket_of_its_forward(device, compacted):
    """A bucket that exists serves a forward at little more cost, where its backward would have one of its own."""

    def wide(x: Tensor, w: Tensor, large: Tensor) -> Tensor:
        return layer(x, w) + large.mean(1, keepdim=True)

    call = torch.compile(wide, backend="sharedgraph", dynamic=True)
    for b, s in [(7, 32), (7, 12), (6, 12), (7, 32)]:
        given, large = arguments(b, s, device), torch.zeros(b, 5000, device=device)
        got = outcome(lambda x, w, large=large: call(x, w, large), given)
        torch.testing.assert_close(got, outcome(layer, given), rtol=2e-4, atol=1e-4)
    forward, backward = (replayer.state.planner.buckets for replayer in sharedgraph.regions())
    assert len(forward) == len(backward) == 1
    assert compacted == []


@pytest.mark.slow
def test_a_backward_that_is_not_padded_gets_copies(device, compacted, monkeypatch):
    analyse = region_compile.analyse

    def analysed(gm, examples, kind, static, options, *rest):
        if kind == "backward":
            options = replace(options, pad="off")
        return analyse(gm, examples, kind, static, options, *rest)

    monkeypatch.setattr(region_compile, "analyse", analysed)
    check(layer, device)
    assert compacted


@pytest.mark.slow
def test_columns_of_a_result_are_not_padded_in_it(device):
    """They end where it ends, and its next rows lie between theirs."""
    double = torch.compile(lambda x: x * 2 + 1, backend="sharedgraph", dynamic=True)
    exp = torch.compile(lambda x: x.exp(), backend="sharedgraph", dynamic=True)
    with torch.no_grad():
        for b in (16, 5, 6, 16, 6, 7, 6):
            x = torch.randn(b, 32, dtype=torch.float64, device=device)
            y = double(x)
            torch.testing.assert_close(exp(y[:, 10:]), (x * 2 + 1)[:, 10:].exp())
            torch.testing.assert_close(y, x * 2 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"pad": "probe", "verify": "capture"}, {"verify": "capture"}])
@pytest.mark.parametrize("function", [layer, transposed])
def test_the_probe_of_a_backward_runs_it_at_the_exact_size(function, options, device):
    check(function, device, sizes=LONGER, **options)


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["before", "after"])
def test_a_backward_that_is_not_captured_gets_copies(fails, device, compacted, monkeypatch, unexpected):
    found = "analyse" if fails == "before" else "complete"
    call = getattr(region_compile, found)

    def failing(*args):
        if "backward" in (args[0].kind if fails == "after" else args[2]):
            raise KeyError("a mistake")
        return call(*args)

    monkeypatch.setattr(region_compile, found, failing)
    check(layer, device)
    assert sg.stats().captures > 0
    assert compacted
    unexpected.clear()


HOOKS = {
    "on the CPU": save_on_cpu,
    "as they are": lambda: saved_tensors_hooks(lambda x: x, lambda x: x),
    "detached": lambda: saved_tensors_hooks(lambda x: x.detach(), lambda x: x.detach()),
    "cloned": lambda: saved_tensors_hooks(torch.clone, lambda x: x),
    "cloned later": lambda: saved_tensors_hooks(lambda x: x, torch.clone),
    "in other strides": lambda: saved_tensors_hooks(
        lambda x: x, lambda x: x.clone().mT.contiguous().mT if x.ndim > 1 else x
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("function", [layer, transposed])
@pytest.mark.parametrize("hooks", HOOKS)
def test_hooks_may_change_what_is_saved(function, hooks, device):
    check(function, device, HOOKS[hooks])


@pytest.mark.slow
def test_hooks_now_and_then(device, monkeypatch):
    """The same graphs serve what lies in the pool, and what does not, in whatever strides."""
    find = finder.Finder.where

    def checked(self, plan, args):
        where = find(self, plan, args)
        for reading, found in zip(plan.readings, where, strict=True):
            assert found is not None or args[reading.index].stride() == reading.real[1]
        return where

    monkeypatch.setattr(finder.Finder, "where", checked)
    call = compiled(layer, capture_sizes=[8, 16])
    ways = [nullcontext, *HOOKS.values()]
    for step in range(8 * len(ways)):
        given = arguments(*LONGER[step % 2], device)
        with ways[step // 2 % len(ways)]():
            got = outcome(call, given)
        torch.testing.assert_close(got, outcome(layer, given), rtol=2e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_several_forwards_before_their_backwards(order, device):
    call = compiled(layer)
    for _ in range(2):
        for first in range(len(LONGER) - 2):
            givens = [arguments(*sizes, device) for sizes in LONGER[first : first + 3]]
            losses = [run(call, given)[1] for given in givens]
            expected = [outcome(layer, given)[1:] for given in givens]
            for i in order:
                got = torch.autograd.grad(losses[i], givens[i])
                torch.testing.assert_close(list(got), expected[i], rtol=2e-4, atol=1e-4)


@pytest.mark.slow
@torch._functorch.config.patch(donated_buffer=False)  # else Inductor refuses
def test_a_second_backward(device):
    call = compiled(layer)
    for b, s in SIZES * 2:
        given = arguments(b, s, device)
        results, loss = run(call, given)
        once = torch.autograd.grad(loss, given, retain_graph=True)
        again = torch.autograd.grad(loss, given)
        for got in (once, again):
            torch.testing.assert_close([*results, *got], outcome(layer, given), rtol=2e-4, atol=1e-4)


@pytest.mark.slow
def test_a_second_backward_after_one_that_was_the_last(device):
    """Code that overwrites what is saved is in Inductor's cache then."""
    with fresh_cache():
        given = arguments(3, 5, device)
        outcome(compiled(layer), given)
        torch._dynamo.reset()
        results, loss = run(compiled(layer), given)
        once = torch.autograd.grad(loss, given, retain_graph=True)
        again = torch.autograd.grad(loss, given)
        for got in (once, again):
            torch.testing.assert_close([*results, *got], outcome(layer, given), rtol=2e-4, atol=1e-4)


@pytest.mark.slow
def test_kept_forwards(device):
    """Calls get copies of what is kept for long: those of what is saved have the strides of a bucket, too."""
    call, kept = compiled(layer), []
    for step, (b, s) in enumerate(SIZES * 4):
        given = arguments(b, s, device)
        kept.append((given, run(call, given)[1]))
        if len(kept) > 9 or step % 3 == 2:
            given, loss = kept.pop(0)
            expected = outcome(layer, given)[1:]
            torch.testing.assert_close(list(torch.autograd.grad(loss, given)), expected, rtol=2e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("function", [layer, shifted])
@pytest.mark.parametrize("setting", ["config", "around the backward"])
def test_compiled_autograd(setting, function, device):
    from torch._dynamo import compiled_autograd

    def compiler(gm):
        return torch.compile(gm, backend="sharedgraph", dynamic=True)

    call = torch.compile(function, backend="sharedgraph", dynamic=True)
    for b, s in LONGER:
        given = arguments(b, s, device)
        expected = outcome(function, given)[1:]
        with torch._dynamo.config.patch(compiled_autograd=setting == "config"):
            loss = run(call, given)[1]
            around = nullcontext() if setting == "config" else compiled_autograd._enable(compiler)
            with around:
                loss.backward()
        torch.testing.assert_close([x.grad for x in given], expected, rtol=2e-4, atol=1e-4)


@pytest.mark.slow
def test_what_autograd_shows_of_it(device):
    """The tensors that a node of autograd's graph has saved are those that eager code would save."""
    call = compiled(layer)
    for b, s in SIZES:
        given = arguments(b, s, device)
        result = call(*given)
        shapes = {tuple(saved.shape) for saved in result.grad_fn.saved_tensors}
        expected = (given[0] @ given[1]).tanh()
        assert tuple(expected.shape) in shapes
        for saved in result.grad_fn.saved_tensors:
            assert saved.isfinite().all()
