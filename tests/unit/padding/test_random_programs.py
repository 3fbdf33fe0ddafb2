"""Random programs held to the oracle: a verdict of "safe" that execution refutes fails."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.support.oracle import refute
from tests.support.random_programs import programs, trace

seen: Counter[str] = Counter()


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs, st.integers(0, 1), st.sampled_from(["replica", "zero"]))
def check(chosen, row_dim, fill):
    region = trace(chosen, row_dim)
    assume(region.symbols())  # no step fixed the size
    assume(region.runs())  # shapes are not checked everywhere when traced
    assume(region.buckets(*region.symbols()))
    for masked in (False, True):
        verdict = region.prove(fill=fill, masked=masked)
        if verdict.refusal is None:
            seen["masked" if verdict.masks else "safe"] += 1
            text = region.with_masks(verdict).module.print_readable(print_output=False)
            assert refute(region, verdict, fill, tolerance=1e-9) is None, text
            return
    seen["refused"] += 1


@pytest.mark.slow
def test_no_safe_verdict_is_refuted():
    seen.clear()
    check()
    assert seen["safe"] > 30, seen
    assert seen["masked"] > 10, seen
    assert seen["refused"] > 10, seen
