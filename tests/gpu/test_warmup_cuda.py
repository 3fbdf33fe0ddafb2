"""What only a GPU shows of the warm-up."""

from __future__ import annotations

import torch
from torch import nn

import cudagraph_backend as sg


def test_smaller_sizes_reuse_pool_and_scratch(device):
    model = nn.Sequential(nn.Linear(256, 4096), nn.GELU(), nn.Linear(4096, 256)).to(device)
    x = torch.randn(3, 256, device=device)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=512)
    with torch.no_grad():
        warmed = sg.warmup(torch.compile(model, backend="sharedgraph"), (x,))
    assert warmed[0].size == 512
    assert len(warmed) > 40
    assert warmed[0].memory_pool_bytes >= 512 * 4096 * 4
    # The allocator keeps what is smaller than 1 MiB in segments of 2 MiB of their own; sizes up to 64 are.
    assert warmed[-1].memory_pool_bytes - warmed[0].memory_pool_bytes <= 2 << 20
    assert {w.output_pool_bytes for w in warmed} == {warmed[0].output_pool_bytes}
    executables = [w.executable_bytes for w in warmed]
    assert executables == sorted(executables)


def test_the_gpus_random_state_is_put_back(device):
    served = torch.compile(lambda x: nn.functional.dropout(x, 0.5), backend="sharedgraph")
    x = torch.randn(3, 4096, device=device)
    state = torch.cuda.get_rng_state(device)
    sg.warmup(served, (x,), [2, 8])
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    y = torch.ones(8, 4096, device=device)
    torch.cuda.manual_seed(7)
    first = served(y).clone()
    second = served(y).clone()
    torch.cuda.manual_seed(7)
    assert not torch.equal(first, second)
    assert torch.equal(served(y), first)
    assert sg.stats().captures == 2
