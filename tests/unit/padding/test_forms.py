"""Programs in which ``n`` is a value, or in which rows are picked, written or moved by number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cudagraph_backend.padding import edits, masks
from cudagraph_backend.padding.call import RowNumbers
from tests.support.oracle import BUCKETS, dynamic, refutation, refute, region, regions, traced


def rows(n: int = 5, *shape: int) -> Tensor:
    return dynamic(torch.randn(n, *(shape or (4,))))


def places(below: int = 5, many: int = 5) -> Tensor:
    """As many places as there are rows, some of them more than once, and the last one."""
    return dynamic(torch.randint(0, below, (many,)).index_fill(0, torch.tensor([2]), below - 1))


def column(index: Tensor) -> Tensor:
    return index[:, None].expand(-1, 4)


SIZES_AS_VALUES: dict[str, tuple[Callable[..., Any], list[Callable[[], Tensor]]]] = {
    "mean": (lambda x: x.mean(), [rows]),
    "mean over rows": (lambda x: x.mean(0, keepdim=True), [rows]),
    "mean in bfloat16": (lambda x: x.bfloat16().mean(0), [rows]),
    "mean given a dtype": (lambda x: (x > 0).mean(0, dtype=torch.float64), [rows]),
    "variance": (lambda x: x.var(0), [rows]),
    "variance, no correction": (lambda x: x.var((0, 1), correction=0, keepdim=True), [rows]),
    "deviation": (lambda x: x.std(), [rows]),
    "variance and mean": (lambda x: torch.var_mean(x, 0), [rows]),
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), [rows]),
    "batch norm of images": (lambda x: F.batch_norm(x, None, None, training=True), [lambda: rows(5, 3, 4, 4)]),
    "norm": (lambda x: torch.linalg.vector_norm(x), [rows]),
    "norm of order 3": (lambda x: torch.linalg.vector_norm(x + 1, 3, dim=0), [rows]),
    "mean squared error": (lambda x: F.mse_loss(x, x * 2), [rows]),
    "cross entropy": (lambda x, i: F.cross_entropy(x, i), [rows, lambda: places(4)]),
    "divided": (lambda x: x / x.shape[0], [rows]),
    "multiplied by a root": (lambda x: x * x.shape[0] ** 0.5, [rows]),
    "to a power": (lambda x: x.abs() ** (1 / x.shape[0]), [rows]),
    "bfloat16, divided": (lambda x: x.bfloat16() / x.shape[0], [rows]),
    "integers, divided": (lambda x: (x * 10).long() // x.shape[0], [rows]),
    "integers, remainder": (lambda x: (x * 10).long() % x.shape[0], [rows]),
    "integers by a fraction": (lambda x: (x * 10).int() * (1 / x.shape[0]), [rows]),
    "clamped": (lambda x: (x * 10).long().clamp(0, x.shape[0] - 1), [rows]),
    "compared": (lambda x: (x * 9).long() < x.shape[0], [rows]),
    "chosen": (lambda x: torch.where(x > 0, x, x.shape[0]), [rows]),
    "as a tensor": (lambda x: (x + torch.full((), x.shape[0]), torch.full((2,), x.shape[0] * 2)), [rows]),
}
ROWS_BY_NUMBER: dict[str, tuple[Callable[..., Any], list[Callable[[], Tensor]]]] = {
    "index": (lambda x, i: x[i], [rows, places]),
    "index, fixed number": (lambda x, i: x[i].sum(0), [rows, lambda: torch.tensor([0, 4, 4, 2, 1, 0, 3])]),
    "index from the end": (lambda x, i: x[i - 5], [rows, places]),
    "index of bytes": (lambda x, i: x[i], [rows, lambda: places().int()]),
    "index two dims": (lambda x, i: x[i, i % 4], [rows, places]),
    "index_select": (lambda x, i: x.index_select(0, i), [rows, places]),
    "gather": (lambda x, i: x.gather(0, column(i)), [rows, places]),
    "gather, fixed number": (lambda x, i: x.gather(0, i), [rows, lambda: torch.tensor([[4, 0, 1, 2], [0, 4, 4, 3]])]),
    "embedding in a table of rows": (lambda x, i: F.embedding(i, x), [rows, places]),
    "messages": (lambda x, i: torch.zeros_like(x).index_add(0, i, x[i.flip(0)].relu()), [rows, places]),
    "scatter_add": (lambda x, i: torch.zeros_like(x).scatter_add(0, column(i), x), [rows, places]),
    "scatter_add to a table": (lambda x, i: torch.ones(7, 4).scatter_add(0, column(i), x), [rows, places]),
    "scatter, greatest": (lambda x, i: x.scatter_reduce(0, column(i), x * 2, "amax"), [rows, places]),
    "scatter, greatest, to a table": (
        lambda x, i: torch.zeros(7, 4).scatter_reduce(0, column(i), x.cumsum(0), "amin", include_self=False),
        [rows, places],
    ),
    "scatter, mean": (lambda x, i: x.scatter_reduce(0, column(i), x * 2, "mean"), [rows, places]),
    "scatter, mean of others": (
        lambda x, i: torch.ones(7, 4).scatter_reduce(0, column(i), x, "mean", include_self=False),
        [rows, places],
    ),
    "index_put": (lambda x, i: torch.zeros_like(x).index_put((i.argsort(),), x), [rows, places]),
    "index_put, adding": (lambda x, i: x.index_put((i - 5,), x, accumulate=True), [rows, places]),
    "index_put of a number": (lambda x, i: x.index_put((i,), torch.tensor(2.0)), [rows, places]),
    "inverse of an order": (
        lambda x, i: torch.zeros_like(i).index_put((i.argsort(),), torch.arange(i.shape[0])),
        [rows, places],
    ),
    "inverse of an order, several per row": (
        lambda x: torch.zeros(x.numel()).index_put((x.reshape(-1).argsort(),), x.reshape(-1).cumsum(0)),
        [lambda: rows(5, 3)],
    ),
    "index_reduce": (lambda x, i: x.index_reduce(0, i, x * 2, "amax"), [rows, places]),
    "index_reduce to a table": (
        lambda x, i: torch.zeros(7, 4).index_reduce(0, i, x.cumsum(0), "amin", include_self=False),
        [rows, places],
    ),
    "index_copy": (lambda x, i: x.index_copy(0, i, -x[:2]), [rows, lambda: torch.tensor([4, 1])]),
}
ROWS_MOVED: dict[str, tuple[Callable[..., Any], list[Callable[[], Tensor]]]] = {
    "last row": (lambda x: x.exp()[-1] * 2, [rows]),
    "last but one": (lambda x: x.exp()[-2] * 2, [rows]),
    "last rows": (lambda x: x.exp()[-2:] * 2, [rows]),
    "every other of the last": (lambda x: x.exp()[-4:-1:2] * 2, [rows]),
    "last columns": (lambda x: x.exp()[:, -1] * 2, [lambda: dynamic(torch.randn(4, 5), 1)]),
    "flipped": (lambda x: x.flip(0), [rows]),
    "flipped in two dims": (lambda x: x.flip(0, 1), [rows]),
    "rolled": (lambda x: x.roll(2, 0), [rows]),
    "rolled back": (lambda x: x.roll(-1, 0), [rows]),
    "joined with fixed rows": (lambda x, c: torch.cat([x, c]).exp(), [rows, lambda: torch.randn(3, 4)]),
    "joined around": (lambda x: torch.cat([x[:1], x, x[:2]]).cumsum(0), [rows]),
    "joined along columns": (
        lambda x, c: torch.cat([x, c, x], 1).exp().sum(1),
        [lambda: dynamic(torch.randn(4, 5), 1), lambda: torch.randn(4, 3)],
    ),
    "sorted": (lambda x: x.sort(0), [rows]),
    "sorted, greatest first": (lambda x: x.sort(0, descending=True), [rows]),
    "sorted integers": (lambda x, i: i.sort(), [rows, places]),
    "sorted with infinities": (lambda x: x.masked_fill(x > 0, float("inf")).sort(0), [rows]),
    "in order of a column": (lambda x: x[x[:, 0].argsort()], [rows]),
    "back in order": (lambda x: x[x[:, 0].argsort().argsort()], [rows]),
    "greatest rows": (lambda x: x.topk(3, 0), [rows]),
    "least rows": (lambda x: x[x[:, 0].topk(2, largest=False).indices], [rows]),
    "histogram": (lambda x, i: torch.histc(i.float(), 4, 0, 3), [rows, places]),
}
WRITTEN_BY_MASK: dict[str, tuple[Callable[..., Any], list[Callable[[], Tensor]]]] = {
    "a number": (lambda x: x.index_put((x > 0,), torch.tensor(2.0)), [rows]),
    "a number in rows": (lambda x: x.index_put((x[:, 0] > 0,), torch.tensor([3.0])), [rows]),
    "a row": (lambda x, v: x.index_put((x[:, 0] > 0,), v), [rows, lambda: torch.randn(4)]),
    "a row of one": (lambda x, v: x.index_put((x[:, 0] > 0,), v), [rows, lambda: torch.randn(1, 4)]),
    "columns": (lambda x, v: torch.ops.aten.index_put(x, [None, x[0] > 0], v), [rows, lambda: torch.randn(1)]),
    "columns of a mask": (
        lambda x, c: torch.ops.aten.index_put(x, [None, c], torch.tensor(0.5)),
        [rows, lambda: torch.arange(4) > 2],
    ),
    "a number in rows, summed": (
        lambda x, i: x.exp().index_put((i > 2,), torch.tensor([0.5])).cumsum(0),
        [rows, places],
    ),
    "in two dims": (
        lambda x, v: x.index_put((x[..., 0] > 0,), v),
        [lambda: dynamic(torch.randn(3, 5, 4), 1), lambda: torch.randn(1, 4)],
    ),
    "in order": (lambda x, v: x.masked_scatter(x > 0, v), [rows, lambda: torch.randn(20)]),
    "in order, by row": (lambda x, v: x.masked_scatter(x[:, :1] > 0, v), [rows, lambda: torch.randn(20)]),
    "in order, in more dims": (
        lambda x, v: x.masked_scatter(torch.stack([x > 0, x < 1]), v),
        [rows, lambda: torch.randn(40)],
    ),
    "in order, rows": (lambda x: x.masked_scatter(x[:, :1] > 0, x.exp()), [rows]),
    "in order, along columns": (
        lambda x, v: x.masked_scatter(x > 0, v),
        [lambda: dynamic(torch.randn(4, 5), 1), lambda: torch.randn(20)],
    ),
}
PROGRAMS = SIZES_AS_VALUES | ROWS_BY_NUMBER | ROWS_MOVED | WRITTEN_BY_MASK


@pytest.mark.slow
@pytest.mark.parametrize("fill", ["replica", "zero"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_padding_is_exact(name, fill):
    torch.manual_seed(0)
    function, inputs = PROGRAMS[name]
    found = traced(function, *(make() for make in inputs))
    verdict = found.prove(fill=fill, masked=True)
    assert verdict.refusal is None, str(verdict.refusal)
    assert refute(found, verdict, fill, tolerance=1e-4) is None
    assert refutation(found, verdict, found.sizes()[found.symbols()[0]], fill, tolerance=1e-4) is None  # exact size


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_without_edits_and_forms_it_is_refused_or_wrong(name, monkeypatch):
    """Else the tables above would hold programs that need neither.

    Numbers of real rows that lie inside are right without edits, too; what these are for is tested below.
    """
    torch.manual_seed(0)
    function, inputs = PROGRAMS[name]
    found = traced(function, *(make() for make in inputs))
    assert found.prove().refusal is not None
    monkeypatch.setattr(edits.forms, "form_of", lambda node: None)
    monkeypatch.setattr(masks, "insert", lambda editor, edits: None)
    verdict = found.prove(masked=True)
    assert verdict.refusal is not None or is_wrong(found, verdict) or name in ROWS_BY_NUMBER


def is_wrong(found: Any, verdict: Any) -> bool:
    for bucket in BUCKETS:
        try:
            if any(refutation(found, verdict, bucket, fill) for fill in ("replica", "zero", "poison")):
                return True
        except (IndexError, RuntimeError):  # a padded row's index
            return True
    return False


@pytest.mark.parametrize(
    ("function", "index"),
    [
        (lambda x, i: x[i], [0, 7, 1]),
        (lambda x, i: x[i], [0, -6, 1]),
        (lambda x, i: x.gather(0, i[:, None].expand(-1, 4)), [0, 5, 1]),
        (lambda x, i: x.scatter_add(0, i[:, None].expand(-1, 4), x[:3]), [0, 5, 1]),
        (lambda x, i: x.index_put((i,), x[:3], accumulate=True), [2, 5, 1]),
        (lambda x, i: F.embedding(i, x), [0, 5, 1]),
        (lambda x, i: x.index_reduce(0, i, x[:3], "amax"), [0, -1, 1]),
    ],
)
def test_a_number_outside_never_picks_a_padded_row(function, index):
    """At the exact size it raises, and so it does in a bucket that has such a row."""
    found = traced(function, rows(), torch.tensor([0, 1, 2]))
    verdict = found.prove(masked=True)
    assert verdict.refusal is None
    assert found.prove().refusal is not None, "without numbers of real rows a padded row would be picked"
    padded = found.with_masks(verdict)
    x = torch.randn(13, 4)
    padded.module(x, torch.tensor([0, 1, 2]), torch.tensor(5))
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        padded.module(x, torch.tensor(index), torch.tensor(5))


def test_numbers_are_edited_once_for_all_that_pick_by_them(monkeypatch):
    seen, insert = [], masks.insert
    monkeypatch.setattr(masks, "insert", lambda editor, edits: (seen.extend(edits), insert(editor, edits)))
    found = traced(lambda x, i: (x[i], (x * 2)[i]), rows(), torch.tensor([0, 1, 2]))
    edited = found.prove(masked=True).edited
    assert [type(edit) for edit in seen] == [RowNumbers, RowNumbers]
    first, second = edited.graph.find_nodes(op="call_function", target=torch.ops.aten.index.Tensor)
    assert first.args[1] == second.args[1]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x[-1], x + 1),
        lambda x: (lambda y: (y, y[-1]))(x + 1),
        lambda x: (lambda y: (y[-2:], y[-1]))(x + 1),
        lambda x: x[-2:].t(),
    ],
)
def test_views_that_are_handed_out_stay_views(function):
    """AOTAutograd makes them anew from the strides that it finds."""
    verdict = region(function, rows()).prove(masked=True)
    assert "counted from the" in verdict.refusal.reason or "not fixed" in verdict.refusal.reason


def test_gradients_of_means():
    """The backward divides by the number of rows."""
    weight = torch.randn(4, 4, requires_grad=True)
    for found in regions(lambda x: F.mse_loss(x @ weight, x), rows(), grad=True):
        verdict = found.prove(masked=True)
        assert verdict.refusal is None, str(verdict.refusal)
        assert refute(found, verdict) is None


def test_gradients_of_embeddings():
    weight = torch.randn(9, 4, requires_grad=True)
    for found in regions(lambda i: F.embedding(i, weight, padding_idx=0).sin(), places(9), grad=True):
        verdict = found.prove(masked=True)
        assert verdict.refusal is None, str(verdict.refusal)
        assert refute(found, verdict) is None


def test_a_mask_of_another_dim_is_not_unified_with_what_it_covers():
    """To choose by it would add a guard while the proof is made, after which one symbol stands for both."""
    found = region(lambda x, m: x.index_put((m,), torch.tensor(2.0)), rows(), dynamic(torch.ones(5) > 0))
    symbols = found.symbols()
    assert len(symbols) == 2
    assert "their number depends on values" in found.prove(masked=True).refusal.reason
    assert found.symbols() == symbols


def test_two_dims_one_after_the_other():
    """Means of the entries of both, each counted."""
    found = region(lambda x: x - x.mean(), dynamic(torch.randn(5, 7), 0, 1))
    first, second = found.symbols()
    verdict = found.prove(first, masked=True)
    assert verdict.refusal is None, str(verdict.refusal)
    masked = found.with_masks(verdict)
    verdict = masked.prove(second, masked=True)
    assert verdict.refusal is None, str(verdict.refusal)
    assert refute(masked, verdict) is None


def test_nodes_and_edges():
    """A message passing step: rows of either kind are padded on their own."""

    def step(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, target, x[source].relu()) / x.shape[0]

    edges = [dynamic(torch.randint(0, 5, (8,))) for _ in range(2)]
    found = region(step, rows(), *edges)
    for symbol in found.symbols():
        verdict = found.prove(symbol, masked=True)
        assert verdict.refusal is None, str(verdict.refusal)
        assert refute(found, verdict) is None
        found = found.with_masks(verdict)


def test_rows_repeated():
    """By how many times it is for each, to as many rows as another argument has."""
    counts = dynamic(torch.tensor([1, 2, 0, 3, 1]))
    found = region(lambda x, i, y: x.repeat_interleave(i, 0, output_size=y.shape[0]) * y, rows(), counts, rows(7))
    for symbol in found.symbols():
        verdict = found.prove(symbol, masked=True)
        assert verdict.refusal is None, str(verdict.refusal)
        assert refute(found, verdict) is None
        found = found.with_masks(verdict)


def test_gradients_of_rows_summed_by_bag():
    """The gradient has as many rows, and is padded as they are."""
    bags = torch.tensor([0, 2, 3])
    forward, backward = regions(
        lambda x, i: F.embedding_bag(i, x, bags, mode="mean"), rows().requires_grad_(), places(5, 5), grad=True
    )
    for found in (forward, backward):
        verdict = found.prove(masked=True)
        assert verdict.refusal is None, str(verdict.refusal)
        assert refute(found, verdict) is None


def test_nothing_written_behind_rows():
    """Of a dim that has fewer entries than there are rows, none are left to pick from."""
    found = traced(lambda x: torch.full((3, 4), x.shape[0]).slice_scatter(torch.ones(0, 4), 0, x.shape[0]), rows())
    verdict = found.prove(masked=True)
    assert verdict.refusal is None, str(verdict.refusal)
    assert refute(found, verdict) is None


def test_two_sizes_are_not_made_one_by_a_mask():
    """A comparison of sizes would be a guard, for a dim and a mask that have the same size by chance."""
    found = region(lambda x, m: (x * 2).index_put((m,), torch.tensor(0.5)), rows(), dynamic(torch.rand(5) > 0.5))
    assert all(found.prove(symbol, masked=True).refusal is not None for symbol in found.symbols())


def numbers(x: Tensor) -> Tensor:
    """Of places in a table of seven, one per row, not the same in rows that are alike."""
    return (x[:, 0].cumsum(0).abs() * 3).long() % 7


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x[::2] * 2, "not a multiple of the rows"),
        (lambda x: x.new_ones(70, 4)[x.shape[0] :] * 2, "not a multiple of the rows"),
        (lambda x: x.new_ones(70 - x.shape[0]), "not a multiple of the rows"),
        (lambda x: x.median(0).values, "over the padded rows"),
        (lambda x: torch.ops.aten.index_put(x, [x > 0], x.new_ones(1), True), "their number depends on values"),
        (lambda x: x.masked_scatter(x > 9, x.new_ones(0)), "no padding rule for this operator"),
        (lambda x: torch.histc(x), "bins"),
        (lambda x: torch.zeros(7, 4).scatter_reduce(0, column(x[:, 0].long()), x, "prod"), "padded rows write"),
        (lambda x: torch.zeros(7, 4).index_reduce(0, numbers(x), x, "prod"), "padded rows write"),
        (lambda x: torch.zeros(7, 2).scatter_add(0, column(numbers(x))[:, :2], x.view(-1, 2)), "different places"),
        (lambda x: torch.zeros(7, 4).scatter_add(0, column(numbers(x)[1:]), x), "different places"),
        (
            lambda x: torch.zeros(7, 4).scatter(0, column(numbers(x)), torch.cat([x.new_ones(1, 4), x])),
            "different places",
        ),
        (lambda x: torch.zeros(7).index_put((column(numbers(x)).reshape(-1),), x.t().reshape(-1)), "different places"),
        (
            lambda x: torch.zeros(7).index_add(0, column(numbers(x)).reshape(-1), x.t().reshape(-1)),
            "different places",
        ),
        (
            lambda x: torch.ops.aten._unsafe_masked_index_put_accumulate(
                torch.zeros(7), x.reshape(-1) > 0, [column(numbers(x)).reshape(-1)], x.t().reshape(-1)
            ),
            "different places",
        ),
    ],
)
def test_what_stays_refused_tells_why(function, reason):
    refusal = traced(function, rows()).prove(masked=True).refusal
    assert reason in refusal.reason
