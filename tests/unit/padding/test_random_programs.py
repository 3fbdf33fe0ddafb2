"""Random programs held to the oracle: a verdict of "safe" that execution refutes fails."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings

from tests.support.random_programs import SHAPES, UNHURRIED, Outcome, Program, judge, programs
from tests.support.random_steps import NEWER

#: Steps of which no call is padded.
REFUSED = {"cut to half"}

kinds: Counter[str] = Counter()


def checked(program: Program) -> Outcome:
    outcome = judge(program)
    assert outcome.problem is None, outcome.text
    kinds[outcome.kind] += 1
    return outcome


@settings(UNHURRIED, max_examples=60, derandomize=True)
@given(programs)
def check(program):
    checked(program)


@pytest.mark.slow
def test_no_safe_verdict_is_refuted():
    kinds.clear()
    check()
    assert kinds["safe"] > 3, kinds
    assert kinds["edited"] > 10, kinds
    assert kinds["refused"] > 0, kinds


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NEWER))
def test_step_alone(name):
    """Else no program above need hold it: of each step some call is padded."""
    alone = (checked(Program(((name, 0, 0, 0, 1),), shape)) for shape in SHAPES)
    padded = any(name in outcome.steps and outcome.kind in ("safe", "edited") for outcome in alone)
    assert padded == (name not in REFUSED)
