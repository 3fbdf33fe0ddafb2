"""Real architectures, served with changing batch sizes, give eager's values, padded and without re-recording."""

from __future__ import annotations

import pytest
import torch

import cudagraph_backend as sg
from tests.support.models import NAMES, random_sizes, serve

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", NAMES)
def test_100_batches_of_random_size_equal_eager(name, device):
    served = serve(name, device)
    compiled = torch.compile(served.model, backend="sharedgraph")
    with torch.no_grad():
        for n in random_sizes(100, 64):
            batch = served.batch(n)
            got, expected = served.results(compiled(**batch)), served.results(served.model(**batch))
            assert len(got) == len(expected) > 0
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            del got, a  # a live output would have to be moved, or take a second range
    stats = sg.stats()
    assert stats.replays == 100
    assert stats.rows_padded > 0
    assert stats.fallbacks == {}
    assert "not padded" not in sg.explain()
    assert stats.graphs <= len(auto_sizes(64)) + 1  # + 1: the region that Dynamo makes for size 1
    assert stats.captures == stats.graphs  # growing sizes capture nothing anew
    granularity = 2 << 20 if device.type == "cuda" else 0  # what CUDA maps memory in
    outputs = stats.output_pool_bytes - stats.staging_bytes  # the rest of the pool
    assert outputs <= max(stats.sum_of_buckets_bytes / 4, granularity)


def auto_sizes(largest: int) -> tuple[int, ...]:
    return 1, 2, 4, *range(8, largest + 1, 8)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_dims_marked_dynamic_one_by_one_are_padded_together(name, device):
    """mark_dynamic gives ids and mask a symbol each; the batch is one dim all the same."""
    served = serve(name, device)
    compiled = torch.compile(served.model, backend="sharedgraph")
    with torch.no_grad():
        for n in (5, 11, 30, 64, 2, 33):
            batch = served.batch(n)
            for tensor in batch.values():
                torch._dynamo.mark_dynamic(tensor, 0, min=2, max=64)
            got, expected = served.results(compiled(**batch)), served.results(served.model(**batch))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert sg.stats().regions == 1
    assert sg.stats().rows_padded > 0
    assert "not padded" not in sg.explain()
