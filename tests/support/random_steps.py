"""The steps of random programs: operators over tensors with rows, of all kinds that padding knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

Value: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class Given:
    """What a program reads beside the two values that it begins with.

    Attributes:
        indices: of each row, one of three.
        mask: of each row, or of each entry of the first two dims.
        counts: of each row, so many of the edges.
        offsets: for each row, where its edges begin.
        edges: numbers of rows.
        begins: of three bags of ``indices``.
    """

    indices: Value
    mask: Value
    counts: Value
    offsets: Value
    edges: Value
    begins: Value
    table: Value
    large: Value
    weight: Value


@dataclass(frozen=True)
class Step:
    """What a step may use beside the two values it takes."""

    given: Given
    shape: Any
    dim: int
    number: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.given, name)

    @property
    def rows(self) -> Any:
        """How many there are."""
        return self.given.indices.shape[0]


Function: TypeAlias = Callable[[Value, Value, Step], Value]

#: The steps that were first.
OLDER: dict[str, Function] = {
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
    "write table": lambda x, y, s: s.table.index_put((s.indices,), x.reshape(s.rows, 4)),
    "add to table": lambda x, y, s: s.table.index_put((s.indices,), x, accumulate=True),
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

#: The steps that newer forms and rules are for.
NEWER: dict[str, Function] = {
    # statistics over rows
    "norm": lambda x, y, s: torch.linalg.vector_norm(x, s.number + 1, s.dim, keepdim=s.number > 0),
    "norm of all": lambda x, y, s: x / (1 + torch.linalg.vector_norm(x)),
    "deviation": lambda x, y, s: (x + 0.1 * numbered(x, s.dim)).std(s.dim, keepdim=s.number > 0),
    "variance of all": lambda x, y, s: x * x.var(correction=s.number),
    "variance and mean": lambda x, y, s: torch.add(*torch.var_mean(x, s.dim, correction=0)),
    "mean of all": lambda x, y, s: y - x.mean(),
    "standardise": lambda x, y, s: (x - x.mean(s.dim, True)) / (x.var(s.dim, keepdim=True) + 0.1).sqrt(),
    "batch norm": lambda x, y, s: F.batch_norm(x, None, None, training=True, eps=0.1),
    "group norm": lambda x, y, s: F.group_norm(x, 1, eps=0.1),
    "layer norm": lambda x, y, s: F.layer_norm(x, x.shape[-1:], eps=0.1),
    "mean loss": lambda x, y, s: F.mse_loss(x, y) + x,
    "mean loss of some": lambda x, y, s: F.smooth_l1_loss(x, y, reduction="none").mean(s.dim),
    "cross entropy": lambda x, y, s: F.cross_entropy(x.reshape(s.rows, -1), s.indices) * x,
    "binary cross entropy": lambda x, y, s: F.binary_cross_entropy_with_logits(x, y.sigmoid()),
    # sizes as values
    "half the size": lambda x, y, s: x * (s.rows // 2),
    "times half the size": lambda x, y, s: x * (s.rows * 0.5),
    "by the root of the size": lambda x, y, s: x / s.rows**0.5,
    "by its own size": lambda x, y, s: x / x.shape[s.dim],
    "by all sizes": lambda x, y, s: x.sum() / x.numel() + y,
    "filled with the size": lambda x, y, s: x + torch.full((4,), s.rows, dtype=x.dtype),
    "first half": lambda x, y, s: torch.where(shaped(places(x, s.dim), x, s.dim) < s.rows // 2, x, 0.5),
    "integer by size": lambda x, y, s: (x * 8).long() // s.rows + (x * 8).long() % s.rows,
    "cut to half": lambda x, y, s: x[: s.rows // 2],
    # sorting along rows
    "places in order": lambda x, y, s: x.argsort(s.dim) * 0.5,
    "sort down": lambda x, y, s: x.sort(s.dim, descending=True)[0],
    "rank": lambda x, y, s: x.argsort(s.dim).argsort(s.dim) + x,
    "another's order": lambda x, y, s: x.gather(s.dim, y.argsort(s.dim)),
    "by first column": lambda x, y, s: x[column(y).argsort()],
    "greatest places": lambda x, y, s: numbered(x, s.dim).topk(2, s.dim, largest=s.number > 0)[1] * 0.5,
    "greatest rows": lambda x, y, s: x[numbered(column(y), 0).topk(2)[1]],
    "another's greatest": lambda x, y, s: x.gather(s.dim, numbered(y, s.dim).topk(3, s.dim)[1]),
    "top one": lambda x, y, s: y * (x == x.amax(s.dim, True)),
    "search table": lambda x, y, s: torch.searchsorted(s.table[0].sort()[0], x, right=s.number > 0) + x,
    "search rows": lambda x, y, s: torch.searchsorted(s.indices.sort()[0], (x * 2).long()) * 0.5,
    "search rows of fractions": lambda x, y, s: torch.searchsorted(column(x).sort()[0], column(y)) * 0.5,
    "bucketize": lambda x, y, s: torch.bucketize(x, s.table[1].sort()[0], right=s.number > 0) * 0.5,
    "median": lambda x, y, s: x.median(s.dim)[0],
    "histogram": lambda x, y, s: torch.histc(x, 4, -1, 1),
    # rows that move
    "flip two": lambda x, y, s: x.flip(0, 1),
    "roll back": lambda x, y, s: x.roll(-2, s.dim),
    "join and split": lambda x, y, s: torch.cat([x, y], s.dim).split(x.shape[s.dim], s.dim)[s.number % 2],
    "join and cut": lambda x, y, s: torch.cat([x, y, x * 2], s.dim).narrow(s.dim, x.shape[s.dim], y.shape[s.dim]),
    "join and sum": lambda x, y, s: torch.cat([x, y.exp()], s.dim).sum(s.dim, keepdim=True) / 8,
    "join with fixed": lambda x, y, s: torch.cat([x, rows_of_table(x, s)], -2),
    "join flipped": lambda x, y, s: torch.cat([x, y.flip(s.dim)], s.dim).cumsum(s.dim) / 4,
    "last row": lambda x, y, s: x[-1],
    "last but some": lambda x, y, s: x[-1 - s.number] + y,
    "last rows": lambda x, y, s: x[-s.number - 1 :],
    "last columns": lambda x, y, s: x[:, -s.number - 1 :],
    "last of dim": lambda x, y, s: x.narrow(s.dim, x.shape[s.dim] - 2, 2),
    "cut both ends": lambda x, y, s: x[1:-1],
    "as many of another": lambda x, y, s: x.narrow(s.dim, 0, y.shape[s.dim]),
    "last of another": lambda x, y, s: x.narrow(s.dim, x.shape[s.dim] - y.shape[s.dim], y.shape[s.dim]),
    "every other": lambda x, y, s: x[::2],
    "every other of the last": lambda x, y, s: x[-4:-1:2],
    "shift back": lambda x, y, s: torch.cat([x[1:], x[:1]]),
    "pad behind": lambda x, y, s: torch.constant_pad_nd(x, [0, 0] * (x.ndim - 1 - s.dim) + [1, 2], 0.5),
    "write last": lambda x, y, s: x.select_scatter(y.select(s.dim, 0), s.dim, -1),
    "write behind first": lambda x, y, s: x.slice_scatter(y.narrow(s.dim, 0, y.shape[s.dim] - 1), s.dim, 1),
    # rows picked by number
    "pick": lambda x, y, s: x[s.edges],
    "pick from the end": lambda x, y, s: x[s.edges - 5],
    "pick columns": lambda x, y, s: x[:, s.edges],
    "pick in two dims": lambda x, y, s: x[s.edges, s.edges % 3],
    "select along": lambda x, y, s: x.index_select(s.dim, s.edges),
    "gather along": lambda x, y, s: x.gather(s.dim, along(s.edges, x, s.dim)),
    "embed": lambda x, y, s: F.embedding(s.edges, x),
    "messages": lambda x, y, s: torch.zeros_like(x).index_add(0, s.edges, x[s.edges.flip(0)].relu()),
    "degrees": lambda x, y, s: x / (1 + shaped(degrees(s), x, 0)),
    "write numbers": lambda x, y, s: x.scatter(s.dim, along(s.edges, x, s.dim), s.number),
    "write rows": lambda x, y, s: x.scatter(s.dim, along(s.edges, x, s.dim), y.index_select(s.dim, s.edges)),
    "add at": lambda x, y, s: x.scatter_add(s.dim, along(s.edges, x, s.dim), y.index_select(s.dim, s.edges)),
    "reduce at, amax": lambda x, y, s: reduced_at(x, y, s, "amax"),
    "reduce at, amin": lambda x, y, s: reduced_at(x, y, s, "amin"),
    "reduce at, mean": lambda x, y, s: reduced_at(x, y, s, "mean"),
    "reduce at, prod": lambda x, y, s: reduced_at(x, y, s, "prod"),
    "index_add": lambda x, y, s: x.index_add(s.dim, s.edges, y.index_select(s.dim, s.edges), alpha=s.number + 1),
    "index_copy": lambda x, y, s: x.index_copy(s.dim, s.edges, y.index_select(s.dim, s.edges)),
    "index_fill": lambda x, y, s: x.index_fill(s.dim, s.edges, s.number),
    "put": lambda x, y, s: x.index_put((s.edges,), y[s.edges]),
    "put numbers": lambda x, y, s: x.index_put((s.edges,), x.new_full((), s.number)),
    "put in order": lambda x, y, s: torch.zeros_like(x).index_put((column(x).argsort(),), y),
    "add from the end": lambda x, y, s: x.index_put((s.edges - 5,), y[s.edges], accumulate=True),
    "sum by group": lambda x, y, s: s.table.index_add(0, s.indices, x),
    "mean by group": lambda x, y, s: mean_by_group(x, s.indices),
    "extreme by group": lambda x, y, s: extreme_by_group(x, s.indices),
    "group by number": lambda x, y, s: mean_by_group(x, s.indices)[s.indices] - x,
    "repeat by number": lambda x, y, s: x.repeat_interleave(s.counts, 0, output_size=s.edges.shape[0]),
    "sum of bags": lambda x, y, s: F.embedding_bag(s.edges, x, s.offsets, mode="sum"),
    "mean of bags": lambda x, y, s: F.embedding_bag(s.edges, s.large[:5, :4], s.offsets, mode="mean") + x,
    "bags of rows": lambda x, y, s: F.embedding_bag(s.indices, s.table, s.begins, mode="mean"),
    "one hot": lambda x, y, s: F.one_hot(s.indices, 3) * 0.5,
    "sum by one hot": lambda x, y, s: F.one_hot(s.indices, 3).to(x.dtype).T @ x.reshape(s.rows, -1) / 4,
    # masks
    "fill greater": lambda x, y, s: x.masked_fill(y > 0, s.number),
    "fill by mask": lambda x, y, s: x.masked_fill(shaped(s.mask, x, 0), -0.5),
    "choose by mask": lambda x, y, s: torch.where(shaped(s.mask, x, 0), x, y),
    "put by mask": lambda x, y, s: x.index_put((s.mask,), x.new_full((), 0.5)),
    "put where less": lambda x, y, s: x.index_put((x < 0,), x.new_full((), s.number)),
    "mean of masked": lambda x, y, s: (x * shaped(s.mask, x, 0)).sum(0) / s.mask.sum().clamp(min=1),
    "place behind mask": lambda x, y, s: x[s.mask.cumsum(0) - 1],
    # two row dims, or attention over rows
    "distances": lambda x, y, s: torch.cdist(x, y, float(s.number), compute_mode="donot_use_mm_for_euclid_dist"),
    "distances squared": lambda x, y, s: torch.cdist(x, y.flip(0)).square(),
    "flatten two": lambda x, y, s: x.flatten(0, 1),
    "flatten last two": lambda x, y, s: x.flatten(-2, -1),
    "apart again": lambda x, y, s: x.reshape(s.shape[0], s.shape[1], -1),
    "in heads": lambda x, y, s: x.unflatten(-1, (2, 2)).transpose(1, 2),
    "fused": lambda x, y, s: attended(x, y, s),
    "fused, causal": lambda x, y, s: attended(x, y, s, is_causal=True),
    "fused, own keys": lambda x, y, s: attended(x, x, s),
    "fused, grouped": lambda x, y, s: attended(x.repeat(*[1] * (x.ndim - 3), 2, 1, 1), y, s, enable_gqa=True),
    "fused, bias": lambda x, y, s: attended(x, y, s, attn_mask=s.large[: x.shape[-2], : y.shape[-2]]),
    "fused, near": lambda x, y, s: attended(x, y, s, attn_mask=near(x, y)),
    "fused, keys masked": lambda x, y, s: attended(x, y, s, attn_mask=s.mask[..., None, :]),
    # kernels and scans along rows
    "convolve with weights": lambda x, y, s: convolved(x, s.large[:2, :12].reshape(2, 4, 3) / 4, padding=s.number),
    "convolve in steps": lambda x, y, s: convolved(x, s.large[:2, :8].reshape(2, 4, 2) / 4, stride=2),
    "convolve channels": lambda x, y, s: convolved(x, s.table[:, :, None]),
    "convolve apart": lambda x, y, s: convolved(x, s.weight[:, None, 1:], dilation=s.number + 1, groups=4),
    "average pool": lambda x, y, s: F.avg_pool1d(x, 2, 1),
    "max pool": lambda x, y, s: F.max_pool1d(x, 2, 1),
    "running product": lambda x, y, s: (x / 2).cumprod(s.dim),
    "running log sum": lambda x, y, s: x.logcumsumexp(s.dim),
    "running sum from behind": lambda x, y, s: x.flip(s.dim).cumsum(s.dim).flip(s.dim) / 4,
    "running sum of integers": lambda x, y, s: (x > 0).cumsum(s.dim) * 0.5,
}


#: Steps whose result jumps where a value changes by a rounding error.
JUMPS = frozenset(
    name
    for name in (*OLDER, *NEWER)
    if any(word in name for word in ("place", "order", "arg", "sign", "rank", "extreme", "search", "bucket", "greate"))
)

STEPS = OLDER | NEWER


def places(x: Value, dim: int) -> Value:
    return torch.arange(x.shape[dim])


def shaped(one: Value, x: Value, dim: int) -> Value:
    """``one`` with dims behind it, so that it meets ``x`` from ``dim`` on."""
    return one.reshape(*one.shape, *[1] * (x.ndim - one.ndim - dim))


def along(index: Value, x: Value, dim: int) -> Value:
    """``index`` along a dim of ``x``, the same for each entry of the others."""
    size = list(x.shape)
    size[dim] = index.shape[0]
    return shaped(index, x, dim).expand(size)


def column(x: Value) -> Value:
    return x.reshape(x.shape[0], -1)[:, 0]


def numbered(x: Value, dim: int) -> Value:
    """``x`` without equal entries, among which a kernel may choose as it likes."""
    return x + 0.01 * shaped(places(x, dim), x, dim)


def degrees(s: Step) -> Value:
    return torch.zeros(s.rows).index_add(0, s.edges, torch.ones(s.edges.shape[0]))


def rows_of_table(x: Value, s: Step) -> Value:
    return s.table[: s.number + 1].expand(*x.shape[:-2], -1, -1)


def reduced_at(x: Value, y: Value, s: Step, how: str) -> Value:
    index = along(s.edges, x, s.dim)
    return x.scatter_reduce(s.dim, index, y.index_select(s.dim, s.edges), how, include_self=s.number > 0)


def mean_by_group(x: Value, group: Value) -> Value:
    total = x.new_zeros(3, *x.shape[1:]).index_add(0, group, x)
    count = x.new_zeros(3).index_add(0, group, torch.ones_like(group).to(x.dtype))
    return total / shaped(count, x, 0).clamp(min=1)


def extreme_by_group(x: Value, group: Value) -> Value:
    return x.new_zeros(3, *x.shape[1:]).scatter_reduce(0, along(group, x, 0), x, "amax")


def convolved(x: Value, weight: Value, **options: Any) -> Value:
    """``x`` convolved along its last dim but one."""
    return F.conv1d(x.transpose(-1, -2), weight, **options).transpose(-1, -2)


def near(x: Value, y: Value) -> Value:
    return (places(x, -2)[:, None] - places(y, -2)[None]).abs() < 3


def attended(x: Value, y: Value, s: Step, attn_mask: Value | None = None, **options: Any) -> Value:
    """Attention of ``x`` to ``y``; in three dims, the first is the batch or, if the number is zero, the heads."""

    def with_heads(one: Value) -> Value:
        return one[:, None] if one.ndim == 3 and s.number else one.reshape(*[1] * (4 - one.ndim), *one.shape)

    mask = None if attn_mask is None or attn_mask.ndim < 3 else with_heads(attn_mask)
    query, key = with_heads(x), with_heads(y)
    return F.scaled_dot_product_attention(query, key, key / 2, attn_mask if mask is None else mask, **options)


def write_diagonal(x: Value, values: Value) -> Value:
    own = places(x, 0)
    return x.index_put((own, own), values)
