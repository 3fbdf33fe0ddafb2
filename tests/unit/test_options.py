"""Options: strict, and errors that name the option, what was given and what is accepted."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from cudagraph_backend.backend import Backend
from cudagraph_backend.errors import OptionError
from cudagraph_backend.options import (
    Options,
    checked_options,
    environment_options,
    merged_options,
    mode_options,
    options_of,
)

ACCEPTED = [
    ("capture_sizes", "auto", "auto"),
    ("capture_sizes", [8, 2, 8, 4], (2, 4, 8)),
    ("capture_sizes", range(1, 4), (1, 2, 3)),
    ("capture_sizes", (2**31 - 1,), (2**31 - 1,)),
    ("pad", "prove", "prove"),
    ("pad", "probe", "probe"),
    ("pad", "assume", "assume"),
    ("pad", "off", "off"),
    ("fill", "replica", "replica"),
    ("fill", "zero", "zero"),
    ("fill", 0, 0),
    ("fill", -100, -100),
    ("fill", 0.5, 0.5),
    (
        "fill",
        {"labels": -100, "batch.mask": "zero", "x": "replica"},
        {"labels": -100, "batch.mask": "zero", "x": "replica"},
    ),
    ("on_overwrite", "preserve", "preserve"),
    ("driver", "auto", "auto"),
    ("driver", "host", "host"),
    ("driver", "off", "off"),
    ("strict", True, True),
    ("max_graphs", 1, 1),
    ("verify", "off", "off"),
    ("verify", "capture", "capture"),
    ("inductor", {"max_autotune": True}, {"max_autotune": True}),
    ("inductor", {}, {}),
]

REFUSED = [
    ("capture_sizes", "all", "'auto' or a non-empty list of ints"),
    ("capture_sizes", [], "'auto' or a non-empty list of ints"),
    ("capture_sizes", 8, "'auto' or a non-empty list of ints"),
    ("capture_sizes", {8, 16}, "'auto' or a non-empty list of ints"),
    ("capture_sizes", [8, 0], "it holds 0"),
    ("capture_sizes", [8, -1], "it holds -1"),
    ("capture_sizes", [8, 2.0], "it holds 2.0"),
    ("capture_sizes", [8, True], "it holds True"),
    ("capture_sizes", [8, 2**31], "it holds 2147483648"),
    ("pad", "always", "'prove', 'probe', 'assume', 'off'"),
    ("pad", True, "'prove', 'probe', 'assume', 'off'"),
    ("pad", ["off"], "'prove', 'probe', 'assume', 'off'"),
    ("fill", "one", "'replica', 'zero', a number, or a dict of input names to these"),
    ("fill", None, "'replica', 'zero', a number"),
    ("fill", 1j, "'replica', 'zero', a number"),
    ("fill", [0], "'replica', 'zero', a number"),
    ("fill", {}, "a non-empty dict of input names to 'replica', 'zero' or a number"),
    ("fill", {0: 1}, "it holds the name 0"),
    ("fill", {"": 1}, "it holds the name ''"),
    ("fill", {"x": 1, "labels": None}, "it holds None for 'labels'"),
    ("fill", {"labels": "-100"}, "it holds '-100' for 'labels'"),
    ("fill", {"batch": {"labels": -100}}, "for 'batch'"),
    ("on_overwrite", "copy", "'preserve', 'error'"),
    ("driver", "gpu", "'auto', 'cuda', 'host', 'off'"),
    ("strict", 1, "True or False"),
    ("strict", "yes", "True or False"),
    ("max_graphs", 0, "an int of at least 1"),
    ("max_graphs", -3, "an int of at least 1"),
    ("max_graphs", 2.0, "an int of at least 1"),
    ("max_graphs", True, "an int of at least 1"),
    ("verify", "always", "'off', 'capture'"),
    ("uncapturable_ops", "mylib::op", "a list of operators' names, as ['mylib::op']"),
    ("uncapturable_ops", {"mylib::op": True}, "a list of operators' names, as ['mylib::op']"),
    ("uncapturable_ops", ["mylib::op", "op"], "(it holds 'op')"),
    ("uncapturable_ops", [torch.ops.aten.sin.default], "(it holds <OpOverload"),
    ("inductor", [("max_autotune", True)], "a dict of Inductor's setting names to values"),
    ("inductor", {1: True}, "a dict of Inductor's setting names to values"),
    ("inductor", {"max_autotune": "yes"}, "values of the settings' types"),
    ("inductor", {"triton.cudagraphs": True}, "settings other than 'triton.cudagraphs'"),
    ("inductor", {"triton.cudagraphs": False}, "settings other than 'triton.cudagraphs'"),
    ("inductor", {"triton.cudagraph-trees": True}, "settings other than 'triton.cudagraph-trees'"),
    ("inductor", {"max_autotune": True, "no_such_setting": 1}, "which has no 'no_such_setting'"),
    ("inductor", {"": 1}, "which has no ''"),
    ("inductor", {"triton": {}}, "which has no 'triton'"),
]


def parse_options(given):
    """Options as given, the rest as by default."""
    return options_of(given, None, {}, None)


def test_nothing_given_is_the_defaults():
    assert parse_options(None) == parse_options({}) == Options()


def test_the_defaults_are_those_of_the_design():
    expected = ("auto", "prove", "replica", "preserve", "auto", "auto", False, 512, "off", (), {})
    assert dataclasses.astuple(Options()) == expected


@pytest.mark.parametrize(("name", "given", "parsed"), ACCEPTED)
def test_good_value_is_taken_and_the_rest_stays_default(name: str, given: Any, parsed: Any):
    assert parse_options({name: given}) == dataclasses.replace(Options(), **{name: parsed})


@pytest.mark.parametrize(("name", "given", "accepted"), REFUSED)
def test_bad_value_is_named_with_what_is_accepted(name: str, given: Any, accepted: str):
    with pytest.raises(OptionError) as caught:
        parse_options({name: given})
    assert f"option {name!r}: got {given!r}; accepted is " in str(caught.value)
    assert accepted in str(caught.value)


def test_a_bad_value_beside_good_ones_is_found():
    with pytest.raises(OptionError, match="'max_graphs'"):
        parse_options({"strict": True, "max_graphs": 0})


@pytest.mark.parametrize("name", ["capture_size", "Pad", "", 3, None])
def test_unknown_name_lists_the_names(name: Any):
    with pytest.raises(OptionError) as caught:
        parse_options({name: 1})
    assert f"option {name!r} is unknown" in str(caught.value)
    for known in ("capture_sizes", "pad", "fill", "on_overwrite", "driver", "strict", "max_graphs", "verify"):
        assert known in str(caught.value)


@pytest.mark.parametrize("given", [["strict"], "strict", 3])
def test_options_must_be_a_dict(given: Any):
    with pytest.raises(OptionError, match="accepted is a dict"):
        parse_options(given)


def test_cuda_driver_is_refused_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match=r"'driver': got 'cuda'; accepted is .*'host'"):
        parse_options({"driver": "cuda"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse_options({"driver": "cuda"}).driver == "cuda"


def test_option_errors_are_value_errors():
    with pytest.raises(ValueError, match="strict"):
        parse_options({"strict": None})


def test_options_can_not_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().strict = True  # type: ignore[misc]


def test_a_later_change_of_the_users_dict_changes_nothing():
    sizes, inductor, fill = [4, 8], {"max_autotune": True}, {"labels": -100}
    options = parse_options({"capture_sizes": sizes, "inductor": inductor, "fill": fill})
    sizes.append(16)
    inductor["max_autotune"] = False
    fill["labels"] = 0
    assert options.capture_sizes == (4, 8)
    assert options.inductor == {"max_autotune": True}
    assert options.fill == {"labels": -100}


# ---- options from several places


def test_without_any_the_defaults_hold():
    assert options_of(None, None, {}, None) == options_of({}, "default", {}, "") == Options()


PLACES = ["environment", "configured", "mode", "given"]


@pytest.mark.parametrize("places", [PLACES[first:end] for end in range(1, 5) for first in range(end)])
def test_the_later_place_wins(places: list[str]):
    """In the order of PLACES; the mode says something of Inductor's settings alone."""
    sizes = {place: [8 * (1 + i)] for i, place in enumerate(PLACES)}
    settings = {"environment": False, "configured": False, "mode": True, "given": False}
    said = {p: {"capture_sizes": sizes[p], "inductor": {"max_autotune": settings[p]}} for p in places}
    options = options_of(
        said.get("given"),
        "max-autotune" if "mode" in places else None,
        checked_options(said.get("configured")),
        json.dumps(said["environment"]) if "environment" in places else None,
    )
    of_sizes = [place for place in places if place != "mode"]
    assert options.capture_sizes == (tuple(sizes[of_sizes[-1]]) if of_sizes else "auto")
    assert options.inductor["max_autotune"] is settings[places[-1]]


def test_settings_of_inductor_are_merged_one_by_one_and_all_else_option_by_option():
    layers = [
        {"inductor": {"max_autotune": True, "epilogue_fusion": True}, "fill": {"x": 1, "y": 2}, "strict": True},
        {"inductor": {"epilogue_fusion": False}, "fill": {"x": 3}},
        {"inductor": {}},
    ]
    before = json.dumps(layers)
    assert merged_options(layers) == {
        "inductor": {"max_autotune": True, "epilogue_fusion": False},
        "fill": {"x": 3},
        "strict": True,
    }
    assert json.dumps(layers) == before


def test_a_setting_is_one_however_it_is_spelled():
    options = options_of({"inductor": {"max-autotune": False}}, "max-autotune", {}, None)
    assert options.inductor["max_autotune"] is False
    assert set(options.inductor) == {"max_autotune", "coordinate_descent_tuning"}


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
def test_modes_that_say_nothing(mode: str | None):
    assert options_of(None, mode, {}, None) == Options()


@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_that_tune_say_what_torch_says_without_graphs(mode: str):
    settings = mode_options(mode)["inductor"]
    assert settings["max_autotune"] is True
    stocks = torch._inductor.list_mode_options(mode)
    assert settings == {name: value for name, value in stocks.items() if name != "triton.cudagraphs"}
    assert checked_options({"inductor": settings}) == {"inductor": settings}


@pytest.mark.parametrize("mode", ["", "lite", "Default", "max_autotune", 3, ["default"], True])
def test_another_mode_lists_those_that_are_accepted(mode: Any):
    with pytest.raises(OptionError) as caught:
        mode_options(mode)
    accepted = "None, 'default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs'"
    assert str(caught.value).startswith(f"mode: got {mode!r}; accepted is {accepted}")
    assert "options={'inductor': {...}}" in str(caught.value)


@pytest.mark.parametrize(("name", "given", "parsed"), ACCEPTED)
def test_the_environment_accepts_what_json_can_say_of_the_same_values(name: str, given: Any, parsed: Any):
    text = json.dumps({name: list(given) if isinstance(given, range) else given})
    assert environment_options(text) == {name: parsed}


@pytest.mark.parametrize("text", ["pad", "{", "{'pad': 'off'}", "[]", "null", "3", '"pad"', "true", " "])
def test_what_is_no_json_object_names_the_variable(text: str):
    with pytest.raises(OptionError) as caught:
        environment_options(text)
    message = str(caught.value)
    assert message.startswith(f"environment variable SHAREDGRAPH_OPTIONS: got {text!r}; accepted is a JSON object")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pad": "never"}, "option 'pad': got 'never'; accepted is one of 'prove'"),
        ({"strict": 1}, "option 'strict': got 1; accepted is True or False"),
        ({"padd": "off"}, "option 'padd' is unknown; accepted are capture_sizes, pad"),
        ({"inductor": {"triton.cudagraphs": True}}, "option 'inductor': got "),
    ],
)
def test_a_bad_option_in_the_environment_names_the_variable(given: dict[str, Any], message: str):
    with pytest.raises(OptionError) as caught:
        options_of({"pad": "off"}, None, {}, json.dumps(given))
    assert str(caught.value).startswith(f"environment variable SHAREDGRAPH_OPTIONS: {message}")


# ---- configure


def test_configure_adds_to_what_is_configured_and_tells_all_of_it():
    backend = Backend()
    assert backend.configure() == {}
    assert backend.configure(pad="off", inductor={"max_autotune": True}) == {
        "pad": "off",
        "inductor": {"max_autotune": True},
    }
    told = backend.configure(strict=True, inductor={"epilogue_fusion": False})
    assert told == {"pad": "off", "strict": True, "inductor": {"max_autotune": True, "epilogue_fusion": False}}
    told["pad"] = "prove"  # a copy
    told["inductor"]["max_autotune"] = False
    assert backend.configure(pad="assume")["inductor"] == {"max_autotune": True, "epilogue_fusion": False}
    backend.reset()
    assert backend.configure()["pad"] == "assume"
    backend.unconfigure()
    assert backend.configure() == {}


def test_a_bad_option_is_told_at_once_and_nothing_is_set():
    backend = Backend()
    with pytest.raises(OptionError, match="option 'pad': got 'never'"):
        backend.configure(strict=True, pad="never")
    with pytest.raises(OptionError, match="option 'padd' is unknown"):
        backend.configure(strict=True, padd="off")
    assert backend.configure() == {}
