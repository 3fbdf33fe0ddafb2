"""A Llama-shaped decode step: one token per request, with a KV cache in which each request has a slot."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.runners import marked
from cudagraph_backend.demo.workload import Batch


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder. ``slots`` is the most requests at a time; ``context`` the most tokens of each."""

    hidden: int
    intermediate: int
    heads: int
    layers: int
    vocabulary: int
    slots: int
    context: int
    logits: bool


class Layer(nn.Module):
    keys: Tensor
    values: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.width = shape.heads, shape.hidden // shape.heads
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)
        # One slot more than there are requests: a hand-written runner sends its padded rows there.
        cache = (shape.slots + 1, shape.context, self.heads, self.width)
        self.register_buffer("keys", torch.zeros(cache))
        self.register_buffer("values", torch.zeros(cache))

    def forward(self, x: Tensor, slots: Tensor, positions: Tensor, turn: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(-1, 3, self.heads, self.width).unbind(1)
        q, k = rotated(q, *turn), rotated(k, *turn)
        self.keys[slots, positions] = k
        self.values[slots, positions] = v
        # Written as products and sums, which Inductor fuses with the look-up: no copy of the cache is made.
        scores = (q.unsqueeze(1).float() * self.keys[slots].float()).sum(-1) * self.width**-0.5
        weights = scores.masked_fill(~seen.unsqueeze(-1), -torch.inf).softmax(1)
        attended = (weights.unsqueeze(-1) * self.values[slots].float()).sum(1).to(x.dtype)
        x = x + self.out(attended.flatten(1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Decoder(nn.Module):
    """Token ids, slots and positions ``[B]`` → hidden states ``[B, hidden]`` or logits ``[B, vocabulary]``."""

    cos: Tensor
    sin: Tensor
    places: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._spare_slot = shape.slots
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False) if shape.logits else None
        width = shape.hidden // shape.heads
        angles = torch.arange(shape.context).outer(10000.0 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("places", torch.arange(shape.context))

    def forward(self, ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(ids)
        turn = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        seen = self.places <= positions.unsqueeze(1)
        for layer in self.layers:
            x = layer(x, slots, positions, turn, seen)
        x = self.norm(x)
        return x if self.head is None else self.head(x)

    @property
    def padding(self) -> tuple[int | None, ...]:
        """What a hand-written runner puts in padded rows: they must not write to a slot that is in use."""
        return None, self._spare_slot, None


def build_decoder(shape: Shape, device: torch.device, dtype: torch.dtype) -> Decoder:
    """With random weights, made on the device; equal calls give equal weights."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Decoder(shape).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def step_inputs(ids: list[int], slots: list[int], positions: list[int], device: torch.device, largest: int) -> Batch:
    return marked(tuple(torch.tensor(each, device=device) for each in (ids, slots, positions)), largest)


def first_step(rows: int, shape: Shape, device: torch.device) -> Batch:
    """``rows`` requests, each at its first token."""
    draw = random.Random(rows)
    ids = [draw.randrange(shape.vocabulary) for _ in range(rows)]
    return step_inputs(ids, list(range(rows)), [0] * rows, device, shape.slots)


def random_walk(steps: int, shape: Shape, device: torch.device, stride: int) -> tuple[Batch, ...]:
    """Steps of continuous batching: how many requests are in flight is a random walk from 1 to ``shape.slots``.

    Requests come and go; one whose context is full ends, and the next takes its slot. Token ids are drawn, not fed
    back: else one rounding would let every later token differ, and no result could be compared.
    """
    draw = random.Random(0)
    active: list[int] = []
    free = list(range(shape.slots))
    position = [0] * shape.slots
    batches = []
    count = shape.slots // 8
    for _ in range(steps):
        count = min(shape.slots, max(1, count + draw.randint(-stride, stride)))
        while len(active) < count:
            active.append(free.pop(0))
            position[active[-1]] = 0
        while len(active) > count:
            free.append(active.pop(draw.randrange(len(active))))
        ids = [draw.randrange(shape.vocabulary) for _ in active]
        batches.append(step_inputs(ids, active, [position[slot] for slot in active], device, shape.slots))
        for slot in active:
            position[slot] = (position[slot] + 1) % shape.context
    return tuple(batches)
