"""What padded rows hold is what was asked for, input by input, however a call passes its inputs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cudagraph_backend as sg

SIZES = (5, 11, 3, 30, 9, 2)


def staged(path):
    """The buffer of an input at the bucket of the last call, by the input's path."""
    replayer = sg.sharedgraph.regions()[-1]
    (tensor,) = (i for i in replayer.region.inputs if i.given is not None and i.given.path == path)
    (place,) = replayer.state.places.listed
    route = next(r for routes in replayer.state.places._routes.values() for r in routes if r.place is place)
    return route.inputs[tensor.index]


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.linear = nn.Linear(8, 6)

    def forward(self, input_ids, attention_mask=None, labels=None, reduction="sum"):
        hidden = self.table(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        return F.cross_entropy(self.linear(hidden.sum(1)), labels, reduction=reduction)


def batch_of(n, device):
    return {
        "input_ids": torch.randint(0, 50, (n, 7), device=device),
        "attention_mask": (torch.rand(n, 7, device=device) > 0.3).float(),
        "labels": torch.randint(0, 6, (n,), device=device),
    }


# ------------------------------------------------------------------------------------------------ buffers


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    labels: torch.Tensor


def _plain(x, labels):
    return x * labels[:, None]


CALLS = {
    "positional": (_plain, lambda f, x, y: f(x, y), "labels"),
    "by keyword": (_plain, lambda f, x, y: f(x, labels=y), "labels"),
    "**kwargs": (lambda x, **kwargs: _plain(x, **kwargs), lambda f, x, y: f(x, labels=y), "kwargs.labels"),
    "dict": (lambda batch: _plain(**batch), lambda f, x, y: f({"x": x, "labels": y}), "batch.labels"),
    "dataclass": (lambda batch: _plain(batch.x, batch.labels), lambda f, x, y: f(Batch(x, y)), "batch.labels"),
    "list": (lambda x, labels: _plain(x, labels[0]), lambda f, x, y: f(x, [y]), "labels.0"),
}


@pytest.mark.parametrize("key", ["last identifier", "path"])
@pytest.mark.parametrize("kind", CALLS)
def test_a_name_means_an_input_however_it_is_passed(kind, key, device):
    function, call, path = CALLS[kind]
    fill = {"labels" if key == "last identifier" else path: -100}
    compiled = torch.compile(function, backend="sharedgraph", dynamic=True, options={"pad": "assume", "fill": fill})
    x, labels = torch.randn(5, 4, device=device), torch.randint(0, 9, (5,), device=device)
    with torch.no_grad():
        torch.testing.assert_close(call(compiled, x, labels), _plain(x, labels))
    assert staged(path).tolist() == labels.tolist() + [-100] * 3
    assert "fill:" not in sg.explain()


@pytest.mark.parametrize(
    ("fill", "x_holds", "labels_hold"),
    [
        ("replica", None, None),
        ("zero", 0, 0),
        (0, 0, 0),
        (-7, -7, -7),
        ({"x": 0.5, "labels": -100}, 0.5, -100),
        ({"x": -torch.inf, "labels": "zero"}, -torch.inf, 0),
        ({"labels": 3}, None, 3),
        ({"x": False, "labels": "replica"}, 0, None),
    ],
)
def test_padded_rows_hold_what_was_asked_for(fill, x_holds, labels_hold, device):
    compiled = torch.compile(_plain, backend="sharedgraph", dynamic=True, options={"pad": "assume", "fill": fill})
    x, labels = torch.randn(5, 4, device=device), torch.randint(0, 9, (5,), device=device)
    with torch.no_grad():
        for _ in range(2):  # captured, then replayed
            torch.testing.assert_close(compiled(x, labels), _plain(x, labels))
    for path, real, number in (("x", x, x_holds), ("labels", labels, labels_hold)):
        padding = real[-1:].expand(3, *real.shape[1:]) if number is None else torch.full_like(real[:3], number)
        assert torch.equal(staged(path), torch.cat([real, padding]))
    assert sg.stats().rows_padded == 2 * 3


def test_a_whole_path_tells_two_inputs_of_one_name_apart(device):
    def function(student, teacher):
        return student["x"] + teacher["x"]

    options = {"pad": "assume", "fill": {"x": 1, "teacher.x": 2}}
    compiled = torch.compile(function, backend="sharedgraph", dynamic=True, options=options)
    x = torch.zeros(5, 2, device=device)
    with torch.no_grad():
        assert torch.equal(compiled({"x": x}, {"x": x.clone()}), x)
    assert (staged("student.x")[5:] == 1).all()
    assert (staged("teacher.x")[5:] == 2).all()


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ignored_labels_make_a_loss_exact(reduction, device):
    """A sum over rows, which no proof allows; whoever knows that -100 is ignored may say so."""
    model = Classifier().to(device).eval()
    options = {"pad": "assume", "fill": {"labels": -100}}
    compiled = torch.compile(model, backend="sharedgraph", options=options)
    with torch.no_grad():
        for n in SIZES:
            batch = batch_of(n, device)
            expected = model(**batch, reduction=reduction)
            torch.testing.assert_close(compiled(**batch, reduction=reduction), expected)
    assert sg.stats().rows_padded > 0
    assert sg.stats().fallbacks == {}


def test_without_the_fill_such_a_loss_is_wrong(device):
    """What the test above rests on: were the labels filled with copies, each padded row would be counted."""
    compiled = torch.compile(F.cross_entropy, backend="sharedgraph", options={"pad": "assume"})
    logits, labels = torch.randn(5, 6, device=device), torch.randint(0, 6, (5,), device=device)
    torch._dynamo.mark_dynamic(logits, 0)
    torch._dynamo.mark_dynamic(labels, 0)
    with torch.no_grad():
        padded = torch.cat([logits, logits[-1:].expand(3, 6)]), torch.cat([labels, labels[-1:].expand(3)])
        torch.testing.assert_close(compiled(logits, labels), F.cross_entropy(*padded))


def test_a_proof_uses_what_each_input_holds(device):
    def function(weights, x):
        return weights.sum(0), x.amax(0), weights[:, None] * x

    check = {"weights": "zero"}, {"weights": 0.0, "x": "replica"}
    for fill in check:
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="sharedgraph", options={"fill": fill})
        with torch.no_grad():
            for n in SIZES:
                args = torch.randn(n, device=device), torch.randn(n, 4, device=device)
                torch.testing.assert_close(compiled(*args), function(*args))
        assert sg.stats().rows_padded > 0
        assert "not padded" not in sg.explain()


@pytest.mark.parametrize("fill", ["zero", "replica", {"weights": 1.0}, {"x": "zero"}, -1])
def test_what_an_input_does_not_hold_takes_a_mask(fill, device):
    def function(weights, x):
        return weights.sum(0), x.amax(0), weights[:, None] * x

    compiled = torch.compile(function, backend="sharedgraph", options={"fill": fill})
    with torch.no_grad():
        for n in SIZES:
            args = torch.randn(n, device=device) - 5, torch.randn(n, 4, device=device) - 5
            torch.testing.assert_close(compiled(*args), function(*args))
    assert ", masked " in sg.explain()


def test_training_with_a_fill_by_name(device):
    """Saved inputs keep their name in the backward region; tangents and the rest have none."""
    options = {"fill": {"x": "zero", "labels": 3}}
    compiled = torch.compile(lambda x, labels: x.sin() * labels[:, None], backend="sharedgraph", options=options)
    for n in SIZES:
        x, labels = torch.randn(n, 4, device=device, requires_grad=True), torch.randint(0, 9, (n,), device=device)
        compiled(x, labels).sum().backward()
        torch.testing.assert_close(x.grad, x.detach().cos() * labels[:, None])
    backward = [r.region for r in sg.sharedgraph.regions() if r.region.kind == "backward"][-1]
    fills = {i.given and i.given.path: i.fill for i in backward.inputs}
    assert fills["x"] == "zero"
    assert fills["labels"] == 3
    assert fills[None] == "replica"
    assert sg.stats().rows_padded > 0


def test_a_number_for_all_inputs_does_not_reach_what_autograd_saves(device):
    """A saved mask is bool, and can't hold it; the user has no name for it either."""
    compiled = torch.compile(lambda x: (x.relu() * 2).relu(), backend="sharedgraph", options={"fill": -3})
    for n in SIZES:
        x = torch.randn(n, 4, device=device, requires_grad=True)
        compiled(x).sum().backward()
        torch.testing.assert_close(x.grad, 2.0 * (x.detach() > 0))
    regions = [r.region for r in sg.sharedgraph.regions()]
    assert {i.fill for r in regions if r.dims for i in r.inputs if i.given is not None} == {-3}
    assert {i.fill for r in regions for i in r.inputs if i.given is None} == {"replica"}


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        ({"mask": -100}, r"'fill': got -100 for input 'mask' of torch\.bool; accepted is a whole number from 0 to 1"),
        ({"batch.ids": 0.5}, r"'fill': got 0\.5 for input 'batch\.ids' of torch\.int64; accepted is a whole number"),
        (torch.nan, r"'fill': got nan for input 'batch\.(ids|mask)' of torch\.\w+; accepted is a whole number"),
        ({}, r"'fill': got {}; accepted is a non-empty dict"),
    ],
)
def test_a_number_that_does_not_fit_is_an_error_when_compiling(fill, message, device):
    def function(batch):
        return batch["ids"] * batch["mask"]

    compiled = torch.compile(function, backend="sharedgraph", dynamic=True, options={"fill": fill})
    batch = {"ids": torch.arange(5, device=device), "mask": torch.ones(5, device=device, dtype=torch.bool)}
    with pytest.raises(Exception, match=message) as raised, torch.no_grad():
        compiled(batch)
    assert isinstance(raised.value, sg.OptionError) or isinstance(raised.value.inner_exception, sg.OptionError)
    assert sg.stats().regions == 0


def test_a_misspelt_name_is_explained(device):
    options = {"fill": {"lables": -100, "x": "zero"}}
    compiled = torch.compile(_plain, backend="sharedgraph", options=options)
    with torch.no_grad():
        for n in (5, 7):
            compiled(torch.randn(n, 4, device=device), labels=torch.zeros(n, device=device))
    lines = [line for line in sg.explain().splitlines() if line.startswith("fill:")]
    assert lines == ["fill: no input is named 'lables' (inputs: labels, x)"]


def test_a_name_that_one_of_several_graphs_has_is_not_misspelt(device):
    def function(x, labels):
        y = x * 2
        torch._dynamo.graph_break()
        return y * labels[:, None]

    compiled = torch.compile(function, backend="sharedgraph", options={"fill": {"labels": -100}})
    with torch.no_grad():
        for n in (5, 7):
            compiled(torch.randn(n, 4, device=device), torch.zeros(n, device=device))
    assert sg.stats().regions > 2
    assert "fill:" not in sg.explain()
