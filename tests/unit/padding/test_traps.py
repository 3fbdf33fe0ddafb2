"""Every trap of padding: what is safe is proven and holds when run, what is not is refused by name and source line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.oracle import dynamic, refute, region, traced

Function = Callable[..., Any]
TABLE = torch.arange(24.0).reshape(6, 4)
CONSTANT = torch.tensor([0, 1])


def rows(*shape: int) -> torch.Tensor:
    """Floats whose first dim is dynamic."""
    return dynamic(torch.randn(5, *shape or (4,)))


def ids(*shape: int, high: int = 6) -> torch.Tensor:
    """Integers, valid as indices below ``high``, whose first dim is dynamic."""
    return dynamic(torch.randint(0, high, (5, *shape)))


def second(*shape: int) -> torch.Tensor:
    """Floats whose second dim is dynamic."""
    return dynamic(torch.randn(3, 5, *shape), 1)


def own_row(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return x[torch.arange(x.shape[0]), columns]


def write_own_row(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return x.index_put((torch.arange(x.shape[0]), columns), torch.ones(()))


def write_cache(cache: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return cache.index_put((places,), values)


def add_to_cache(cache: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return cache.index_put((places,), values, accumulate=True)


def causal(q: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, q * 2, q + 1, is_causal=True)


def full_attention(q: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, q * 2, q + 1)


def queries(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, k + 1)


def set_input(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.copy_(y * 2)
    return y + 1


def mean_pooling(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).float()
    return (h * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


ANYTHING: dict[str, tuple[Function, list[Callable[[], torch.Tensor]]]] = {
    "pointwise": (lambda x: torch.exp(x) + 1, [rows]),
    "two inputs": (lambda x, y: x * y, [rows, rows]),
    "with a table": (lambda x: x * TABLE[0], [rows]),
    "reduce another dim": (lambda x: x.mean(1), [rows]),
    "softmax over another dim": (lambda x: x.softmax(-1), [rows]),
    "merge and split rows": (lambda x: (x.reshape(-1, 4) * 2).reshape(-1, 3, 4), [lambda: rows(3, 4)]),
    "split rows from merged": (lambda x: x.view(-1, 2, 2).sum(2), [rows]),
    "merge all": (lambda x: x.reshape(-1) + 1, [rows]),
    "merge behind one": (lambda x: x.unsqueeze(0).reshape(-1, 4), [rows]),
    "transpose": (lambda x: x.t() * 2, [rows]),
    "row dim inside": (lambda x: x.sum(0), [lambda: second(4)]),
    "split behind rows": (lambda x: x.reshape(3, -1, 2, 2) + 1, [lambda: second(4)]),
    "cat another dim": (lambda x: torch.cat([x, x + 1], 1), [rows]),
    "cat with made rows": (lambda x: torch.cat([x, x.new_zeros(x.shape[0], 2)], 1), [rows]),
    "stack another dim": (lambda x: torch.stack([x, -x], 1).reshape(x.shape[0], -1), [rows]),
    "flip another dim": (lambda x: x.flip(1), [rows]),
    "roll another dim": (lambda x: x.roll(1, 1), [rows]),
    "first row": (lambda x: x[0] * 2, [rows]),
    "third row": (lambda x: x * x[2], [rows]),
    "first rows": (lambda x: x[:3].sum(0), [rows]),
    "whole slice": (lambda x: x[:], [rows]),
    "whole slice by size": (lambda x: x[: x.shape[0]] * 2, [rows]),
    "column": (lambda x: x[:, 1], [rows]),
    "last column": (lambda x: x[:, -1], [rows]),
    "split columns": (lambda x: torch.stack(x.split(2, 1)).sum(0), [rows]),
    "stack and sum": (lambda x, y: torch.stack([x, y]).sum(0), [rows, rows]),
    "stack, merged, and split": (lambda x: (torch.stack([x, -x]).view(-1, 4) @ TABLE.t()).view(2, -1, 6)[1], [rows]),
    "cat and chunk": (lambda x: (torch.cat([x, -x]) @ TABLE.t()).chunk(2)[1] * 2, [rows]),
    "cat and slice": (lambda x: torch.cat([x, -x])[x.shape[0] :], [rows]),
    "merge into heads and back": (lambda x: (x.reshape(-1, 4) @ TABLE.t()).reshape(3, -1, 6), [lambda: second(4)]),
    "merged rows with a constant": (
        lambda x: (x.reshape(-1, 4) + x.new_ones(3 * x.shape[1], 4)).reshape(3, -1, 4),
        [lambda: second(4)],
    ),
    "merged rows with an expanded table": (
        lambda x: (x.reshape(-1, 4) + TABLE[0].expand(3 * x.shape[1], 4)).reshape(3, -1, 4),
        [lambda: second(4)],
    ),
    "chunk columns": (lambda x: x.chunk(2, -1)[1] * 2, [rows]),
    "unbind columns": (lambda x: x.unbind(1)[2] * 2, [rows]),
    "repeat columns": (lambda x: x.repeat(1, 2), [rows]),
    "repeat interleave rows": (lambda x: x.repeat_interleave(2, 0), [rows]),
    "expand another dim": (lambda x: x[:, None].expand(-1, 3, -1) * 2, [rows]),
    "pad columns": (lambda x: F.pad(x, (1, 2)), [rows]),
    "tril with rows": (lambda x: x.tril(), [rows]),
    "cumsum": (lambda x: x.cumsum(0), [rows]),
    "cumsum of another dim": (lambda x: x.cumsum(1), [rows]),
    "cumprod": (lambda x: x.cumprod(0), [rows]),
    "cummax": (lambda x: x.cummax(0), [rows]),
    "sort columns": (lambda x: x.sort(1), [rows]),
    "topk columns": (lambda x: x.topk(2), [rows]),
    "argmax of columns": (lambda x: x.argmax(1), [rows]),
    "max of columns": (lambda x: x.max(1), [rows]),
    "variance of columns": (lambda x: x.var(1), [rows]),
    "norm of columns": (lambda x: x / x.norm(dim=1, keepdim=True), [rows]),
    "mm": (lambda x: x @ TABLE.t(), [rows]),
    "mm from the left": (lambda x: TABLE @ x.t(), [rows]),
    "linear of merged rows": (lambda x: F.linear(x, TABLE), [lambda: rows(3, 4)]),
    "bmm": (lambda x: x @ x.transpose(1, 2), [lambda: rows(3, 4)]),
    "bmm along rows": (lambda x: torch.bmm(x, TABLE.t().expand(3, 4, 6)), [lambda: second(4)]),
    "baddbmm": (lambda x: torch.baddbmm(TABLE[0, :3], x, x.transpose(1, 2)), [lambda: rows(3, 4)]),
    "layer norm": (lambda x: F.layer_norm(x, (4,)), [rows]),
    "group norm": (lambda x: F.group_norm(x, 2), [lambda: rows(4, 3)]),
    "own row number": (lambda x: x + torch.arange(x.shape[0])[:, None], [rows]),
    "similarity": (lambda x: x @ x.t(), [rows]),
    "outer": (lambda x: x[:, 0] * x[:, :1], [rows]),
    "square": (lambda x: torch.zeros(x.shape[0], x.shape[0]), [rows]),
    "compare": (lambda x: torch.tril(x @ x.t()), [rows]),
    "cat a fixed row": (lambda x: torch.cat([TABLE[:1], x], 0), [rows]),
    "shift": (lambda x: x[1:], [rows]),
    "drop last": (lambda x: x[:-1], [rows]),
    "rows and one": (lambda x: torch.zeros(x.shape[0] + 1), [rows]),
    "own row number compared": (lambda x: x * (torch.arange(x.shape[0]) < 3)[:, None], [rows]),
    "own row by number": (lambda x: x[torch.arange(x.shape[0])], [rows]),
    "own row, one column": (lambda x: x[torch.arange(x.shape[0]), 2], [rows]),
    "own row, each column": (lambda x: x[torch.arange(x.shape[0])[:, None], torch.arange(4)], [rows]),
    "fixed columns": (lambda x: x[:, CONSTANT], [rows]),
    "fixed columns selected": (lambda x: x.index_select(1, CONSTANT), [rows]),
    "set fixed columns": (lambda x: x.index_put((torch.arange(x.shape[0]), CONSTANT[:1]), TABLE[0, 0]), [rows]),
    "made rows": (lambda x: torch.ones(x.shape[0], 4) + x, [rows]),
    "made rows from a table": (lambda x: TABLE[0].expand(x.shape[0], 4) * x, [rows]),
    "size output": (lambda x: (x * 2, x.shape[0]), [rows]),
    "beside a free tensor": (lambda x: (x * 2, TABLE.sum() * 2), [rows]),
    "batch attention": (lambda q: F.scaled_dot_product_attention(q, q * 2, q), [lambda: rows(2, 3, 8)]),
    "causal batch": (causal, [lambda: rows(2, 3, 8)]),
    "queries alone": (queries, [lambda: dynamic(torch.randn(2, 2, 5, 8), 2), lambda: torch.randn(2, 2, 3, 8)]),
    "convolution": (lambda x: F.conv2d(x, torch.ones(2, 3, 2, 2)), [lambda: rows(3, 5, 5)]),
    "max pool": (lambda x: F.max_pool2d(x, 2), [lambda: rows(3, 6, 6)]),
    "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, 2), [lambda: rows(3, 5, 5)]),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), [lambda: rows(3, 5, 5)]),
    "input written in place": (set_input, [rows, rows]),
    "mean pooling of tokens": (mean_pooling, [lambda: rows(3, 4), lambda: ids(3, high=2)]),
}

REPLICA: dict[str, tuple[Function, list[Callable[[], torch.Tensor]]]] = {
    "embedding": (lambda i: F.embedding(i, TABLE), [lambda: ids(3)]),
    "table indexed": (lambda i: TABLE[i], [ids]),
    "table indexed after arithmetic": (lambda i: TABLE[(i + 1) % 6], [ids]),
    "gather columns": (lambda x, i: x.gather(1, i), [rows, lambda: ids(2, high=4)]),
    "own row, chosen column": (own_row, [rows, lambda: ids(high=4)]),
    "scatter columns": (lambda x, i: x.scatter(1, i, 2.0), [rows, lambda: ids(2, high=4)]),
    "scatter add columns": (lambda x, i: x.scatter_add(1, i, x[:, :2]), [rows, lambda: ids(2, high=4)]),
    "write own row": (write_own_row, [rows, lambda: ids(high=4)]),
    "write cache": (write_cache, [lambda: torch.zeros(6, 4), ids, rows]),
    "amax": (lambda x: x / x.amax(0), [rows]),
    "amin of all": (lambda x: x - x.amin(), [rows]),
    "max of all": (lambda x: x.max() + x, [rows]),
    "any": (lambda i: (i > 3).any(), [ids]),
    "all": (lambda i: (i > 3).all(0), [ids]),
    "integer division": (lambda i, j: i // (j + 1), [ids, ids]),
    "causal attention over rows": (causal, [lambda: dynamic(torch.randn(2, 2, 5, 8), 2)]),
}

REFUSED: dict[str, tuple[Function, list[Callable[[], torch.Tensor]], str]] = {
    "mean": (lambda x: x.mean(0), [rows], "aten.mean"),
    "sum": (lambda x: x.sum(0), [rows], "aten.sum"),
    "sum of all": (lambda x: x.sum(), [rows], "aten.sum"),
    "sum of merged rows": (lambda x: x.reshape(-1, 4).sum(0), [lambda: rows(3, 4)], "aten.sum"),
    "variance": (lambda x: x.var(0), [rows], "aten.var"),
    "argmax": (lambda x: x.argmax(0), [rows], "aten.argmax"),
    "softmax": (lambda x: x.softmax(0), [rows], ""),
    "log softmax": (lambda x: x.log_softmax(0), [rows], ""),
    "size as value": (lambda x: x / x.shape[0], [rows], "aten.div"),
    "size in full": (lambda x: torch.full((3,), x.shape[0]) + x[0, 0], [rows], "aten.full"),
    "size in rand": (lambda x: x + torch.rand(4, x.shape[0]).t(), [rows], ""),
    "rows counted from the end": (lambda x: x.shape[0] - 1 - torch.arange(x.shape[0]), [rows], ""),
    "row number below size": (lambda x: torch.arange(x.shape[0]) < x.shape[0] - 1, [rows], "aten.lt"),
    "start at size": (lambda x: torch.arange(x.shape[0], 2 * x.shape[0]) + x[:, 0], [rows], "iota"),
    "interleave": (lambda x: torch.stack([x, -x], 0).reshape(-1, 4), [rows], "aten.cat"),
    "interleave heads": (lambda x: x.reshape(-1, 4), [lambda: second(4)], "aten.view"),
    "split the wrong way": (lambda x: x.reshape(2, -1), [rows], "aten.view"),
    "cat": (lambda x: torch.cat([x, x + 1], 0), [rows], "aten.cat"),
    "scan over blocks": (lambda x: torch.cat([x, x]).cumsum(0).chunk(2)[1] * 2, [rows], "aten.cumsum"),
    "scan over merged rows": (lambda x: x.reshape(-1).cumsum(0).reshape(3, -1), [second], "aten.cumsum"),
    "front of blocks": (lambda x: torch.cat([x, -x])[:7], [rows], "aten.slice"),
    "part of a block": (lambda x: torch.cat([x, -x])[2 : x.shape[0] + 2], [rows], "aten.slice"),
    "blocks meet rows": (
        lambda x, y: torch.cat([x, -x]) * torch.arange(2 * x.shape[0])[:, None],
        [rows, rows],
        "aten.mul",
    ),
    "number of a row among blocks": (lambda x: torch.cat([x, x])[torch.arange(2 * x.shape[0])], [rows], "aten.index"),
    "split halves": (lambda x: x.reshape(-1, 2, 4).reshape(2, -1), [lambda: rows(2, 4)], ""),
    "a fixed row behind": (lambda x: torch.cat([x, TABLE[:1]], 0), [rows], "aten.cat"),
    "pad behind": (lambda x: torch.constant_pad_nd(x, (0, 0, 0, 1)), [rows], ""),
    "flip": (lambda x: x.flip(0), [rows], "prims.rev"),
    "roll": (lambda x: x.roll(1, 0), [rows], ""),
    "every second": (lambda x: x[::2], [rows], "aten.slice"),
    "last row": (lambda x: x[-1], [rows], "aten.select"),
    "backward scan": (lambda x: x.flip(0).cumsum(0).flip(0), [rows], "prims.rev"),
    "maximum after a scan": (lambda x: x.cumsum(0).amax(0), [rows], "aten.amax"),
    "maximum after numbering": (lambda x: (x + torch.arange(x.shape[0])[:, None]).amax(0), [rows], "aten.amax"),
    "maximum after a triangle": (lambda x: x.tril().amax(0), [rows], "aten.amax"),
    "maximum of a table's first rows": (lambda x: (x + TABLE[: x.shape[0]]).amax(0), [rows], "aten.amax"),
    "any of rounded floats": (lambda x: (x.exp() > 1).any(), [rows], "aten.any"),
    "places from rounded floats": (lambda x: TABLE.index_put((x.argmax(1),), x), [rows], "aten.index_put"),
    "sort": (lambda x: x.sort(0)[0], [rows], "aten.sort"),
    "topk": (lambda x: x.topk(2, 0)[0], [rows], "aten.topk"),
    "max with places": (lambda x: x.max(0), [rows], ""),
    "gram": (lambda x: x.t() @ x, [rows], "aten.mm"),
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), [rows], ""),
    "full attention": (full_attention, [lambda: dynamic(torch.randn(2, 2, 5, 8), 2)], "scaled_dot_product"),
    "convolve rows": (
        lambda x: F.conv1d(x, torch.ones(1, 3, 2)),
        [lambda: dynamic(torch.randn(2, 3, 5), 2)],
        "aten.convolution",
    ),
    "convolve rows at one size": (
        lambda x: F.conv1d(x, torch.ones(1, 3, 3), padding=1),
        [lambda: dynamic(torch.randn(2, 3, 5), 2)],
        "aten.convolution",
    ),
    "row number indexes a table": (lambda x: x + TABLE[torch.arange(x.shape[0])], [rows], "aten.index"),
    "rows by number": (lambda x, i: x[i], [rows, lambda: ids(high=2)], "aten.index"),
    "rows by fixed number": (lambda x: x[CONSTANT], [rows], "aten.index"),
    "rows picked": (lambda x, i: x.index_select(0, i), [rows, lambda: ids(high=2)], "aten.index"),
    "mask": (lambda x: x[x > 0].sum(), [rows], ""),
    "write a scan into a cache": (
        lambda x, i: TABLE.index_put((i,), x.cumsum(0)),
        [rows, ids],
        "aten.index_put",
    ),
    "write as many values as rows": (
        lambda x: torch.ops.aten.index_put(x, [None, CONSTANT], TABLE[:5, :2]),
        [rows],
        "aten.index_put",
    ),
    "add to cache": (add_to_cache, [lambda: torch.zeros(6, 4), ids, rows], "aten.index_put"),
    "index add": (lambda x, i: TABLE.index_add(0, i, x), [rows, ids], "aten.index_put"),
    "all rows written by each": (
        lambda x, i: torch.ops.aten.index_put(x, [None, i], TABLE[0, 0]),
        [rows, lambda: ids(high=4)],
        "aten.index_put",
    ),
    "index from rounded floats": (lambda x: TABLE[x.abs().long().clamp(max=5)], [rows], "aten.index"),
    "half of the rows": (lambda x: torch.zeros(x.shape[0] // 2), [rows], ""),
    "strides": (lambda x: x.as_strided((x.shape[0],), (4,)), [rows], "aten.as_strided"),
}


@pytest.mark.parametrize("name", ANYTHING)
def test_safe_whatever_padded_rows_hold(name):
    function, inputs = ANYTHING[name]
    found = region(function, *(make() for make in inputs))
    verdict = found.prove()
    assert verdict.refusal is None, str(verdict.refusal)
    assert not verdict.needs_fill
    assert refute(found, verdict) is None


@pytest.mark.parametrize("name", REPLICA)
def test_safe_with_copies_of_the_last_row(name):
    function, inputs = REPLICA[name]
    found = region(function, *(make() for make in inputs))
    verdict = found.prove()
    assert verdict.refusal is None, str(verdict.refusal)
    assert verdict.needs_fill
    assert refute(found, verdict) is None


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_operator_and_source_line(name):
    function, inputs, op = REFUSED[name]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = region(function, *(make() for make in inputs))
    verdict = found.prove()
    assert verdict.refusal is not None
    assert op in verdict.refusal.op
    assert "test_traps.py" in verdict.refusal.source


#: Traced without Dynamo these fix the size (some with torch before 2.13 only), or write before the end.
ONLY_BY_DYNAMO = {
    "baddbmm",
    "bmm",
    "input written in place",
    "linear of merged rows",
    "pad columns",
    "pad behind",
    "upsample",
}


@pytest.mark.parametrize("name", sorted({*ANYTHING, *REPLICA} - ONLY_BY_DYNAMO))
def test_safe_before_decompositions(name):
    """The same with operators that Inductor decomposes today and may not tomorrow."""
    function, inputs = (ANYTHING | REPLICA)[name]
    found = traced(function, *(make() for make in inputs), decompose=False)
    verdict = found.prove()
    assert verdict.refusal is None, str(verdict.refusal)
    assert refute(found, verdict) is None


@pytest.mark.parametrize("name", sorted({*REFUSED} - ONLY_BY_DYNAMO))
def test_refused_before_decompositions(name):
    function, inputs, _ = REFUSED[name]
    assert traced(function, *(make() for make in inputs), decompose=False).prove().refusal is not None
