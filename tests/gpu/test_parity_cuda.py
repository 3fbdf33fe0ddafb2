"""The programs of the table of capture parity on a GPU: eager's values, and captured wherever stock records."""

from __future__ import annotations

import pytest

from tests.parity.catalogue import PROGRAMS
from tests.parity.judge import judge


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=[program.name.replace(" ", "_") for program in PROGRAMS])
def test_values_are_eagers_and_what_stock_records_is_captured(program, device):
    outcome = judge(program, device)
    assert outcome.ours is not None
    assert outcome.ours.problem is None
    assert outcome.stock is not None
    if outcome.stock.graphs > 0:
        assert outcome.unexpected == ()
        assert outcome.ours.graphs > 0
