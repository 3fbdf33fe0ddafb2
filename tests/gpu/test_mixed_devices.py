"""Regions that compute on the CPU, too: captured in the parts around that."""

from __future__ import annotations

import pytest
import torch
import transformers

import cudagraph_backend as sg
from tests.support.regions import check, kinds


def test_an_operator_on_the_cpu(device):
    weight = torch.randn(8, 8, device=device)

    def function(x, w):
        y = (x @ w).relu()
        on_cpu = y.cpu().sin() + 1
        return (on_cpu.to(device) @ w).relu(), y + 1, on_cpu

    stats = check(function, lambda n: [torch.randn(n, 8, device=device), weight])
    assert kinds() == "[c.c]"
    assert stats.rows_padded > 0
    (reason,) = stats.fallbacks
    assert "mixes devices" in reason


def test_an_argument_on_the_cpu(device):
    weight = torch.randn(8, 8, device=device)
    check(
        lambda x, b, w: ((x + b.to(device)) @ w).relu(),
        lambda n: [torch.randn(n, 8, device=device), torch.randn(n, 8), weight],
    )
    assert kinds() == "[.c]"


def test_scalars_on_the_cpu_are_moved_only_where_operators_on_the_gpu_read_them(device):
    weight = torch.randn(8, 8, device=device)

    def function(x, a, b, w):
        scale = a.sqrt().float() + 1
        return torch.where(x > 0, x * scale, torch.tensor(0.5)) @ w, b + 1

    values = torch.tensor(4.0, dtype=torch.float64), torch.tensor(3.0)
    check(function, lambda n: [torch.randn(n, 8, device=device), *values, weight])
    assert kinds() == "[c.]"


def test_a_model_with_a_scalar_on_the_cpu_is_captured_whole(device):
    """With ``dynamic=True`` Dynamo makes an argument of a number that the model's code reads."""
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().to(device)
    compiled = torch.compile(model, backend="sharedgraph", dynamic=True)
    with torch.no_grad():
        for n in (5, 7, 3, 7):
            ids = torch.randint(0, 100, (n, 8), device=device)
            logits = compiled(ids, use_cache=False).logits
            torch.testing.assert_close(logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert sg.stats().fallbacks == {}
    assert sg.stats().replays == 4


# What is on the GPU is captured around what is not, and values are those of eager, those written included.
AROUND_THE_CPU = {
    "two scalars": (lambda x, a, b, rows: (x + a, x * b), "whole"),
    "one that the cpu reads, too": (lambda x, a, b, rows: ((x * a).sin() + a, a + b), "[.c]"),
    "one that is returned": (lambda x, a, b, rows: ((x * a).sin() + a, a.view(1)), None),
    "one that is written": (lambda x, a, b, rows: ((x * a).sin(), a.add_(1), (x + a) * 2)[::2], "[.c]"),
    "one that is written on the gpu": (lambda x, a, b, rows: ((x * 2).sin(), a.copy_((x * 2).sum()))[0], "[c.]"),
    "one made of others": (lambda x, a, b, rows: ((x * (a + b)).cos() * 2, a + b), "[.c]"),
    "a device each": (lambda x, a, b, rows: (x + 1, rows + 2), "[c.]"),
    "there and back": (lambda x, a, b, rows: a.to(x.device).cpu(), None),
    "a view goes to the cpu": (lambda x, a, b, rows: (x + 1).view(torch.int32).cpu().to(x.device), "[c.]"),
    "rows of both": (lambda x, a, b, rows: ((x * 2).relu() + rows[: x.shape[0]].to(x.device), rows.sum(0)), None),
}


@pytest.mark.parametrize("name", AROUND_THE_CPU)
@pytest.mark.parametrize("dynamic", [False, True])
def test_around_the_cpu(name, dynamic, device):
    function, structure = AROUND_THE_CPU[name]
    compiled = torch.compile(function, backend="sharedgraph", dynamic=dynamic)
    with torch.no_grad():
        for number, n in enumerate((8, 8, 8) if not dynamic else (8, 5, 8, 11, 5)):
            ours = [
                torch.randn(n, 4, device=device),
                torch.tensor(1.5 + number),
                torch.tensor(-2.0),
                torch.randn(n + 3, 4),
            ]
            eager = [argument.clone() for argument in ours]
            torch.testing.assert_close(compiled(*ours), function(*eager))
            torch.testing.assert_close(ours, eager)
    stats = sg.stats()
    assert stats.captures > 0
    assert stats.replays == (5 if dynamic else 3)
    if structure == "whole":
        assert stats.fallbacks == {}
    elif structure is not None:
        assert kinds() == structure
