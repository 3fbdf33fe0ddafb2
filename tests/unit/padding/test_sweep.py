"""A quick part of the sweep over torch's operators, and proof that the sweep would notice a wrong rule."""

from __future__ import annotations

import copy
import dataclasses
import os
import time

import pytest
from torch.testing._internal.common_methods_invocations import op_db

from cudagraph_backend.padding.call import RULES, RegisteredRule
from cudagraph_backend.padding.lattice import FREE, Fact
from cudagraph_backend.padding.symbolic import row_dims
from tests.opinfo.judge import FILLS, Outcome
from tests.opinfo.report import markdown, summary
from tests.opinfo.sweep import Limits, judge_operator, sweep

OPS = {op.formatted_name: op for op in op_db}
#: A few of every kind of rule.
CHOSEN = [
    *("add", "amax", "argmax", "cat", "cdist", "cummax", "cumsum", "diagonal", "expand", "fft_rfft", "flip", "gather"),
    *(
        "index_add",
        "index_put",
        "index_select",
        "linalg_cholesky_ex",
        "linalg_solve",
        "logsumexp",
        "masked_fill",
        "mean",
    ),
    *("mm", "nn_functional_conv1d", "nn_functional_embedding", "nn_functional_layer_norm", "nn_functional_max_pool1d"),
    *("repeat", "scatter_add", "searchsorted", "select", "select_scatter", "softmax", "sort", "split", "sum"),
    *("take_along_dim", "topk", "tril", "where"),
]


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return [outcome for name in CHOSEN for outcome in judge_operator(OPS[name], samples=2)]


@pytest.mark.slow
def test_no_safe_verdict_is_refuted(outcomes):
    assert [(outcome.op, outcome.dims, outcome.wrong) for outcome in outcomes if outcome.wrong] == []


@pytest.mark.slow
def test_both_verdicts_are_taken_and_most_safe_cases_are_proven(outcomes):
    safe = [outcome for outcome in outcomes if outcome.truly_safe and outcome.has_rows]
    proven = [outcome for outcome in safe if outcome.safe]
    refuted = [outcome for outcome in outcomes if outcome.kind == "judged" and not outcome.truly_safe]
    assert len(proven) >= 80
    assert len([outcome for outcome in refuted if not outcome.safe]) >= 35
    assert len(proven) >= 0.85 * len(safe)
    assert len([outcome for outcome in outcomes if outcome.masked]) >= 10


def test_same_cases_every_time():
    first, second = (judge_operator(OPS["index_select"], samples=2) for _ in range(2))
    assert first == second
    assert {outcome.kind for outcome in first} >= {"judged"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "operator"),
    [("amax", "aten::amax"), ("flip", "prims::rev"), ("logsumexp", "aten::sum.dim_IntList"), ("mm", "aten::mm")],
)
def test_wrong_rule_is_noticed(monkeypatch, name, operator):
    def anything_goes(call):
        return FREE if not row_dims(call.result_shape()) else call.keep(Fact.ALL)

    assert not any(outcome.wrong for outcome in judge_operator(OPS[name], samples=3))
    monkeypatch.setitem(RULES, operator, RegisteredRule(anything_goes, frozenset()))
    assert any(outcome.wrong for outcome in judge_operator(OPS[name], samples=3))


def _crash(*args, **kwargs):
    os._exit(3)


def _hang(*args, **kwargs):
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.parametrize("fail", [_crash, _hang])
def test_sweep_outlives_operators_that_crash_or_hang(fail):
    broken = copy.copy(OPS["neg"])
    broken.op = fail
    found = list(sweep([broken, OPS["abs"]], Limits(samples=1, seconds=5.0), jobs=2, tick=lambda: None))
    assert {outcome.kind for outcome in found if outcome.op == "neg"} == {"crashed"}
    assert all(outcome.safe for outcome in found if outcome.op == "abs")
    assert {outcome.op for outcome in found} == {"neg", "abs"}


def test_report_counts_and_names_what_was_refused():
    right = Outcome("abs", 0, "0.0", kind="judged", truth=dict.fromkeys(FILLS))
    refused = dataclasses.replace(right, op="flip", refusal="moves the rows", operator="prims.rev.default")
    wrong = dataclasses.replace(right, op="sum", truth={**right.truth, "poison": "another number"})
    untraceable = Outcome("equal", 0, "0.0", detail="depends on data")
    page = markdown([right, refused, wrong, untraceable], samples=1)
    assert "| refuted verdicts | 1 |" in page
    assert "| of these judged safe | 1 (50.0 %) |" in page
    assert "abs (1)" in page
    assert "| flip | 0 of 1 | 1 × prims.rev: moves the rows |" in page
    assert "- **not traceable**: equal" in page
    assert wrong.wrong == "poison: another number"
    assert "prims.rev.default: moves the rows" in summary([refused])
