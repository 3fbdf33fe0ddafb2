"""The option ``fill``: which input a name means, what a dtype can hold, and what the proof makes of it."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cudagraph_backend.compile.analysis import analyse
from cudagraph_backend.errors import OptionError
from cudagraph_backend.fill import InputName, fill_for, key_of
from cudagraph_backend.options import Options
from cudagraph_backend.padding.prove import prove
from tests.support.graphs import captured
from tests.support.oracle import dynamic, refute, region
from tests.support.random_programs import Program, trace

# ------------------------------------------------------------------------------------------------ names

SOURCES = [
    ("L['labels']", "labels", "labels"),
    ("L['kwargs']['labels']", "kwargs.labels", "labels"),
    ("L['batch'].labels", "batch.labels", "labels"),
    ("L['encoding'].data['labels']", "encoding.data.labels", "labels"),
    ("L['args'][0]", "args.0", "args"),
    ("L['cache'].layers[-1].keys", "cache.layers.-1.keys", "keys"),
    ("L['batch']['a b']", "batch.a b", "a b"),
    ("G['table']", "table", "table"),
    ("L_x_", "L_x_", "L_x_"),
    ("list(L['x'].values())[0]", "list(L['x'].values())[0]", "list(L['x'].values())[0]"),
    ("___from_numpy(", "___from_numpy(", "___from_numpy("),
    ("0", "0", "0"),
]


@pytest.mark.parametrize(("source", "path", "last"), SOURCES)
def test_a_source_has_a_path_and_a_last_identifier(source: str, path: str, last: str):
    assert InputName.of(source) == InputName(path, last)


def test_a_whole_path_comes_before_a_last_identifier():
    name = InputName.of("L['teacher']['labels']")
    assert key_of({"labels": 1, "teacher.labels": 2}, name) == "teacher.labels"
    assert key_of({"labels": 1, "student.labels": 2}, name) == "labels"
    assert key_of({"teacher": 1}, name) is None


# ------------------------------------------------------------------------------------------------ numbers

X = InputName("batch.x", "x")
HELD = [
    (-100, torch.int64, -100),
    (-100.0, torch.int16, -100),
    (255, torch.uint8, 255),
    (2**63, torch.uint64, 2**63),
    (True, torch.bool, 1),
    (1.0, torch.bool, 1),
    (-100, torch.float16, -100.0),
    (0.1, torch.bfloat16, 0.1),
    (2**70, torch.float32, 2.0**70),
    (-math.inf, torch.float32, -math.inf),
    (math.inf, torch.float8_e5m2, math.inf),
    (3, torch.complex64, 3.0),
    (-448, torch.float8_e4m3fn, -448.0),
]
NOT_HELD = [
    (-100, torch.uint8, "a whole number from 0 to 255"),
    (-100, torch.bool, "a whole number from 0 to 1"),
    (0.5, torch.bool, "a whole number from 0 to 1"),
    (0.5, torch.int64, "a whole number from -9223372036854775808 to 9223372036854775807"),
    (2**63, torch.int64, "a whole number from"),
    (math.nan, torch.int32, "a whole number from"),
    (math.inf, torch.int32, "a whole number from"),
    (70000.0, torch.float16, "a number from -65504 to 65504"),
    (10**400, torch.float64, "a number from"),
    (449, torch.float8_e4m3fn, "a number from -448 to 448"),
    (math.inf, torch.float8_e4m3fn, "a number from -448 to 448"),
]


@pytest.mark.parametrize(("number", "dtype", "expected"), HELD)
def test_a_number_that_a_dtype_holds_fills_its_rows(number: float, dtype: torch.dtype, expected: float):
    found = fill_for({"x": number}, X, dtype, padded=True)
    assert found == expected
    assert type(found) is type(expected)
    held = torch.zeros(3).to(dtype).fill_(found)[0].item()
    assert held == pytest.approx(number, rel=1e-2)


@pytest.mark.parametrize(("number", "dtype", "accepted"), NOT_HELD)
def test_a_number_that_a_dtype_does_not_hold_is_an_error(number: float, dtype: torch.dtype, accepted: str):
    for fills in ({"x": number}, {"batch.x": number}, number):
        with pytest.raises(OptionError) as caught:
            fill_for(fills, X, dtype, padded=True)
        key = next(iter(fills)) if isinstance(fills, dict) else "batch.x"
        assert f"option 'fill': got {number!r} for input {key!r} of {dtype}; accepted is {accepted}" in str(
            caught.value
        )
        assert f"fill={{{key!r}: …}}" in str(caught.value)


def test_not_a_number_stays_one_in_floats():
    assert math.isnan(fill_for(math.nan, X, torch.float16, padded=True))


@pytest.mark.parametrize("zero", ["zero", 0, 0.0, -0.0, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_every_zero_is_the_same(zero: Any, dtype: torch.dtype):
    assert fill_for({"x": zero}, X, dtype, padded=True) == "zero"
    assert fill_for(zero, X, dtype, padded=True) == fill_for(zero, None, dtype, padded=True) == "zero"


def test_inputs_that_are_not_named_hold_replicas():
    assert fill_for({"y": 7}, X, torch.float32, padded=True) == "replica"
    assert fill_for({"y": 7}, None, torch.float32, padded=True) == "replica"


def test_a_number_for_all_inputs_is_for_those_of_the_call_that_are_padded():
    assert fill_for(7, X, torch.float32, padded=True) == 7
    assert fill_for(7, None, torch.bool, padded=True) == "replica"
    assert fill_for(7, X, torch.bool, padded=False) == "replica"


def test_a_number_given_by_name_must_fit_before_anything_is_padded():
    with pytest.raises(OptionError, match=r"torch\.bool"):
        fill_for({"x": 7}, X, torch.bool, padded=False)


# ------------------------------------------------------------------------------------------------ regions


def test_names_reach_the_inputs_of_a_region():
    gm, example_inputs = captured(lambda x, labels: x + labels[:, None], torch.randn(5, 3), torch.zeros(5).long())
    sources = ["L['labels'].size()[0]", "L['labels']", "L['x'].size()[1]", "L['x']"]  # as they are first used
    options = Options(fill={"labels": -100})
    region = analyse(gm, example_inputs, "inference", (), options, 0, [InputName.of(s) for s in sources])
    assert [(i.given.path, i.fill) for i in region.inputs] == [("labels", -100), ("x", "replica")]
    unnamed = analyse(gm, example_inputs, "inference", (), options, 0)
    assert [(i.given, i.fill) for i in unnamed.inputs] == [(None, "replica")] * 2


@pytest.mark.parametrize("fill", [0, -1.5])
def test_expanded_rows_can_not_hold_a_number(fill: float):
    gm, example_inputs = captured(lambda x: x * 2, torch.randn(1, 4).expand(6, 4))
    names = [InputName("x", "x")] * len(example_inputs)

    def refusals(**fills: float) -> str:
        dims = analyse(gm, example_inputs, "inference", (), Options(fill=fills), 0, names).dims
        return " ".join(str(dim.refusal) for dim in dims)

    assert f"expanded along the dynamic dim, so its padded rows can't be {fill or 'zero'}" in refusals(x=fill)
    assert "expanded" not in refusals(y=fill)


# ------------------------------------------------------------------------------------------------ the proof


def _two(function: Any) -> tuple[Any, list[str]]:
    found = region(function, dynamic(torch.randn(5, 4)), dynamic(torch.randn(5, 4)))
    names = [str(n.target) for n in found.module.graph.find_nodes(op="placeholder")]
    return found, [n for n, meta in zip(names, found.metas, strict=True) if isinstance(meta, torch.Tensor)]


def test_each_input_holds_what_was_given_for_it():
    found, (x, y) = _two(lambda x, y: (x.sum(0), y.amax(0), x * y))
    symbols = frozenset(found.symbols())

    def refusal(**fills: Any) -> Any:
        return prove(found.module.graph, symbols, {x: fills["x"], y: fills["y"]}).refusal

    assert refusal(x="zero", y="replica") is None
    assert refusal(x=0, y="replica") is None
    assert refusal(x="replica", y="replica").op == "aten.sum.dim_IntList"
    assert refusal(x="zero", y="zero").op == "aten.amax.default"
    assert refusal(x="zero", y=-1e30).op == "aten.amax.default"
    assert refusal(x=1, y="replica").op == "aten.sum.dim_IntList"
    assert prove(found.module.graph, symbols, {x: "zero", y: "replica"}).needs_fill


ROW_BY_ROW = ["affine", "relu", "sign", "add", "mul", "where", "linear", "any"]
ROWS_MEET = ["sum", "amax", "max and place", "amin of all", "inner", "any", "look up", "write table", "add to table"]
FILLS = ["replica", "zero", "poison"]
numbers = st.integers(0, 7)
seen: Counter[str] = Counter()
first_steps = st.lists(st.tuples(st.sampled_from(ROW_BY_ROW), st.just(0), numbers, st.just(0), st.just(0)), max_size=3)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(first_steps, st.sampled_from(ROWS_MEET), numbers, st.lists(st.sampled_from(FILLS), min_size=6, max_size=6))
def check_random_program(chosen: Any, last: str, other: int, choice: list[str]):
    steps = (*chosen, (last, 0, other, 0, 0))
    found = trace(Program(steps, "rows outside", "replica", torch.float64, None))
    assume(found.symbols())
    assume(found.runs())
    assume(found.buckets(*found.symbols()))
    fills = dict(zip(found.names, choice, strict=False))
    verdict = found.prove(fill={name: -100 if fill == "poison" else fill for name, fill in fills.items()})
    seen["refused" if verdict.refusal else "safe with fill" if verdict.needs_fill else "safe"] += 1
    if verdict.refusal is None:
        assert refute(found, verdict, fills, tolerance=1e-9) is None, found.module.print_readable(print_output=False)


@pytest.mark.slow
def test_no_verdict_on_inputs_that_are_filled_differently_is_refuted():
    """In place of a number, of which a proof knows nothing, padded rows hold what does the most harm."""
    seen.clear()
    check_random_program()
    assert seen["safe with fill"] > 10, seen
    assert seen["refused"] > 10, seen


def test_different_fills_do_not_add_up_to_either():
    """Zeros plus copies of the last row are neither; only the product keeps the zeros."""
    found, (x, y) = _two(lambda x, y: (x + y).amax(0))
    assert prove(found.module.graph, frozenset(found.symbols()), {x: "zero", y: "replica"}).refusal is not None
    assert prove(found.module.graph, frozenset(found.symbols()), {x: "replica", y: "replica"}).refusal is None


def test_inputs_without_an_entry_may_hold_anything():
    found, (x, _) = _two(lambda x, y: (x.sum(0), y * 2))
    verdict = prove(found.module.graph, frozenset(found.symbols()), {x: "zero"})
    assert verdict.refusal is None
    found, (_, y) = _two(lambda x, y: (x.sum(0), y * 2))
    assert prove(found.module.graph, frozenset(found.symbols()), {y: "zero"}).refusal is not None


def test_an_index_that_a_number_fills_may_be_no_index():
    """A table may be indexed by copies of an index or by zeros, but -100 is a place outside of it."""
    table = torch.randn(9, 4)
    found = region(lambda ids: table[ids], dynamic(torch.randint(0, 9, (5,))))
    for fill in ("replica", "zero"):
        verdict = found.prove(fill=fill)
        assert verdict.refusal is None
        assert verdict.needs_fill
        assert refute(found, verdict, fill) is None
    assert found.prove(fill=-100).refusal is not None
    assert found.prove(fill=3).refusal is not None


@pytest.mark.parametrize("fill", [-100, 1, math.nan, math.inf])
def test_a_number_proves_what_anything_proves(fill: float):
    found = region(lambda x: x.softmax(1) * 2, dynamic(torch.randn(5, 4)))
    assert found.prove(fill=fill).refusal is None
    assert not found.prove(fill=fill).needs_fill
    summed = region(lambda x: x.sum(0), dynamic(torch.randn(5, 4)))
    assert summed.prove(fill=fill).refusal is not None
    assert summed.prove(fill=0.0).refusal is None
