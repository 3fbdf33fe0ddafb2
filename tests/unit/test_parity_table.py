"""The list of programs, and the table of what was found of them."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks.rows import Environment
from tests.parity import __main__ as command
from tests.parity.catalogue import PROGRAMS
from tests.parity.judge import Outcome, Side
from tests.parity.table import as_json, document, from_json, line, summary

H100 = Environment("NVIDIA H100", "580.1", "2.11.0", "3.6.0", "3.12", "abc1234", "2026-11-24")
CPU = Environment("CPU", "", "2.13.0", "", "3.11", "abc1234", "2026-11-24")


def outcome(name="one", expected="captured", unexpected=(), stock: Side | None = None, **ours) -> Outcome:
    return Outcome(name, "Kind", "What it does", expected, unexpected, "", stock, Side(**ours))


RIGHT = outcome(stock=Side(graphs=2, partitions=3), graphs=1)
PARTLY = outcome(expected="partly", stock=Side(graphs=2, skips=1), graphs=1, uncaptured=("waits (aten.x)",))
MISSED = outcome(stock=Side(graphs=1), unexpected=("a | b",), uncaptured=("a | b",))
MISSED_IN_PART = outcome(stock=Side(graphs=1), graphs=2, unexpected=("a",), uncaptured=("a",))
MISSED_AS_IT_SAYS = outcome(expected="no", stock=Side(graphs=1))
NOT_EVEN_STOCK = outcome(stock=Side(), unexpected=("a",), uncaptured=("a",))
WRONG = outcome(stock=Side(graphs=1), graphs=1, problem="5 instead of 4")
STOCK_IS_WRONG = outcome(stock=Side(graphs=1, problem="RuntimeError: overwritten"), graphs=1)
LEFT_OUT = Outcome("two", "Kind", "What", "captured", left_out="needs a GPU: it must")
LOST_ON_A_CPU = outcome(unexpected=("a",), graphs=1, uncaptured=("a",))
MORE_ON_A_CPU = outcome(expected="partly", graphs=1)


def test_names_say_which_program_and_descriptions_say_what_it_does():
    names = [program.name for program in PROGRAMS]
    assert len(names) == len(set(names)) >= 60
    assert all(program.what for program in PROGRAMS)
    assert {program.expected for program in PROGRAMS} == {"captured", "partly", "no"}
    assert 10 < sum(bool(program.needs_cuda) for program in PROGRAMS) < 60


def test_settings_of_programs_are_settings_of_torch():
    """A misspelt one would be left out as if the release did not have it."""
    later = {"cudagraph_unsafe_unbacked_ops", "test_configs.graphsafe_rng_func_ignores_fallback_random"}
    for program in PROGRAMS:
        for config, settings in ((torch._inductor.config, program.inductor), (torch._dynamo.config, program.dynamo)):
            assert [name for name in settings if not hasattr(config, name) and name not in later] == []


@pytest.mark.parametrize("found", [MISSED, MISSED_IN_PART, MISSED_AS_IT_SAYS, WRONG, LOST_ON_A_CPU, MORE_ON_A_CPU])
def test_what_fails(found):
    assert found.failed


@pytest.mark.parametrize("found", [RIGHT, PARTLY, NOT_EVEN_STOCK, STOCK_IS_WRONG, LEFT_OUT])
def test_what_does_not_fail(found):
    assert not found.failed


def test_counts():
    found = [RIGHT, PARTLY, MISSED, MISSED_IN_PART, NOT_EVEN_STOCK, WRONG, STOCK_IS_WRONG]
    text = summary(found)
    assert "7 programs" in text
    assert "Ours captures 5 (2 of them partly), stock records graphs in 6." in text
    assert "Captured by stock and not by ours: 2." in text
    assert "Wrong values or errors: ours 1, stock 1." in text


def test_counts_on_a_cpu():
    text = summary([outcome(graphs=1), LOST_ON_A_CPU, LEFT_OUT])
    assert "3 programs, 1 of them left out as they need a GPU" in text
    assert "Ours captures 2 (1 of them partly). Not as the program says: 1. Wrong values or errors: 0." in text


def test_rows():
    assert line(RIGHT) == "| **one**: what it does | 2, 3 partitions | 1 | captured | equal |  |"
    assert line(PARTLY) == "| **one**: what it does | 2, 1 skipped | 1 | partly | equal | waits (aten.x) |"
    assert line(MISSED) == "| **one**: what it does | 1 | 0 | **missed** (no) | equal | **a \\| b** |"
    assert "| **ours**: 5 instead of 4 |" in line(WRONG)
    assert "| **stock**: RuntimeError: overwritten |" in line(STOCK_IS_WRONG)
    assert line(LEFT_OUT) == "| **two**: what |  |  |  |  | needs a GPU: it must |"


def test_page_names_where_it_was_made():
    page = document([RIGHT, LEFT_OUT], H100, "the command")
    assert "Written by `the command`." in page
    assert "NVIDIA H100, driver 580.1, torch 2.11.0, commit abc1234, 2026-11-24." in page
    assert "## Kind\n\n| behaviour |" in page
    assert "CPU with the host driver, torch 2.13.0" in document([LEFT_OUT], CPU, "the command")


def test_what_was_found_elsewhere_is_written_here(tmp_path, monkeypatch, capsys):
    found = [RIGHT, PARTLY, MISSED, LEFT_OUT]
    assert from_json(json.loads(json.dumps(as_json(found, H100)))) == (found, H100)
    given, page = tmp_path / "found.json", tmp_path / "docs" / "page.md"
    given.write_text(json.dumps(as_json(found, H100)))
    monkeypatch.setattr(sys, "argv", ["parity", "--from-json", str(given), "--write", str(page)])
    assert command.main() == 1  # as there is one that is missed
    assert "Captured by stock and not by ours: 1." in capsys.readouterr().out
    assert f"python -m tests.parity --device cuda --write {page.as_posix()}" in page.read_text()
    given.write_text(json.dumps(as_json([RIGHT, PARTLY, LEFT_OUT], H100)))
    assert command.main() == 0
