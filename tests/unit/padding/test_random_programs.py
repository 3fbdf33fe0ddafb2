"""Random programs held to the oracle: a verdict of "safe" that execution refutes fails."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

from tests.support.random_programs import SHAPES, Outcome, Program, judge, programs
from tests.support.random_steps import NEWER

#: Steps that are refused, or padded only in part, alone in every shape.
REFUSED = {"cut to half", "every other", "median", "put by mask", "put where less", "reduce at, prod"}

kinds: Counter[str] = Counter()


def checked(program: Program) -> Outcome:
    outcome = judge(program)
    assert outcome.problem is None, outcome.text
    kinds[outcome.kind] += 1
    return outcome


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
@given(programs)
def check(program):
    checked(program)


@pytest.mark.slow
def test_no_safe_verdict_is_refuted():
    kinds.clear()
    check()
    assert kinds["safe"] > 5, kinds
    assert kinds["edited"] > 25, kinds
    assert kinds["refused"] > 10, kinds


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NEWER))
def test_step_alone(name):
    """Else no program above need hold it: of each step some call is padded."""
    alone = (checked(Program(((name, 0, 0, 0, 1),), shape)) for shape in SHAPES)
    padded = any(name in outcome.steps and outcome.kind in ("safe", "edited") for outcome in alone)
    assert padded == (name not in REFUSED)
