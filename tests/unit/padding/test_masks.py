"""Masks: regions whose real rows meet padded ones, and that are exact once the padded ones are masked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cudagraph_backend.padding import masks
from tests.support.oracle import BUCKETS, dynamic, refutation, refute, region, regions, traced

CHOSEN = torch.tensor([2, 0, 3, 1])


def rows(*shape: int, dim: int = 0) -> torch.Tensor:
    return dynamic(torch.randn(shape or (5, 4)), dim)


def own_table(size: int = 10) -> torch.Tensor:
    return torch.randn(size, 4)


def attention(x, mask=None):
    """As written by hand, over the rows."""
    scores = x @ x.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ x


def causal_by_position(x):
    n = x.shape[-2]
    return attention(x, torch.arange(n)[None, :] <= torch.arange(n)[:, None])


def causal_by_table(x, allowed):
    """Of a table for the longest sequence, the corner that this one needs."""
    n = x.shape[-2]
    return attention(x, allowed[:n, :n])


def write_own_row(x, values):
    """One tensor is the rows, where each one picks itself, and the columns, where padded rows must pick any at all."""
    own = torch.arange(x.shape[0])
    return x.index_put((own, own), values)


def fused(x, **options):
    return F.scaled_dot_product_attention(x.sin(), x.cos(), x.exp(), **options)


def fused_with_mask(x):
    positions = torch.arange(x.shape[2])
    return fused(x, attn_mask=(positions[None] <= positions[:, None]) & (positions[None] > positions[:, None] - 3))


def convolution_backward(x, transposed=False, wanted=(True, True, True)):
    """Of a convolution whose result is as long as what it reads."""
    kernel = torch.linspace(-1, 1, 27).view(3, 3, 3)
    options = ([1], [1], [1], transposed, [0], 1, list(wanted))
    return torch.ops.aten.convolution_backward(x.cos(), x, kernel, [3], *options)


def longer_convolution_backward(x):
    """Of one in two dims, whose result is longer."""
    kernel, grad = torch.linspace(-1, 1, 18).view(3, 3, 2, 1), F.pad(x.cos(), (2, 2, 0, 1))
    options = ([1, 1], [1, 2], [1, 1], False, [0, 0], 1, [True] * 3)
    return torch.ops.aten.convolution_backward(grad[:, :, :5], x, kernel, [3], *options)


def experts(x, weights):
    """Each row by the two experts it chooses."""
    scores, chosen = (x @ x.new_ones(4, 6).tril()).topk(2, -1)
    return (weights[chosen] * scores.softmax(-1)[..., None, None] @ x[:, None, :, None]).sum(1)


#: Function and inputs; each has a mask that can't be left out.
MASKED = {
    "sum": (lambda x: x.sum(0), [rows]),
    "sum of all": (lambda x: x.exp().sum() + x, [rows]),
    "product of entries": (lambda x: x.prod(0), [rows]),
    "softmax": (lambda x: x.softmax(0), [rows]),
    "log softmax": (lambda x: x.log_softmax(0), [rows]),
    "log sum exp": (lambda x: x.logsumexp(0) + x.amin(0), [rows]),
    "maximum of a running sum": (lambda x: x.cumsum(0).amax(0), [rows]),
    "minimum of a running sum": (lambda x: -x.abs().cumsum(0).amin(0) - x.abs().cumsum(0).max(), [rows]),
    "extreme and its place": (lambda x: x.cumsum(0).abs().max(0), [rows]),
    "place of the extreme": (lambda x: x.abs().cumsum(0).argmax(0), [rows]),
    "any of a running sum": (lambda x: (x.abs().cumsum(0) > 8).any(0), [rows]),
    "all of a running sum": (lambda x: (x.abs().cumsum(0) < 8).all(0), [rows]),
    "count": (lambda x: (x.abs() > 0).sum(0), [rows]),
    "product over rows": (lambda x: x.t() @ x, [rows]),
    "product over rows in groups": (lambda x: x.reshape(-1, 4).t() @ x.exp().reshape(-1, 4), [lambda: rows(5, 3, 4)]),
    "product over blocks": (lambda x: torch.cat([x, -x]).t() @ torch.cat([x, x]), [rows]),
    "sum over blocks": (lambda x: torch.cat([x, x.exp()]).sum(0), [rows]),
    "sum over columns": (lambda x: x.reshape(-1).sum() + x, [lambda: rows(3, 5, dim=1)]),
    "attention": (lambda x: attention(x), [lambda: rows(2, 5, 4, dim=1)]),
    "attention by position": (causal_by_position, [lambda: rows(2, 5, 4, dim=1)]),
    "attention by table": (causal_by_table, [lambda: rows(2, 5, 4, dim=1), lambda: torch.ones(900, 900).tril() > 0]),
    "fused attention by position": (fused_with_mask, [lambda: rows(2, 2, 5, 8, dim=2)]),
    "position table": (lambda x, t: x + t[torch.arange(x.shape[0])], [rows, own_table]),
    "position table from the end": (lambda x, t: x + t[9 - torch.arange(x.shape[0])], [rows, own_table]),
    "written on the diagonal": (write_own_row, [lambda: rows(5, 10), lambda: rows(5)]),
    "written by choice": (lambda x, t: t[:9].index_put((x.argmax(1),), x), [rows, own_table]),
    "added by choice": (lambda x, t: t[:9].index_put((x.argmax(1),), x, accumulate=True), [rows, own_table]),
    "convolution": (lambda x: F.conv1d(x, torch.ones(2, 3, 3), padding=1), [lambda: rows(2, 3, 5, dim=2)]),
    "gradients of a convolution": (lambda x: convolution_backward(x), [lambda: rows(2, 3, 5, dim=2)]),
    "gradient of a convolution's input": (
        lambda x: convolution_backward(x, wanted=(True, False, False))[0],
        [lambda: rows(2, 3, 5, dim=2)],
    ),
    "gradient of a convolution's weight": (
        lambda x: convolution_backward(x, wanted=(False, True, False))[1],
        [lambda: rows(2, 3, 5, dim=2)],
    ),
    "gradients of a longer convolution": (longer_convolution_backward, [lambda: rows(2, 3, 4, 5, dim=3)]),
    "running sum over blocks": (lambda x: torch.cat([x, x.exp()]).cumsum(0).chunk(2)[1] * 2, [rows]),
    "running product over columns": (lambda x: x.reshape(-1).cumprod(0).reshape(3, -1), [lambda: rows(3, 5, dim=1)]),
    "running log sum over blocks": (lambda x: torch.cat([x, x.exp()]).logcumsumexp(0).chunk(2)[1] * 2, [rows]),
    "differences": (lambda x: torch.diff(x, prepend=x.new_zeros(1, 4), dim=0).abs().sum(0), [rows]),
    "shifted": (lambda x: (x[1:] * x[:-1]).sum(0), [rows]),
    "windows": (lambda x: x.unfold(0, 3, 1).amax(-1).sum(0), [rows]),
    "behind a first row": (lambda x, t: torch.cat([t[:1], x]).exp().sum(0), [rows, own_table]),
}


@pytest.fixture
def inserted(monkeypatch):
    """The masks that are put into graphs."""
    seen, insert = [], masks.insert
    monkeypatch.setattr(masks, "insert", lambda editor, edits: (seen.extend(edits), insert(editor, edits)))
    return seen


@pytest.mark.parametrize("fill", ["replica", "zero"])
@pytest.mark.parametrize("name", MASKED)
def test_a_mask_makes_padding_exact(name, fill):
    torch.manual_seed(0)
    function, inputs = MASKED[name]
    found = traced(function, *(make() for make in inputs))
    plain, verdict = found.prove(fill=fill), found.prove(fill=fill, masked=True)
    assert verdict.refusal is None, str(verdict.refusal)
    assert refute(found, verdict, fill) is None
    assert bool(verdict.masks) == (plain.refusal is not None)
    assert refutation(found, verdict, found.sizes()[found.symbols()[0]], fill) is None  # at the exact size


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
def test_without_its_masks_the_region_is_wrong(name, monkeypatch):
    """Under one fill or another: else the table above would hold programs that need no mask."""
    torch.manual_seed(0)
    function, inputs = MASKED[name]
    found = traced(function, *(make() for make in inputs))
    wrong = 0
    for fill in ("replica", "zero", "poison"):
        with monkeypatch.context() as patch:
            patch.setattr(masks, "insert", lambda editor, edits: None)
            verdict = found.prove(masked=True)
        for bucket in BUCKETS:
            try:
                wrong += refutation(found, verdict, bucket, fill) is not None
            except (IndexError, RuntimeError):  # a padded row's index
                wrong += 1
    assert wrong


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[-1],  # a view of an input, which AOTAutograd makes anew from its strides
        lambda x: x.t().argmax(),
        lambda x: (x @ x.t()).argmin(),
        lambda x: torch.cat([x, x]).cummax(0).indices.chunk(2)[1] * 2,
        lambda x: x[:, None].expand(-1, x.shape[0], -1).reshape(-1, 4),
        lambda x: F.conv1d(x.t()[None], torch.ones(2, 4, 3), stride=2),
        lambda x: convolution_backward(x[:, :3].t()[None], transposed=True)[0],
        lambda x: convolution_backward(torch.cat([x, x])[:, :3].t()[None])[0].chunk(2, 2)[1] * 2,
    ],
)
def test_what_no_mask_makes_exact_is_refused(function):
    assert traced(function, rows()).prove(masked=True).refusal is not None


def test_places_among_all_entries_stay_where_rows_are_outermost():
    found = traced(lambda x: (x.abs().cumsum(0).argmax(), x.unsqueeze(0).argmin()), rows())
    verdict = found.prove(masked=True)
    assert verdict.masks == 2
    assert refute(found, verdict) is None


def grouped(ends, join=lambda x: x):
    """Of rows in two groups, with a matrix each: their products, and the gradients of these."""

    def run(x, weight):
        rows, offs = join(x), torch.tensor(ends, dtype=torch.int32)
        products = torch.ops.aten._grouped_mm(rows, weight, offs)
        summed = torch.ops.aten._grouped_mm(rows.t(), products, offs)
        return products[: x.shape[0]] * 2, summed

    return run


def matrices():
    return torch.randn(2, 16, 16, dtype=torch.bfloat16)


def test_groups_of_rows():
    torch.manual_seed(0)
    found = traced(grouped([3, 8]), dynamic(torch.randn(8, 16, dtype=torch.bfloat16)), matrices())
    verdict = found.prove(masked=True)
    assert verdict.refusal is None, str(verdict.refusal)
    assert refute(found, verdict, tolerance=1e-2) is None


def test_groups_of_rows_that_are_joined_end_to_end():
    function = grouped([6, 16], lambda x: torch.cat([x, x.exp()]))
    found = traced(function, dynamic(torch.randn(8, 16, dtype=torch.bfloat16)), matrices())
    assert_moved(found, tolerance=1e-2)


def assert_moved(found, **options):
    """Joined rows are put in order, real ones first, and then it is right."""
    verdict = found.prove(masked=True)
    assert "aten::cat" in verdict.forms
    assert refute(found, verdict, **options) is None


def test_gradients_of_groups_of_rows():
    pytest.importorskip("transformers.integrations.moe")
    torch.manual_seed(0)

    def gradients(x, join=lambda x: x):
        offs = torch.tensor([2, 5])
        rows, weight = join(x), torch.linspace(-1, 1, 32).view(2, 4, 4)
        return torch.ops.transformers.grouped_mm_fallback_backward(rows, weight, offs, rows.cos())

    found = traced(lambda x: gradients(x), rows())
    verdict = found.prove(masked=True)
    assert verdict.refusal is None, str(verdict.refusal)
    assert refute(found, verdict) is None
    assert_moved(traced(lambda x: gradients(x, lambda x: torch.cat([x, x.exp()]))[1], rows()))


def test_numbers_without_an_order_have_no_least_one():
    found = traced(lambda x: x.logsumexp(0), dynamic(torch.randn(5, 4, dtype=torch.complex64)), decompose=False)
    assert found.prove(masked=True).refusal.reason == "reduces over the padded rows"


def test_weight_gradients():
    """The backward of a layer sums over the batch: exact over masked rows."""
    layer = nn.Linear(4, 3)
    _, backward = regions(lambda x: layer(x).sin(), rows(), grad=True)
    assert backward.prove().refusal is not None
    verdict = backward.prove(masked=True)
    assert verdict.refusal is None
    assert verdict.masks
    assert refute(backward, verdict) is None


def test_experts_chosen_by_each_row():
    """Nothing shows that the numbers of a padded row's experts are in range."""
    torch.manual_seed(0)
    found = traced(experts, rows(), torch.randn(6, 4, 4))
    assert "no valid index" in found.prove().refusal.reason
    assert refute(found, found.prove(masked=True)) is None


def test_rows_behind_padding_of_the_users_own(inserted):
    found = region(lambda x: F.pad(x, (0, 0, 2, 0)).exp().sum(0), rows())
    verdict = found.prove(masked=True)
    assert [mask.rows.extra for mask in inserted] == [2]
    assert refute(found, verdict) is None


def test_two_dims_masked_one_after_the_other():
    found = region(lambda x: x.softmax(0).exp().softmax(1), dynamic(torch.randn(5, 7), 0, 1))
    first, second = found.symbols()
    verdict = found.prove(first, masked=True)
    assert verdict.masks
    assert refute(found, verdict) is None
    masked = found.with_masks(verdict)
    verdict = masked.prove(second, masked=True)
    assert verdict.masks
    assert refute(masked, verdict) is None


def test_rows_in_two_dims_need_a_mask_in_each(inserted):
    found = traced(lambda x: (x @ x.t()).exp().sum(), rows())
    verdict = found.prove(masked=True)
    assert [mask.rows.dim for mask in inserted] == [0, 1]
    assert refute(found, verdict) is None
