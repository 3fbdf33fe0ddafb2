"""Programs that people pad by hand: ``n`` as a value, rows picked, written and moved by number; graphs are buckets."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cudagraph_backend as sg
from cudagraph_backend.padding.forms import form
from tests.support.regions import BUCKETS, SIZES, check, compiled


def ints(below, *shape, device):
    return torch.randint(0, below, shape, device=device)


PROGRAMS = {
    "mean": lambda x, i: x - x.mean(0),
    "standard deviation": lambda x, i: (x - x.mean()) / x.std(),
    "scaled by n": lambda x, i: x / x.shape[0],
    "batch norm": lambda x, i: F.batch_norm(x, None, None, training=True),
    "loss": lambda x, i: F.cross_entropy(x, i % 8),
    "picked": lambda x, i: x[i].relu(),
    "picked from the end": lambda x, i: x[-1 - i].relu(),
    "messages": lambda x, i: torch.zeros_like(x).index_add(0, i, x[i.flip(0)].relu()),
    "scattered": lambda x, i: torch.zeros_like(x).scatter_add(0, i[:, None].expand(-1, 8), x),
    "scattered mean": lambda x, i: torch.zeros_like(x).scatter_reduce(
        0, i[:, None].expand(-1, 8), x, "mean", include_self=False
    ),
    "sorted": lambda x, i: x[x[:, 0].argsort()].cumsum(0),
    "last row": lambda x, i: x.exp()[-1] * 2,
    "reversed": lambda x, i: x.flip(0) + x,
    "joined": lambda x, i: torch.cat([x, x[:1]]).exp(),
    "stacked": lambda x, i: torch.stack([x, -x]).reshape(-1, 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_graphs_are_buckets(name, device):
    stats = check(PROGRAMS[name], lambda n: [torch.randn(n, 8, device=device), ints(n, n, device=device)])
    assert re.search(r"buckets: (8, 32|8×8, 32×32) \(", sg.explain()), sg.explain()
    assert stats.fallbacks == {}


@pytest.mark.slow
@pytest.mark.parametrize("index", [30, -31])
def test_a_number_outside_raises_though_the_bucket_has_such_a_row(index):
    """On the host: on a GPU an index out of bounds ends the process, in eager as well."""
    function = compiled(lambda x, i: x[i] * 2, capture_sizes=BUCKETS)
    x, i = torch.randn(30, 8), torch.tensor([0, 29, -30, 5])
    torch._dynamo.mark_dynamic(x, 0)
    torch.testing.assert_close(function(x, i), x[i] * 2)
    i[1] = index
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds"):
        function(x, i)
    i[1] = 3
    torch.testing.assert_close(function(x, i), x[i] * 2)


@pytest.mark.slow
def test_training_with_changing_batches(device):
    """Batch norm, an embedding and a mean: forwards and backwards in buckets, with gradients as eager's."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm, self.out = nn.Embedding(20, 8), nn.BatchNorm1d(8), nn.Linear(8, 20)

        def forward(self, i):
            return F.cross_entropy(self.out(self.norm(self.table(i)).relu()), i)

    torch.manual_seed(0)
    model, eager = (Model().to(device) for _ in range(2))
    eager.load_state_dict(model.state_dict())
    step = compiled(model, capture_sizes=BUCKETS)
    for n in SIZES:
        i = ints(20, n, device=device)
        torch._dynamo.mark_dynamic(i, 0)
        ours, theirs = step(i), eager(i)
        ours.backward()
        theirs.backward()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        for one, other in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
            one.grad = other.grad = None
    torch.testing.assert_close(dict(model.named_buffers()), dict(eager.named_buffers()), rtol=1e-4, atol=1e-4)
    assert re.findall(r"buckets: (.+) \(", sg.explain()) == ["8, 32"] * 2, sg.explain()


@pytest.mark.slow
def test_nodes_and_edges_change_apart(device):
    """A graph network: few graphs for many shapes, one for each pair of buckets that is met."""
    weight = torch.randn(8, 8, device=device)

    def network(x, edges):
        source, target = edges
        for _ in range(2):
            x = torch.zeros_like(x).index_add(0, target, (x @ weight).relu()[source]) + x
        return x.mean(0)

    step = compiled(network, capture_sizes=[16, 64])
    for nodes, edges in [(5, 9), (7, 30), (12, 40), (30, 60), (11, 50), (6, 14), (5, 9), (40, 16)]:
        x = torch.randn(nodes, 8, device=device)
        pairs = ints(nodes, 2, edges, device=device)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(pairs, 1)
        torch.testing.assert_close(step(x, pairs), network(x, pairs), rtol=1e-3, atol=1e-3)
    assert re.search(r"buckets: 16×16, 16×64, 64×16, 64×64 \(", sg.explain()), sg.explain()


@pytest.mark.slow
def test_rows_draw_the_numbers_that_they_draw_with_inductor(device):
    """An entry's number depends on its place in memory, which is the same where rows are outermost."""

    def noisy(x):
        return F.dropout(x, 0.5) + torch.rand_like(x) + torch.randn(x.shape[0], 3, device=x.device).sum(1, keepdim=True)

    ours, theirs = compiled(noisy, capture_sizes=BUCKETS), torch.compile(noisy)
    for n in SIZES:
        x = torch.randn(n, 8, device=device)
        torch._dynamo.mark_dynamic(x, 0)
        drawn = []
        for function in (ours, ours, theirs):
            torch.manual_seed(3)
            drawn.append(function(x).clone())
        assert torch.equal(drawn[0], drawn[1])
        torch.testing.assert_close(drawn[0], drawn[2])
    assert re.search(r"buckets: 8, 32 \(", sg.explain()), sg.explain()


@pytest.mark.slow
def test_sizes_that_are_padded_together_may_differ(device):
    """Each has a count of its own: a call in which they differ is not padded, and divides by the right one."""

    def function(table, x):
        y = table[: x.shape[0]] + x
        return y.mean(0), y[-1] * 2, x / x.shape[0], y[torch.arange(x.shape[0], device=x.device) - 1]

    step = compiled(function, capture_sizes=BUCKETS)
    for rows, n in [(7, 7), (9, 9), (12, 7), (31, 11), (9, 9), (12, 12)]:
        table, x = torch.randn(rows, 4, device=device), torch.randn(n, 4, device=device)
        for tensor in (table, x):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        torch.testing.assert_close(step(table, x), function(table, x))


def test_an_unstable_sort_is_made_stable(device):
    """Else a padded row might come before a real one that it equals."""
    step = compiled(lambda x: torch.sort(x > 0, dim=0, stable=False).indices, capture_sizes=BUCKETS)
    x = torch.randn(5, 4, device=device)
    torch._dynamo.mark_dynamic(x, 0)
    assert step(x).max() == 4
    assert "by the number of real rows: aten::sort" in sg.explain()


def test_explain_names_the_operators_that_are_counted(device):
    step = compiled(lambda x: x.mean(0), capture_sizes=BUCKETS)
    x = torch.randn(5, 8, device=device)
    torch._dynamo.mark_dynamic(x, 0)
    step(x)
    assert "by the number of real rows: aten::mean" in sg.explain()


def similar_pairs(z):
    """The NT-Xent loss: both halves of ``[2n]`` are joined end to end, and told apart again."""
    z = F.normalize(torch.cat([z.sin(), z.cos()]), dim=1)
    n = z.shape[0] // 2
    similar = (z @ z.T * 2).masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), float("-inf"))
    places = torch.arange(n, device=z.device)
    return F.cross_entropy(similar, torch.cat([places + n, places])) + z[:n].sum() * z[n:].mean()


def triplets(z):
    distance = torch.cdist(z, z.sin(), compute_mode="donot_use_mm_for_euclid_dist")
    return distance.amax(1) - distance.sum(0)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2))

    def forward(self, x):
        return self.body(x.view(-1, 2, 2, 2))


class Positions(nn.Module):
    """A bias by relative position, as T5 has: the gradient adds up over queries and keys."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 2)

    def forward(self, x):
        at = torch.arange(x.shape[0], device=x.device)
        bias = self.table((at[None] - at[:, None]).clamp(-4, 3) + 4)
        return (bias.permute(2, 0, 1) * x[:, 0]).softmax(-1) @ x


class Sequences(nn.Module):
    """Batches in the second dim, joined with the first in every linear layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, x):
        return self.layer(torch.stack([x, x.sin(), x.cos()])).mean(0)


TRAINED = {
    "similar pairs": lambda: similar_pairs,
    "triplets": lambda: triplets,
    "images": Images,
    "positions": Positions,
    "sequences": Sequences,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_training(name, device):
    torch.manual_seed(0)
    function = TRAINED[name]()
    weights = [*function.to(device).parameters()] if isinstance(function, nn.Module) else []
    call = compiled(function, capture_sizes=BUCKETS)

    def gradients(run, x):
        x = x.clone().requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        return torch.autograd.grad(run(x).sin().sum(), [x, *weights])

    for n in SIZES:
        x = torch.randn(n, 8, device=device)
        torch.testing.assert_close(gradients(call, x), gradients(function, x), rtol=1e-3, atol=1e-4)
    found = re.findall(r"buckets: ([\d, ]+) \(", sg.explain())  # convolutions are compiled anew for larger batches
    assert len(found) >= 2
    assert {size for sizes in found for size in sizes.split(", ")} == {"8", "32"}, sg.explain()
    assert sg.stats().fallbacks == {}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags(mode, options, device):
    """Bags and what is in them change, some bags are empty; forwards, backwards, and calls without gradients."""
    torch.manual_seed(0)
    module = nn.EmbeddingBag(20, 4, mode=mode, **options).to(device)
    if options:
        module.weight.data[options["padding_idx"]] = torch.nan  # which is never read
    call = compiled(module)
    for many, bags in [(9, 4), (14, 5), (31, 7), (12, 3), (6, 9), (40, 12), (33, 8)]:
        indices = ints(20, many, device=device)
        offsets = torch.cat([indices.new_zeros(1), ints(many, bags - 1, device=device).sort().values])
        with torch.no_grad():
            torch.testing.assert_close(call(indices, offsets), module(indices, offsets))
        got, wanted = (torch.autograd.grad(run(indices, offsets).sin().sum(), module.weight) for run in (call, module))
        torch.testing.assert_close(got, wanted)
    assert "one graph per size" not in sg.explain(), sg.explain()


@pytest.mark.slow
def test_rows_are_chosen_by_their_own_weights(device):
    """Each row can only choose one thing; the same seed and size give the same choices."""
    call = compiled(lambda x: torch.multinomial(x.softmax(-1), 2, replacement=True), capture_sizes=BUCKETS)
    for n in SIZES:
        only = ints(6, n, device=device)
        x = F.one_hot(only, 6) * 200.0
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(call(x), only[:, None].expand(-1, 2))
    chosen = []
    for _ in range(2):
        torch.manual_seed(7)
        chosen.append(call(torch.zeros(17, 6, device=device)))
    assert torch.equal(*chosen)
    assert chosen[0].unique().numel() > 3
    assert re.search(r"buckets: 8, 32 \(", sg.explain()), sg.explain()


@pytest.mark.slow
def test_eagers_own_numbers_are_not_drawn_in_buckets():
    with torch._inductor.config.patch(fallback_random=True):
        call = compiled(lambda x: torch.multinomial(x.exp(), 1), capture_sizes=BUCKETS)
        for n in (5, 9):
            x = torch.zeros(n, 6)
            torch._dynamo.mark_dynamic(x, 0)
            call(x)
    assert "draws random numbers for the rows" in sg.explain()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_indices_behind_the_last_offset_are_in_no_bag(mode, device):
    """Forward alone: torch's own gradient reads memory that nobody wrote there (2.13, on a CPU)."""
    weight = torch.randn(20, 4, device=device)

    def function(indices, offsets):
        return F.embedding_bag(indices, weight, offsets, mode=mode, include_last_offset=True)

    call = compiled(function)
    for many in (6, 9, 12, 7, 15):
        indices, offsets = ints(20, many, device=device), torch.tensor([0, 1, 2, many - 2], device=device)
        torch.testing.assert_close(call(indices, offsets), function(indices, offsets))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_another_form_in_the_forward_alone(mode, options, device, monkeypatch):
    """What the forward tells of its bags is what the backward's own operator reads."""
    monkeypatch.delitem(form._FORMS, "aten::_embedding_bag_backward")
    module = nn.EmbeddingBag(20, 4, mode=mode, **options).to(device)
    call = compiled(module)
    for many in (6, 9, 12, 7, 15, 30):
        indices = ints(20, many, device=device)
        offsets = torch.cat([indices.new_zeros(1), ints(many, many // 2, device=device).sort().values])
        got, wanted = (torch.autograd.grad(run(indices, offsets).sin().sum(), module.weight) for run in (call, module))
        torch.testing.assert_close(got, wanted)
    assert "by the number of real rows: aten::_embedding_bag)" in sg.explain()
    assert "no padding rule for this operator (aten._embedding_bag_backward.default)" in sg.explain()
