"""``SHAREDGRAPH_DEBUG``: memory that must not be read is overwritten, addresses are checked, graphs are logged."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import nn

import cudagraph_backend as sg
from cudagraph_backend import AddressError, sharedgraph
from cudagraph_backend.compile import region_compile
from cudagraph_backend.drivers.host import HostDriver
from cudagraph_backend.runtime.places import Places
from cudagraph_backend.runtime.readings import Sighting
from cudagraph_backend.runtime.region_state import RegionState

ENVIRONMENT = "SHAREDGRAPH_DEBUG"


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(HostDriver, "poison", False)
    with torch.no_grad():
        yield


@torch.library.custom_op("debug_e2e::wave", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def wave(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


wave.register_fake(torch.empty_like)


def rows(n: int) -> torch.Tensor:
    x = torch.randn(n, 4)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3


def whole_bucket(y: torch.Tensor) -> torch.Tensor:
    """The bucket of eight rows that an output of five is the beginning of."""
    pool = sg.output_pool("cpu").tensor
    first = y.data_ptr() - pool.data_ptr()
    return pool[first : first + 8 * 4 * 4].view(torch.float32).view(8, 4)


# ---- the words


def test_an_unknown_word_is_an_error_of_the_compilation(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "adresses")
    message = (
        f"environment variable {ENVIRONMENT}: got 'adresses' in 'adresses'; accepted are poison, addresses, graphs"
    )
    with pytest.raises(Exception, match=message) as raised:
        torch.compile(double, backend="sharedgraph")(rows(5))
    assert isinstance(raised.value.inner_exception, sg.OptionError)


def test_without_a_word_nothing_is_checked_or_logged(caplog):
    caplog.set_level(logging.INFO, "cudagraph_backend")
    torch.compile(lambda x: x.sum(0), backend="sharedgraph")(rows(5))
    (replayer,) = sharedgraph.regions()
    assert type(replayer.state) is RegionState
    assert not any("before" in message for message in caplog.messages)


# ---- poison


@pytest.mark.parametrize("word", ["poison", ""])
def test_poison_fills_padded_rows_that_a_proof_calls_irrelevant(word, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, word)
    compiled = torch.compile(double, backend="sharedgraph")
    for _ in range(2):  # the run before the capture, and a replay
        x = rows(5)
        y = compiled(x)
        assert torch.equal(y, x * 2)
        assert bool(whole_bucket(y)[5:].isnan().all()) == (word == "poison")
        del y


def test_poison_overwrites_outputs_that_are_dead(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "poison")
    compiled = torch.compile(double, backend="sharedgraph")
    results = [compiled(rows(5)) for _ in range(8)]
    last = max(results, key=torch.Tensor.data_ptr)
    memory = whole_bucket(last)
    assert not memory[:5].isnan().any()
    del results, last
    torch.compile(triple, backend="sharedgraph")(rows(5))  # takes the first bytes that are free
    assert memory.isnan().all()


# ---- addresses


def test_calls_that_are_right_pass_the_check(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "addresses")
    model = nn.Linear(4, 4)
    compiled = torch.compile(model, backend="sharedgraph")
    x = rows(5)
    for _ in range(5):
        expected = model(x)
        x = compiled(x)  # an output of ours, which is read in place
        torch.testing.assert_close(x, expected)
    stats = sg.stats()
    assert stats.replays > stats.captures
    (replayer,) = sharedgraph.regions()
    assert replayer.counters.read_in_place


def test_a_static_input_that_has_moved_is_named(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "addresses")
    model = nn.Linear(4, 4)
    compiled = torch.compile(model, backend="sharedgraph")
    compiled(rows(5))
    compiled(rows(5))
    monkeypatch.setattr(Places, "_is_called_at", lambda *_: True)
    before = model.weight.data_ptr()
    kept = model.weight.data
    model.weight.data = kept.clone()
    found = model.weight.data_ptr()
    message = rf"input \w+ \(\S*weight\) is at {found:#x}, but .* was captured with it at {before:#x}"
    with pytest.raises(AddressError, match=message):
        compiled(rows(5))


def test_an_input_that_is_read_in_place_elsewhere_is_named(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "addresses")
    first, second = (torch.compile(f, backend="sharedgraph") for f in (double, triple))
    for _ in range(2):
        y = first(rows(5))
        before = y.data_ptr()
        second(y)
    monkeypatch.setattr(Sighting, "holds", lambda *_: True)
    other = first(rows(5))
    message = rf"input \w+ \(x\) is at {other.data_ptr():#x}, but .* reads it in place at {before:#x}"
    with pytest.raises(AddressError, match=message):
        second(other)


# ---- graphs


def diffs(caplog, what: str) -> list[str]:
    return [message for message in caplog.messages if message.startswith(f"--- before {what}, region ")]


@pytest.fixture
def logged(monkeypatch, caplog):
    monkeypatch.setenv(ENVIRONMENT, "graphs")
    caplog.set_level(logging.INFO, "cudagraph_backend")
    return caplog


def test_masks_are_logged(logged):
    torch.compile(lambda x: x.exp().sum(0), backend="sharedgraph")(rows(5))
    (diff,) = diffs(logged, "padding masks")
    assert re.search(r"^\+ .*aten\.where\.self", diff, re.MULTILINE)
    assert not diffs(logged, "splitting")
    assert not diffs(logged, "moving scalars")


def test_parts_are_logged_with_the_reason(logged):
    torch.compile(lambda x: wave(x * 2) + 1, backend="sharedgraph")(rows(5))
    (diff,) = diffs(logged, "splitting")
    titles = [line for line in diff.splitlines() if "# part" in line]
    assert titles[0] == "+# part 1: captured"
    assert titles[1].startswith("+# part 2: ")
    assert "debug_e2e.wave" in titles[1]
    assert titles[2:] == ["+# part 3: captured"]


def test_scalars_that_move_are_logged(logged, monkeypatch):
    """On a CPU none does, so something else takes the place of that pass."""

    def rename(graph, device):
        next(iter(graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)))._rename("moved")
        return frozenset()

    monkeypatch.setattr(region_compile, "move_scalars", rename)
    torch.compile(double, backend="sharedgraph")(rows(5))
    (diff,) = diffs(logged, "moving scalars")
    assert re.search(r"^\+ .*\bmoved:", diff, re.MULTILINE)
