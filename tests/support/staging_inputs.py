"""Random arguments and the buckets they are staged in, for whatever stages them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch

from cudagraph_backend.fill import Fill
from cudagraph_backend.memory.copies import StagedCopy, staged_copy
from cudagraph_backend.memory.strides import extent

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.int16,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


class Input:
    """An argument and its bucket, each within memory of random bytes; the bucket's exists twice, for either way."""

    def __init__(self, rng: random.Random, dtype: torch.dtype, index: int, device: str = "cpu"):
        count = rng.randint(1, 4)
        entries = [rng.randint(1, 3) for _ in range(count)]
        rows = [rng.randint(1, 4) for _ in range(count)]
        more = [rng.choice([0, 0, 1, 3]) if dim < 2 else 0 for dim in range(count)]
        size = [k * n for k, n in zip(entries, rows, strict=True)]
        bucket = [k * (n + m) for k, n, m in zip(entries, rows, more, strict=True)]
        layout = list(range(count))
        rng.shuffle(layout)
        gaps = [rng.choice([1, 1, 2]) for _ in range(count)]
        zero = [rng.random() < 0.15 for _ in range(count)]
        self.real = tuple(size), _strides(size, layout, gaps, zero)
        shape = tuple(bucket), _strides(bucket, layout, gaps, zero)
        self.argument = _within(_bytes(rng, self.real, dtype).to(device), dtype, self.real, rng.randint(0, 3))
        memory = _bytes(rng, shape, dtype).to(device)
        self.memories = [memory, memory.clone()]
        self.buckets = [_within(memory, dtype, shape, 1) for memory in self.memories]
        fills: list[Fill] = ["replica", "zero", math.nan if dtype.is_floating_point else 1.0]
        self.fill = rng.choice(fills)
        self.copies = [staged_copy(index, bucket, self.real, entries, self.fill) for bucket in self.buckets]


def _strides(size: list[int], layout: list[int], gaps: list[int], zero: list[bool]) -> tuple[int, ...]:
    stride, step = [0] * len(size), 1
    for dim in layout:
        if not zero[dim]:
            stride[dim] = step * gaps[dim]
            step = stride[dim] * size[dim]
    return tuple(stride)


def _bytes(rng: random.Random, shape: Any, dtype: torch.dtype) -> torch.Tensor:
    """Random bytes for the shape and a few entries around it."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    count = (extent(*shape) + 8) * dtype.itemsize
    return torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)


def _within(memory: torch.Tensor, dtype: torch.dtype, shape: Any, offset: int) -> torch.Tensor:
    size, stride = shape
    return memory.view(dtype).as_strided(size, stride, offset)


def ways(rng: random.Random, inputs: Sequence[Input]) -> list[tuple[list[StagedCopy], list[StagedCopy]]]:
    """For either memory: the inputs that are copied and those that are read in place."""
    stays = [rng.random() < 0.3 and 0 not in given.real[1] for given in inputs]
    return [
        (
            [given.copies[way] for given, stay in zip(inputs, stays, strict=True) if not stay],
            [given.copies[way] for given, stay in zip(inputs, stays, strict=True) if stay],
        )
        for way in (0, 1)
    ]
