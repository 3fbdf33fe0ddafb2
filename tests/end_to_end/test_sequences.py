"""Prompts of changing number and length: both dims are padded, and nothing is captured again once the buckets exist."""

from __future__ import annotations

import random

import pytest
import torch

import cudagraph_backend as sg
from tests.support.models import VOCABULARY, serve

pytestmark = pytest.mark.slow

LARGEST = (8, 31)


def batch(n: int, length: int, options: str, device: torch.device) -> dict[str, torch.Tensor | bool]:
    made: dict[str, torch.Tensor | bool] = {"input_ids": torch.randint(0, VOCABULARY, (n, length), device=device)}
    if "mask" in options:
        lengths = torch.randint(1, length + 1, (n, 1), device=device)
        made["attention_mask"] = (torch.arange(length, device=device) < lengths).long()
    if "decoder" in options:
        made["use_cache"] = "cache" in options
    return made


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", "mask"),
        ("bert", "mask eager"),
        ("gpt2", "decoder mask"),
        ("llama", "decoder"),
        ("llama", "decoder mask cache"),
    ],
)
def test_prompts_of_any_number_and_length_equal_eager(name, options, device):
    model = serve(name, device).model
    results = serve(name, device).results
    if "eager" in options:
        model.set_attn_implementation("eager")
    compiled = torch.compile(model, backend="sharedgraph")
    draw = random.Random(0)
    shapes = [LARGEST, *((draw.randint(2, LARGEST[0]), draw.randint(2, LARGEST[1])) for _ in range(10))]
    captures = []
    with torch.no_grad():
        for n, length in [
            (3, 5),
            *shapes,
            *reversed(shapes),
            *((min(n + 1, 8), length) for n, length in shapes if n % 2),
        ]:
            given = batch(n, length, options, device)
            got, expected = results(compiled(**given)), results(model(**given))
            assert len(got) == len(expected) > 0
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            del got, a  # a live output would take a second range, with graphs of its own, on torch 2.11
            captures.append(sg.stats().captures)
    stats = sg.stats()
    assert captures[-1] == captures[len(shapes)]  # the first pass over the shapes made all buckets
    assert stats.captures <= len(set(shapes))
    assert (
        stats.regions <= 2
    )  # Dynamo takes the first call's sizes as fixed, unless it has seen the model's code before
    assert stats.fallbacks == {}
    assert "not padded" not in sg.explain()
