"""The programs of the table of capture parity on the host driver: eager's values, captured as each says."""

from __future__ import annotations

import os
import time

import pytest
import torch

from tests.parity import custom
from tests.parity.catalogue import PROGRAMS
from tests.parity.judge import difference, judge
from tests.parity.program import Program, calls, randn
from tests.parity.sweep import sweep

pytestmark = pytest.mark.host_only("the judge is the same on a GPU, where tests/gpu holds the programs to stock, too")

ON_A_CPU = [program for program in PROGRAMS if not program.needs_cuda]


@pytest.mark.slow
@pytest.mark.parametrize("program", ON_A_CPU, ids=[program.name.replace(" ", "_") for program in ON_A_CPU])
def test_values_are_eagers_and_what_can_be_is_captured(program, device):
    outcome = judge(program, device)
    assert outcome.ours is not None
    assert outcome.ours.problem is None
    assert outcome.unexpected == ()
    assert outcome.ours.verdict == program.expected


# ---- would the judge notice?


def _program(make, **settings) -> Program:
    return Program(make.__name__, "Tests", "", make, **settings)


def _right(device):
    return calls(lambda x: x * 2 + 1, lambda n: (randn(n, 4, device=device),))


def _wrong(device):
    return calls(lambda x: x * 2 + torch.compiler.is_compiling(), lambda n: (randn(n, 4, device=device),))


def _wrong_argument(device):
    def function(x):
        x.add_(2 if torch.compiler.is_compiling() else 1)
        return x[0] * 0

    return calls(function, lambda n: (randn(n, 4, device=device),))


def _wrong_gradient(device):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return grad * (2 if torch.compiler.is_compiling() else 1)

    return calls(Doubled.apply, lambda n: (randn(n, 4, device=device, grad=True),), training=True)


def _wrong_state(device):
    class Counts(torch.nn.BatchNorm1d):
        def forward(self, x):
            self.running_mean.add_(2 if torch.compiler.is_compiling() else 1)
            return x * 2

    return calls(Counts(4).to(device), lambda n: (randn(n, 4, device=device),))


def _wrong_at_the_last_size(device):
    def function(x):
        return x * 2 + (x.shape[0] == 7 and torch.compiler.is_compiling())

    return calls(function, lambda n: (randn(n, 4, device=device),), sizes=(4, 7))


@pytest.mark.parametrize("make", [_wrong, _wrong_argument, _wrong_gradient, _wrong_state, _wrong_at_the_last_size])
def test_a_wrong_value_is_noticed(make, device):
    outcome = judge(_program(make), device)
    assert outcome.wrong
    assert outcome.failed


def test_a_right_program_is_captured(device):
    outcome = judge(_program(_right), device)
    assert not outcome.failed
    assert outcome.ours.graphs == 2
    assert judge(_program(_right, leaves=("anything",)), device).failed  # it says that something stays uncaptured


def _cut(device):
    return calls(lambda x: custom.unsafe(x * 2 + 1) * 3 + 1, lambda n: (randn(n, 4, device=device),))


def test_what_runs_uncaptured_is_noticed_unless_the_program_leaves_it(device):
    outcome = judge(_program(_cut), device)
    assert outcome.failed
    assert outcome.unexpected == outcome.ours.uncaptured
    assert "parity.unsafe" in outcome.unexpected[0]
    assert not judge(_program(_cut, leaves=("parity.unsafe",)), device).failed


def _fails(device):
    def flow(compile):
        yield 1
        if compile(_right) is not _right:
            raise ValueError("only when compiled")

    return flow


def _fails_in_eager(device):
    raise ValueError("no program")


def test_an_exception_is_an_outcome(device):
    assert judge(_program(_fails), device).ours.problem == "ValueError: only when compiled"
    assert judge(_program(_fails_in_eager), device).ours.problem == "in eager: ValueError: no program"


def test_a_program_for_gpus_is_left_out(device):
    outcome = judge(_program(_right, needs_cuda="a kernel"), device)
    assert outcome.left_out == "needs a GPU: a kernel"
    assert not outcome.failed


@pytest.mark.parametrize(
    ("got", "expected", "words"),
    [
        ([1, torch.ones(2)], [1, torch.ones(2)], None),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), None),
        (torch.ones(2), torch.ones(2) + 1e-2, "Tensor-likes are not close"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "dtype"),
        (torch.ones(2), torch.ones(3), "shape"),
        (torch.ones(2, device="meta"), torch.ones(3, device="meta"), "shape (2,) instead of (3,)"),
        ([torch.ones(2)], [torch.ones(2), None], "another structure"),
        (True, False, "True instead of False"),
        (1.00001, 1.0, None),
        (1.1, 1.0, "1.1 instead of 1.0"),
    ],
)
def test_differences(got, expected, words):
    found = difference(got, expected, 1e-4)
    assert found is None if words is None else words in found


# ---- a process per program


def _crashes(device):
    os._exit(3)


def _hangs(device):
    time.sleep(60)


@pytest.mark.slow
def test_the_sweep_outlives_programs_that_crash_or_hang(device):
    program = next(p for p in PROGRAMS if p.name == "views of arguments")
    found = {outcome.name: outcome for outcome in sweep([_program(_crashes), program], device, jobs=2)}
    assert found["_crashes"].ours.problem == "the process ended: 3"
    assert not found["views of arguments"].failed
    (outcome,) = sweep([_program(_hangs)], device, jobs=2, seconds=2.0)
    assert outcome.ours.problem == "no answer within 2 s"
    assert outcome.failed
