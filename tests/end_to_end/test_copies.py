"""Modules that hold compiled functions are copied, pickled and saved as with Inductor."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import cudagraph_backend as sg


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).relu()


def doubled(x):
    return x * 2


def in_place(backend):
    model = Model()
    model.compile(backend=backend)
    return model


def wrapped(backend):
    return torch.compile(Model(), backend=backend)


class Holder(Model):
    """Has compiled things as attributes: a module, or a function too."""

    def __init__(self, backend, function=None):
        super().__init__()
        self.inner = torch.compile(Model(), backend=backend)
        self.function = torch.compile(function, backend=backend) if function is not None else nn.Identity()

    def forward(self, x):
        return self.function(self.inner(self.linear(x)))


def holder_of_function(backend):
    return Holder(backend, doubled)


class HolderOfMethod(Model):
    def __init__(self, backend):
        super().__init__()
        self.compiled = torch.compile(self.method, backend=backend)

    def method(self, x):
        return self.linear(x) * 3

    def forward(self, x):
        return self.compiled(x)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def state_loaded(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(torch.load(file))
    return other


def outcome(backend, make, duplicate, is_called, device):
    """What a copy of a module answers, once with parameters of its own for certain: two tensors, or an error's type."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make(backend).to(device)
    x = torch.randn(5, 4, device=device)
    with torch.no_grad():
        if is_called:
            model(x)
        try:
            other = duplicate(model)
        except Exception as error:
            return type(error)
        answered = other(x)
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        return answered, other(x)


@pytest.mark.slow
@pytest.mark.parametrize("is_called", [False, True], ids=["fresh", "called"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled, saved, state_loaded])
@pytest.mark.parametrize("make", [in_place, wrapped, Holder, holder_of_function, HolderOfMethod])
def test_as_with_inductor(make, duplicate, is_called, device):
    expected = outcome("inductor", make, duplicate, is_called, device)
    found = outcome("sharedgraph", make, duplicate, is_called, device)
    if isinstance(expected, type):
        assert found is expected
        return
    assert isinstance(found, tuple), f"{found}, where Inductor has no error"
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_a_copy_of_a_wrapped_module_is_captured_too(duplicate, device):
    model = wrapped("sharedgraph").to(device)
    x = torch.randn(5, 4, device=device)
    with torch.no_grad():
        model(x)
        other = duplicate(model)
        other._orig_mod.linear.weight.zero_()
        other._orig_mod.linear.bias.fill_(3)
        for _ in range(2):
            torch.testing.assert_close(other(x), torch.full_like(x, 3))
            torch.testing.assert_close(model(x), model._orig_mod.forward(x))
    assert sg.stats().captures == 2
    assert sg.stats().fallbacks == {}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
def test_a_copy_of_the_backend_is_the_one_of_the_process(duplicate):
    assert duplicate(sg.sharedgraph) is sg.sharedgraph


LOAD = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
import cudagraph_backend
x = torch.ones(5, 4)
with torch.no_grad():
    torch.testing.assert_close(model(x), model._orig_mod.forward(x))
assert cudagraph_backend.stats().captures == 1
"""


@pytest.mark.slow
def test_a_saved_module_is_loaded_in_another_process(tmp_path):
    model = torch.compile(nn.Linear(4, 4), backend="sharedgraph")
    torch.save(model, tmp_path / "model.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
