"""Random programs of few operators over tensors with rows, as hypothesis draws them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from tests.support.oracle import Region, dynamic, traced

Value = torch.Tensor


@dataclass(frozen=True)
class Step:
    """What a step may use beside the two values it takes."""

    indices: Value
    rows: Any
    table: Value
    large: Value
    weight: Value
    dim: int
    number: int


#: The steps of which programs are made.
STEPS: dict[str, Callable[[Value, Value, Step], Value]] = {
    "exp": lambda x, y, s: (x / 8).exp(),
    "affine": lambda x, y, s: x * 0.5 - s.number,
    "relu": lambda x, y, s: x.relu(),
    "sign": lambda x, y, s: x.sign(),
    "add": lambda x, y, s: x + y,
    "mul": lambda x, y, s: x * y / 4,
    "where": lambda x, y, s: torch.where(x > s.number, x, y),
    "sum": lambda x, y, s: x.sum(s.dim, keepdim=s.number > 0),
    "mean": lambda x, y, s: x.mean(s.dim, keepdim=s.number > 0),
    "amax": lambda x, y, s: x.amax(s.dim, keepdim=s.number > 0),
    "amin of all": lambda x, y, s: x - x.amin(),
    "max and place": lambda x, y, s: x.max(s.dim)[0],
    "place of max": lambda x, y, s: x.argmax(s.dim, keepdim=True) + 0.5 * x,
    "var": lambda x, y, s: x.var(s.dim, correction=0),
    "softmax": lambda x, y, s: x.softmax(s.dim),
    "any": lambda x, y, s: (s.indices > 1).any() * x,
    "flatten": lambda x, y, s: x.reshape(-1),
    "keep last": lambda x, y, s: x.reshape(-1, x.shape[-1]),
    "keep first": lambda x, y, s: x.reshape(x.shape[0], -1),
    "split in rows": lambda x, y, s: x.reshape(s.rows, -1),
    "split in threes": lambda x, y, s: x.reshape(3, -1, 4),
    "split in fours": lambda x, y, s: x.reshape(-1, 3, 4),
    "split behind": lambda x, y, s: x.reshape(3, s.rows, -1),
    "split in twos": lambda x, y, s: x.reshape(2, -1),
    "transpose": lambda x, y, s: x.transpose(s.dim, s.number % x.ndim),
    "unsqueeze": lambda x, y, s: x.unsqueeze(s.dim),
    "squeeze": lambda x, y, s: x.squeeze(s.dim),
    "expand": lambda x, y, s: x.unsqueeze(0).expand(2, *x.shape) * 1,
    "expand to rows": lambda x, y, s: s.table[:, None].expand(3, s.rows, 4) * 1,
    "select": lambda x, y, s: x.select(s.dim, s.number),
    "select last": lambda x, y, s: x.select(s.dim, -1),
    "slice": lambda x, y, s: x.narrow(s.dim, 0, s.number + 1),
    "slice to rows": lambda x, y, s: x[s.rows :],
    "cut first": lambda x, y, s: x.narrow(s.dim, 1, x.shape[s.dim] - 1),
    "flip": lambda x, y, s: x.flip(s.dim),
    "roll": lambda x, y, s: x.roll(1, s.dim),
    "cat": lambda x, y, s: torch.cat([x, y], s.dim),
    "stack": lambda x, y, s: torch.stack([x, -y], s.dim),
    "chunk": lambda x, y, s: x.chunk(2, s.dim)[s.number % 2],
    "repeat": lambda x, y, s: x.repeat([1] * s.dim + [2] + [1] * (x.ndim - 1 - s.dim)),
    "repeat each": lambda x, y, s: x.repeat_interleave(2, s.dim),
    "pad": lambda x, y, s: torch.constant_pad_nd(x, [0, 0] * (x.ndim - 1 - s.dim) + [0, s.number]),
    "tril": lambda x, y, s: x.tril(s.number),
    "cumsum": lambda x, y, s: x.cumsum(s.dim),
    "cummax": lambda x, y, s: x.cummax(s.dim)[0],
    "sort": lambda x, y, s: x.sort(s.dim)[0],
    "topk": lambda x, y, s: x.topk(2, s.dim)[0],
    "linear": lambda x, y, s: x @ s.weight,
    "from the left": lambda x, y, s: torch.matmul(s.weight[:3, : x.shape[-2]], x),
    "product": lambda x, y, s: x @ y.transpose(-1, -2) / 4,
    "inner": lambda x, y, s: x.transpose(-1, -2) @ y / 4,
    "look up": lambda x, y, s: s.table[s.indices],
    "look up rows": lambda x, y, s: x[s.indices],
    "look up columns": lambda x, y, s: x[:, s.indices],
    "own row": lambda x, y, s: x[torch.arange(s.rows)],
    "own row, chosen column": lambda x, y, s: x[torch.arange(s.rows), s.indices],
    "own column": lambda x, y, s: x[:, torch.arange(s.rows)],
    "gather": lambda x, y, s: x.gather(1, s.indices.reshape(s.rows, 1)),
    "write own row": lambda x, y, s: x.index_put((torch.arange(s.rows), s.indices), x.new_ones(())),
    "write table": lambda x, y, s: s.table.index_put((s.indices,), x.reshape(s.rows, 4).double()),
    "add to table": lambda x, y, s: s.table.index_put((s.indices,), x.double(), accumulate=True),
    "write columns": lambda x, y, s: torch.ops.aten.index_put(x, [None, s.indices], x[:, :1]),
    "row number": lambda x, y, s: torch.arange(s.rows) + 0.5,
    "row number below": lambda x, y, s: (torch.arange(s.rows) < s.number + 1) * 1.0,
    "row number from the end": lambda x, y, s: (s.rows - torch.arange(s.rows)) * 1.0,
    "made rows": lambda x, y, s: x.new_full((s.rows, 4), s.number),
    "made merged rows": lambda x, y, s: x.new_ones(3 * s.rows, 4),
    "divide by size": lambda x, y, s: x / s.rows,
    "indices as values": lambda x, y, s: s.indices * 0.5,
    "new axis": lambda x, y, s: x[:, None],
    # rows that meet
    "sum of all": lambda x, y, s: x - x.exp().sum() / 64,
    "product of entries": lambda x, y, s: (x / 2).prod(s.dim, keepdim=s.number > 0),
    "log sum exp": lambda x, y, s: x.logsumexp(s.dim, keepdim=s.number > 0),
    "log softmax": lambda x, y, s: x.log_softmax(s.dim),
    "centre": lambda x, y, s: x - x.sum(s.dim, keepdim=True) / 8,
    "argmax": lambda x, y, s: x.argmax(s.dim) * 0.5,
    "argmin of all": lambda x, y, s: x + x.argmin(),
    "min and place": lambda x, y, s: x.min(s.dim, keepdim=True)[1] - x,
    "any of some": lambda x, y, s: (x > 1).any(s.dim) * 0.5,
    "all of some": lambda x, y, s: (x < 1).all(s.dim, keepdim=True) + x,
    "count": lambda x, y, s: (x > 0).sum(s.dim) + 0.5,
    "sum of integers": lambda x, y, s: (x.clamp(-9, 9) * 4).int().sum(s.dim) * 0.25,
    "extreme of integers": lambda x, y, s: (x.clamp(-9, 9) * 4).to(torch.int8).amax(s.dim) * 0.25,
    "divide integers": lambda x, y, s: ((x * 4).int() // (y.abs().clamp(max=9).int() + 1)) * 0.25,
    "softmax's gradient": lambda x, y, s: torch.ops.aten._softmax_backward_data(x, y, s.dim, x.dtype),
    # a second row dim
    "scores": lambda x, y, s: x @ x.transpose(-1, -2) / 4,
    "attend": lambda x, y, s: (x @ x.transpose(-1, -2)).softmax(-1) @ x,
    "attend to another": lambda x, y, s: (x @ y.transpose(-1, -2)).softmax(-1) @ y,
    "differences of all": lambda x, y, s: x.unsqueeze(0) - x.unsqueeze(1),
    "times itself": lambda x, y, s: x @ x / 4,
    "causal": lambda x, y, s: x.masked_fill(places(x, -1)[None] > places(x, -2)[:, None], -9.0),
    "near the diagonal": lambda x, y, s: torch.where((places(x, -1)[None] - places(x, -2)[:, None]).abs() < 2, x, y),
    "corner of a table": lambda x, y, s: x + s.large[: x.shape[-2], : x.shape[-1]],
    "batch of one": lambda x, y, s: x.reshape(1, *x.shape),
    "expand to square": lambda x, y, s: x.unsqueeze(s.dim).expand(*x.shape[: s.dim], s.rows, *x.shape[s.dim :]) * 1,
    "below a place": lambda x, y, s: x.masked_fill(places(x, s.dim).reshape(-1, *[1] * (x.ndim - 1 - s.dim)) < 2, 0.5),
    # rows before or after fixed entries
    "difference": lambda x, y, s: x.diff(dim=s.dim),
    "cut last": lambda x, y, s: x.narrow(s.dim, 0, x.shape[s.dim] - 1),
    "cut first rows": lambda x, y, s: x[s.number :],
    "windows": lambda x, y, s: x.unfold(s.dim, s.number + 1, 1),
    "behind its first": lambda x, y, s: torch.cat([x.narrow(s.dim, 0, s.number + 1), x], s.dim),
    "behind another": lambda x, y, s: torch.cat([y, x.narrow(s.dim, 1, x.shape[s.dim] - 1)], s.dim),
    "shift": lambda x, y, s: torch.cat([x.new_zeros(1, *x.shape[1:]), x[:-1]]),
    "pad in front": lambda x, y, s: torch.constant_pad_nd(x, [0, 0] * (x.ndim - 1 - s.dim) + [s.number, 0], 0.5),
    "convolve": lambda x, y, s: F.conv1d(x, x.new_ones(2, x.shape[1], s.number + 1), padding=s.number),
    "later row numbers": lambda x, y, s: torch.arange(s.rows + 1)[1:] * 0.5,
    "own row, cut": lambda x, y, s: x[1:][torch.arange(s.rows - 1)],
    # look up by what was computed
    "look up by extreme": lambda x, y, s: s.table[x.argmax(-1) % 3],
    "look up by row number": lambda x, y, s: s.large[torch.arange(s.rows)][:, :4] + x,
    "look up by two": lambda x, y, s: s.large[x.argmax(-1), torch.arange(x.shape[0])],
    "write by extreme": lambda x, y, s: s.table.index_put((x.argmax(-1) % 3,), x),
    "add by extreme": lambda x, y, s: s.table.index_put((x.argmax(-1) % 3,), y, accumulate=True),
    "write the diagonal": lambda x, y, s: s.large[:9].index_put((s.indices, torch.arange(s.rows)), x.sum(-1)),
    "write own diagonal": lambda x, y, s: write_diagonal(x @ s.large[:4], y.sum(-1)),
    "gather by extreme": lambda x, y, s: x.gather(s.dim, y.argmax(s.dim, keepdim=True)),
    "scatter by extreme": lambda x, y, s: x.scatter(s.dim, y.argmax(s.dim, keepdim=True), 0.5),
}


def places(x: Value, dim: int) -> Value:
    return torch.arange(x.shape[dim])


def exactly(x: Value) -> Value:
    """Numbers made of integers are of torch's default dtype, too coarse for the tolerance."""
    return x.double() if x.dtype == torch.float32 else x


def write_diagonal(x: Value, values: Value) -> Value:
    own = places(x, 0)
    return x.index_put((own, own), values)


steps = st.tuples(st.sampled_from(sorted(STEPS)), *[st.integers(0, 7)] * 2, st.integers(0, 3), st.integers(0, 2))
programs = st.lists(steps, min_size=2, max_size=10)


def program(chosen: list[tuple[str, int, int, int, int]]) -> Callable[..., Value]:
    """Runs the chosen steps that fit the shapes they meet; each takes two earlier values, mostly the latest."""

    def run(x: Value, y: Value, indices: Value, table: Value, large: Value, weight: Value) -> Value:
        values = [y, x]
        for name, first, second, dim, number in chosen:
            a, b = values[-1 - first // 4 % len(values)], values[-1 - second % len(values)]
            step = Step(indices, indices.shape[0], table, large, weight, dim % max(a.ndim, 1), number)
            try:
                values.append(exactly(STEPS[name](a, b, step)))
            except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError):
                continue  # does not fit
        return values[-1] * 1

    return run


def trace(chosen: list[tuple[str, int, int, int, int]], row_dim: int) -> Region:
    """The region of a program over two tensors with rows along ``row_dim``."""
    torch.manual_seed(0)
    shape = [3, 4]
    shape.insert(row_dim, 5)
    x, y = torch.randn(2, *shape, dtype=torch.float64)
    table, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    indices = dynamic(torch.randint(0, 3, (5,)))
    large = torch.randn(70, 70, dtype=torch.float64)
    return traced(program(chosen), dynamic(x, row_dim), dynamic(y, row_dim), indices, table, large, weight)
