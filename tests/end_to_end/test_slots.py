"""Caches that are arguments of a fixed size, written at the slots of a padded batch; and what is written by masks."""

from __future__ import annotations

import re

import pytest
import torch

import cudagraph_backend as sg
from tests.support.regions import check

SLOTS = 70


def wide(slots):
    return slots[:, None].expand(-1, 4)


def as_int8(x):
    return (x * 20).round().clamp(-128, 127).to(torch.int8)


def attend(cache, slots, x):
    cache[0, slots], cache[1, slots] = x, x.cos()
    return (x @ cache[0].t()).softmax(-1) @ cache[1]


def several(cache, slots, x):
    """Two tokens of each row."""
    cache[torch.stack([slots, SLOTS - 1 - slots], 1).view(-1)] = torch.stack([x, x], 1).view(-1, 4)


def own_position(cache, slots, x):
    """The first rows of a cache for the largest batch, each at its own position."""
    cache[: x.shape[0]].scatter_(1, (slots % 4)[:, None, None].expand(-1, 1, 4), x[:, None])


def statement(text):
    """Return a function of the cache, the slots and the rows that executes ``text``."""
    scope = {"torch": torch, "wide": wide, "as_int8": as_int8}
    exec(f"def step(cache, slots, x):\n    {text}\n    return x * 2", scope)
    return scope["step"]


WRITES = {
    "set": (statement("cache[slots] = x * 2"), (SLOTS, 4)),
    "set, slots counted from the end": (statement("cache[slots - 70] = x"), (SLOTS, 4)),
    "set by what rows hold together": (statement("cache[slots] = x.cumsum(0)"), (SLOTS, 4)),
    "set at slots that are moved": (statement("cache[slots.flip(0)] = x"), (SLOTS, 4)),
    "set to a number": (statement("cache[slots] = 1.0"), (SLOTS, 4)),
    "put": (statement("cache.index_put_((slots,), x * 2)"), (SLOTS, 4)),
    "put, adding": (statement("cache.index_put_((slots,), x * 2, accumulate=True)"), (SLOTS, 4)),
    "copied": (statement("cache.index_copy_(0, slots, x * 2)"), (SLOTS, 4)),
    "added": (statement("cache.index_add_(0, slots, x)"), (SLOTS, 4)),
    "greatest": (statement("cache.index_reduce_(0, slots, x.cumsum(0), 'amax')"), (SLOTS, 4)),
    "scattered": (statement("cache.scatter_(0, wide(slots), x)"), (SLOTS, 4)),
    "scattered, adding": (statement("cache.scatter_add_(0, wide(slots), x)"), (SLOTS, 4)),
    "pages": (statement("cache[slots // 7, slots % 7] = x"), (SLOTS // 7, 7, 4)),
    "pages as one": (statement("cache.view(-1, 4)[slots] = x"), (SLOTS // 7, 7, 4)),
    "layer": (statement("cache[1, slots] = x"), (2, SLOTS, 4)),
    "heads": (statement("cache[:, :, slots] = x.expand(2, 3, -1, -1)"), (2, 3, SLOTS, 4)),
    "behind what was there": (statement("cache[: x.shape[0], 3] = x"), (SLOTS, 5, 4)),
    "bytes": (statement("cache[slots] = as_int8(x)"), (SLOTS, 4), torch.int8),
    "attention": (attend, (2, SLOTS, 4)),
    "several per row": (several, (SLOTS, 4)),
    "own position": (own_position, (SLOTS, 4, 4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_a_cache_holds_what_eagers_holds(name, device):
    function, shape, *dtype = WRITES[name]

    def make(n):
        cache = (torch.randn(shape, device=device) * 3).to(*dtype)
        return [cache, torch.randperm(SLOTS // 2, device=device)[:n], torch.randn(n, 4, device=device)]

    stats = check(function, make)
    assert re.search(r"buckets: (8, 32|8×8, 32×32) \(", sg.explain()), sg.explain()
    assert stats.fallbacks == {}


def set_where(x, mask):
    y = x.clone()
    y[mask] = 0.0
    y[x > 1] = -1.0
    return y * 2


def set_in_place(x, mask):
    x[mask] = 3.0
    return x.sum(0)


def in_order(x, mask):
    """As embeddings of images are put among those of words."""
    return x.masked_scatter((mask & (x[:, 0] > 0))[:, None], torch.arange(200.0, device=x.device)) * 2


@pytest.mark.slow
@pytest.mark.parametrize("function", [set_where, set_in_place, in_order])
def test_written_by_mask(function, device):
    stats = check(
        lambda x, number: function(x, (number > 2) & (x[:, 0] < 3)),
        lambda n: [torch.randn(n, 4, device=device), torch.randint(0, 6, (n,), device=device)],
    )
    assert re.search(r"buckets: 8, 32 \(", sg.explain()), sg.explain()
    assert stats.fallbacks == {}


@pytest.mark.slow
def test_there_may_be_fewer_entries_than_the_mask_chooses(device):
    """On the host: on a GPU an index out of bounds ends the process."""
    if device.type != "cpu":
        pytest.skip("ends the process")
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds"):
        check(lambda x: x.masked_scatter(x > -9, x.new_ones(3)) * 2, lambda n: [torch.randn(n, 4)])
