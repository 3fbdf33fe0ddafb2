"""Batch and length that both change: joined dims, attention over a length, fine-tuning steps; graphs are buckets."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn

import cudagraph_backend as sg
from cudagraph_backend import sharedgraph
from tests.support import models
from tests.support.regions import compiled

SIZES = [(3, 5), (4, 7), (6, 9), (2, 11), (5, 3), (7, 12), (3, 8), (8, 16), (2, 4)]


def tokens(below: int, *shape: int, device: str) -> Tensor:
    return torch.randint(0, below, shape, device=device)


def check(function: Callable[..., object], make: Callable[[int, int], list[Tensor]], trains: bool) -> None:
    """Compare values, and gradients of all floats, at many sizes; then again, which captures nothing more."""
    call = compiled(function)

    def outcome(run: Callable[..., object], arguments: list[Tensor]) -> list[Tensor]:
        given = [a.detach().clone().requires_grad_(trains and a.is_floating_point()) for a in arguments]
        results = run(*given)
        results = list(results) if isinstance(results, tuple) else [results]
        if trains:
            loss = sum(result.sin().sum() for result in results)
            results += torch.autograd.grad(loss, [a for a in given if a.requires_grad], allow_unused=True)
        return [result.detach() for result in results]

    for _ in range(3):
        before = sg.stats().captures
        for sizes in SIZES:
            torch.manual_seed(sum(sizes))
            arguments = make(*sizes)
            wanted, got = outcome(function, arguments), outcome(call, arguments)
            torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-5)
            if function in JOINED.values():
                assert got[0].stride() == wanted[0].stride()
            del got  # what is kept makes the next call write elsewhere, with a graph of its own
    assert sg.stats().captures == before  # in the last pass
    assert sg.stats().fallbacks == {}
    assert is_padded_throughout(), sg.explain()
    # Inductor bounds the sizes of what it compiles, which is no reason to provide memory for such sizes.
    assert all(dim.upper is None for replayer in sharedgraph.regions() for dim in replayer.region.dims)


def is_padded_throughout() -> bool:
    return any(replayer.region.dims for replayer in sharedgraph.regions()) and "one graph per size" not in sg.explain()


def weight(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, 40, device=x.device).view(8, 5)


JOINED = {
    "joined result": lambda x, i: x.reshape(-1, 8) @ weight(x),
    "joined result and another": lambda x, i: (x.reshape(-1, 8).relu(), x.exp()),
    "joined and apart again": lambda x, i: (x.reshape(-1, 8) @ weight(x)).view(*x.shape[:2], 5).cumsum(1),
    "three dims in one": lambda x, i: x.flatten().exp(),
    "a mean over both": lambda x, i: x.reshape(-1, 8).mean(0) + x.mean(),
    "cross entropy": lambda x, i: F.cross_entropy(x.view(-1, 8), i.view(-1)),
    "cross entropy, some ignored": lambda x, i: F.cross_entropy(x.view(-1, 8), i.view(-1), ignore_index=3),
    "shifted by one": lambda x, i: F.cross_entropy(x[:, :-1].reshape(-1, 8), i[:, 1:].reshape(-1)),
    "padded and shifted": lambda x, i: F.cross_entropy(x.view(-1, 8), F.pad(i, (0, 1), value=-100)[:, 1:].reshape(-1)),
    "last token": lambda x, i: x[torch.arange(x.shape[0], device=x.device), (x[..., 0] > 0).sum(1) - 1] * 2,
    "masked mean": lambda x, i: (x * (i > 2)[..., None]).sum(1) / (i > 2).sum(1, keepdim=True).clamp(min=1),
    "a part written": lambda x, i: torch.slice_scatter(x.exp(), x[:, 1:].cos(), 1, 0, -1),
}


@pytest.mark.slow
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", JOINED)
def test_joined_dims(name, trains, device):
    check(
        JOINED[name], lambda b, s: [torch.randn(b, s, 8, device=device), tokens(8, b, s, device=device)], trains=trains
    )


def attention(**options: object) -> Callable[[Tensor], Tensor]:
    return lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos(), **options)


ATTENTION = {
    "no mask": attention(),
    "no mask, scaled": attention(scale=0.3),
    "causal": attention(is_causal=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_over_a_length(name, trains):
    """On the host: on a GPU what a training forward saves differs by kernel (see the GPU tests)."""
    check(ATTENTION[name], lambda b, s: [torch.randn(b, 2, s, 8)], trains=trains)


@pytest.mark.slow
@pytest.mark.parametrize("trains", [False, True])
def test_attention_over_two_lengths_with_shared_keys(trains):
    check(
        lambda q, k: F.scaled_dot_product_attention(q, k.sin(), k.cos(), enable_gqa=True),
        lambda b, s: [torch.randn(b, 4, s, 8), torch.randn(b, 2, 2 * b + s, 8)],
        trains=trains,
    )


@pytest.mark.slow
@pytest.mark.host_only(
    "on a GPU (torch 2.11) only the first size was compiled: later ones ran as they were, and were right"
)
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fast_path_of_an_encoder(norm_first, device):
    torch.manual_seed(0)
    kind = "gelu" if norm_first else "relu"
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first, activation=kind)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().to(device).requires_grad_(False)
    check(encoder, lambda b, s: [torch.randn(b, s, 16, device=device)], trains=False)


@pytest.mark.slow
def test_the_fast_path_of_attention(device):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 2, batch_first=True).eval().to(device).requires_grad_(False)
    check(lambda x: module(x, x, x, need_weights=False)[0], lambda b, s: [torch.randn(b, s, 16, device=device)], False)


@pytest.mark.slow
def test_equal_products_of_other_factors_are_another_graph(device):
    """``[4, 6]`` logits and ``[8, 3]`` labels are as many rows; what is compiled for equal factors is not for them."""

    def loss(x, i):
        return F.cross_entropy(x.reshape(-1, 8), i.reshape(-1), reduction="none").exp()

    call = compiled(loss)
    for shapes in [
        ((3, 5), (3, 5)),
        ((4, 6), (4, 6)),
        ((5, 7), (5, 7)),
        ((4, 6), (8, 3)),
        ((6, 4), (2, 12)),
        ((7, 9), (7, 9)),
    ]:
        x, i = torch.randn(*shapes[0], 8, device=device), tokens(8, *shapes[1], device=device)
        torch.testing.assert_close(call(x, i), loss(x, i))
    assert re.search(r"buckets: 4×8, 8×\d+", sg.explain()), sg.explain()


@pytest.mark.slow
def test_sizes_marked_as_dynamic_may_be_unified(device):
    def loss(x, i):
        return F.cross_entropy(x.reshape(-1, 8), i.reshape(-1))

    call = compiled(loss)
    for sizes in [(3, 5), (4, 6), (5, 7)]:
        x, i = torch.randn(*sizes, 8, device=device), tokens(8, *sizes, device=device)
        for one in (x, i):
            torch._dynamo.mark_dynamic(one, 0)
            torch._dynamo.mark_dynamic(one, 1)
        torch.testing.assert_close(call(x, i), loss(x, i))
    assert sg.stats().regions == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fine_tuning_a_language_model(kind, device):
    """From token ids, batch and length changing: loss and every gradient as eager's, and captures come to an end."""
    model, eager = models.build(kind, device), models.build(kind, device)
    call = torch.compile(model, backend="sharedgraph", options={"driver": "host"} if device == "cpu" else {})

    def gradients(run, module, ids, labels):
        module.zero_grad()
        loss = run(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in module.parameters())]

    for _ in range(3):
        before = sg.stats().captures
        for batch, length in SIZES:
            ids = tokens(models.VOCABULARY, batch, length, device=device)
            labels = ids.masked_fill(ids < 5, -100)
            wanted, got = gradients(eager, eager, ids, labels), gradients(call, model, ids, labels)
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    assert sg.stats().captures == before  # in the last pass
    dynamic = [replayer.region for replayer in sharedgraph.regions() if replayer.region.dims]
    assert {region.kind for region in dynamic} == {"forward", "backward"}
    assert is_padded_throughout(), sg.explain()


@pytest.mark.slow
def test_a_partitioner_of_the_users_is_called():
    class Partitioner(CustomPartitionerFn):
        calls = 0

        def __call__(self, gm, joint_inputs, **kwargs):
            Partitioner.calls += 1
            return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

        def uuid(self):
            return "one of the user's"

    with torch._inductor.config.patch(custom_partitioner_fn=Partitioner()):
        check(JOINED["joined result"], lambda b, s: [torch.randn(b, s, 8), tokens(8, b, s, device="cpu")], trains=True)
    assert Partitioner.calls == 2


@pytest.mark.slow
def test_the_strides_of_an_argument_may_hold_the_length(device):
    """As the first tokens of a sequence, which a forward saves as a view."""
    weight = torch.linspace(-1, 1, 64, device=device).view(8, 8)
    check(
        lambda x, i: ((x @ weight).sin()[:, 0] @ weight).cos() @ weight,
        lambda b, s: [torch.randn(b, s, 8, device=device), tokens(8, b, s, device=device)],
        trains=True,
    )


@pytest.mark.slow
def test_a_joined_result_may_be_changed_in_place(device):
    def function(x):
        return (x.reshape(-1, 8) @ weight(x)).sin()

    call = compiled(function)
    for sizes in SIZES:
        x = torch.randn(*sizes, 8, device=device)
        given = [x.clone().requires_grad_() for _ in range(2)]
        results = [run(one) for run, one in zip((call, function), given, strict=True)]
        for result in results:
            result.mul_(2)
            result.cos().sum().backward()
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(given[0].grad, given[1].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES[1:])
def test_a_result_that_was_saved_may_not_be_changed_in_place(sizes, device):
    """Where the bucket is the exact size, too, where what is saved and what is handed out share memory."""
    call = compiled(lambda x: (x.reshape(-1, 8) @ weight(x)).exp())
    for each in (SIZES[0], (6, 7), sizes):
        x = torch.randn(*each, 8, device=device, requires_grad=True)
        result = call(x)
        loss = result.sum()
        with torch.no_grad():
            result.detach().mul_(100)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.slow
def test_sizes_with_bounds_are_not_unified(device):
    def loss(x, i):
        return F.cross_entropy(x.reshape(-1, 8), i.reshape(-1))

    call = compiled(loss)
    for sizes in [(3, 5), (4, 6), (5, 7)]:
        x, i = torch.randn(*sizes, 8, device=device), tokens(8, *sizes, device=device)
        for one, batch, length in ((x, 64, 128), (i, 32, 256)):
            torch._dynamo.mark_dynamic(one, 0, min=2, max=batch)
            torch._dynamo.mark_dynamic(one, 1, min=2, max=length)
        torch.testing.assert_close(call(x, i), loss(x, i))


@pytest.mark.slow
def test_a_joined_dim_may_hold_a_halved_length(device):
    """The batch is padded, for gradients of results as well; the length is not."""

    def function(x):
        return (x[:, ::2] @ weight(x)).reshape(-1, 5)

    call = compiled(function)
    for sizes in [(3, 5), (4, 8), (5, 9), (6, 7), (2, 11), (7, 12)]:
        x = torch.randn(*sizes, 8, device=device)
        torch.testing.assert_close(call(x), function(x))
        given = [x.clone().requires_grad_() for _ in range(2)]
        for run, one in zip((call, function), given, strict=True):
            run(one).sin().sum().backward()
        torch.testing.assert_close(given[0].grad, given[1].grad)
    batch = [dim for replayer in sharedgraph.regions() for dim in replayer.region.dims if dim.refusal is None]
    assert {replayer.region.kind for replayer in sharedgraph.regions() if replayer.region.dims} >= {
        "forward",
        "backward",
    }
    assert len(batch) >= 3, sg.explain()
