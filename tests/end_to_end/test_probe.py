"""The probe: test runs decide where there is no proof (``pad="probe"``), or look over proofs (``verify="capture"``)."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import nn

import cudagraph_backend as sg
from cudagraph_backend.padding.call import RULES, RegisteredRule
from cudagraph_backend.padding.lattice import Fact
from cudagraph_backend.runtime.allocations import Allocations
from tests.support.regions import assert_as_eager

pytestmark = pytest.mark.usefixtures("no_grad")

CALLS_PYTHON = pytest.mark.host_only(
    "Python code of an operator runs when a graph is captured, not when it is replayed, and may not wait for the GPU"
)
SIZES = (5, 11, 3, 24, 5, 17, 11, 2, 1, 40)
RUNS: Counter[str] = Counter()
NUMBERS = itertools.count()


def operator(name, function):
    """A custom operator from one tensor to one like it: nothing is known of how it treats rows."""

    def counted(x):
        RUNS[name] += 1
        return function(x)

    made = torch.library.custom_op(f"probe_tests::{name}", counted, mutates_args=(), schema="(Tensor x) -> Tensor")
    made.register_fake(torch.empty_like)
    return getattr(torch.ops.probe_tests, name)


def raise_on_nan(x):
    if x.isnan().any():
        raise ValueError("NaN is not accepted")
    return x * 2


def scale_in_fours(x):
    """Divides by the largest of four rows."""
    padded = nn.functional.pad(x, (0, 0, 0, -x.shape[0] % 4)).unflatten(0, (-1, 4))
    return (padded / (1 + padded.nan_to_num(9).abs().amax((1, 2), keepdim=True))).flatten(0, 1)[: x.shape[0]].clone()


def fail_on_nan(x):
    if x.isnan().any():
        raise RuntimeError("NaN does not work")
    return x * 2


double = operator("double", lambda x: x * 2)
softmax = operator("softmax", lambda x: x.softmax(1))
double_ids = operator("double_ids", lambda x: x * 2)
sum_of_ids = operator("sum_of_ids", lambda x: x + x.sum(0))
noisy = operator("noisy", lambda x: x + torch.rand((), device=x.device))
changing = operator("changing", lambda x: x * (1 + 1e-7 * (next(NUMBERS) % 3)))
MIXING = {
    "mean": operator("mean", lambda x: x - x.mean(0)),
    "last_row": operator("last_row", lambda x: x + x[-1]),
    "next_row": operator("next_row", lambda x: x.roll(-1, 0)),
    "size": operator("size", lambda x: x / x.shape[0]),
    "position": operator("position", lambda x: x * (torch.arange(len(x), device=x.device) + 1).flip(0)[:, None]),
    "nanmean": operator("nanmean", lambda x: x - x.nanmean(0)),
    "any_nan": operator("any_nan", lambda x: x * 2 + x.isnan().any()),
    "clamped_sum": operator("clamped_sum", lambda x: x + x.clamp(-1, 1).nan_to_num(0).sum(0)),
    "slightly": operator("slightly", lambda x: x * (1 + 1e-6 * x.isnan().any())),
    "largest": operator("largest", lambda x: x + x.amax(0)),
}
raising = operator("raising", raise_on_nan)
failing = operator("failing", fail_on_nan)
negation = operator("negation", lambda x: ~x)
any_row = operator("any_row", lambda x: x ^ x.any())
flip = operator("flip", lambda x: x.flip(0))
fours = operator("fours", scale_in_fours)


@pytest.fixture(autouse=True)
def no_runs_yet():
    RUNS.clear()


def probed(function, **options):
    return torch.compile(function, backend="sharedgraph", options={"pad": "probe", **options})


def rows(n, device, dtype=torch.float32):
    x = torch.randn(n, 4, device=device).to(dtype)
    if n > 1:
        torch._dynamo.mark_dynamic(x, 0)
    return x


def check(compiled, function, device, sizes=SIZES):
    assert_as_eager(compiled, function, lambda n: (rows(n, device),), sizes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [double, softmax], ids=lambda op: op.__name__)
def test_an_operator_that_keeps_rows_apart_is_padded(op, device):
    def function(x):
        return op(x) + 1

    check(probed(function), function, device)
    assert sg.stats().rows_padded > 0
    explained = sg.explain()
    assert "probed in buckets 4, 8, 16, 24: padded rows did not reach real rows (not proven: no padding" in explained
    assert "test_probe.py" in explained


@pytest.mark.parametrize("name", MIXING)
def test_an_operator_that_mixes_rows_is_not_padded(name, device):
    def function(x):
        return MIXING[name](x) + 1

    check(probed(function), function, device)
    assert sg.stats().rows_padded == 0
    assert sg.stats().captures > 0
    assert sg.stats().fallbacks == {}
    assert "not padded, one graph per size: probe with 5 of 8 rows: " in sg.explain()
    assert "(not proven: no padding rule for this operator (probe_tests." in sg.explain()


def test_the_proof_goes_first(device):
    check(probed(lambda x: x.softmax(1)), lambda x: x.softmax(1), device)
    assert sg.stats().rows_padded > 0
    assert "padded rows never reach real rows" in sg.explain()
    assert "probed" not in sg.explain()


@CALLS_PYTHON
def test_padding_that_is_off_is_not_probed(device):
    check(torch.compile(double, backend="sharedgraph", options={"pad": "off"}), double, device, (5, 6))
    assert sg.stats().rows_padded == 0
    assert RUNS["double"] == 2 + 2  # calls, eager


@CALLS_PYTHON
def test_the_region_runs_three_times_more_per_padded_size_and_no_more(device):
    compiled = probed(double)
    for n, runs in ((8, 1), (5, 4), (5, 1), (8, 1), (6, 4), (9, 4), (6, 1), (16, 1), (1, 1)):
        RUNS.clear()
        compiled(rows(n, device))
        assert RUNS["double"] == runs, n


def test_every_size_is_probed(device):
    """Four rows fill a block of four, so that padded rows have one of their own; five don't."""
    compiled = probed(fours, capture_sizes=[8])
    check(compiled, fours, device, (4,))
    assert sg.stats().rows_padded == 4
    assert "probed in buckets 8" in sg.explain()
    check(compiled, fours, device, (5, 4, 6, 4, 8, 5))
    assert sg.stats().rows_padded == 4
    assert "probe with 5 of 8 rows: output 0 changes" in sg.explain()
    (region,) = sg.sharedgraph.regions()
    assert sorted(bucket[0] for bucket in region.state.planner.buckets) == [4, 5, 6, 8]
    assert sg.stats().captures == 1 + 4  # no graph from before is used, not even for eight real rows


@pytest.mark.parametrize("op", [negation, any_row])
def test_truth_values(op, device):
    compiled = probed(op)
    for n, are_true in ((5, 0), (11, 0), (6, 0), (6, 1), (7, 2)):  # where none is true, a padded one that is tells
        x = torch.zeros(n, 4, dtype=torch.bool, device=device)
        x[:are_true] = True
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), op(x))
    assert (sg.stats().rows_padded > 0) == (op is negation)
    assert sg.stats().fallbacks == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_other_types(dtype, device):
    compiled = probed(double)
    for n in (5, 11):
        x = rows(n, device, dtype)
        assert torch.equal(compiled(x), x * 2)
    assert sg.stats().rows_padded == (8 - 5) + (16 - 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_size_as_a_divisor_is_seen_in_a_large_bucket(dtype, device):
    def function(x):
        return MIXING["size"](x * 100)

    compiled = probed(function)
    for n in (1000, 1001):
        x = rows(n, device, dtype)
        torch.testing.assert_close(compiled(x), x * 100 / n)
    assert sg.stats().rows_padded == 0
    assert "output 0 is not that of the exact size" in sg.explain()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x, y):
        self.calls += 1
        self.total += x[0]
        y.mul_(2)
        return double(x) + self.calls


@pytest.mark.parametrize("options", [{}, {"pad": "assume", "verify": "capture"}, {"pad": "prove", "verify": "capture"}])
def test_effects_happen_once(options, device):
    ours, eager = Counting().to(device), Counting().to(device)
    compiled = probed(ours, **options)
    for n in SIZES:
        x, y = rows(n, device), torch.randn(3, 4, device=device)
        z = y.clone()
        torch.testing.assert_close(compiled(x, y), eager(x, z))
        assert ours.calls == eager.calls
        assert torch.equal(ours.total, eager.total)
        assert torch.equal(y, z)
    assert (sg.stats().rows_padded > 0) is (options.get("pad") != "prove")


def test_an_argument_with_rows_written_in_place(device):
    def function(x):
        x.copy_(double(x))
        return x + 1

    compiled = probed(function)
    for n in SIZES:
        x = rows(n, device)
        expected = x * 2
        assert torch.equal(compiled(x), expected + 1)
        assert torch.equal(x, expected)
    assert sg.stats().rows_padded > 0


def test_rows_reaching_an_input_written_in_place(device):
    total = torch.zeros(4, device=device)

    def function(x):
        total.add_(double(x).sum(0))
        return x * 2

    compiled, expected = probed(function), torch.zeros(4, device=device)
    for n in SIZES:
        x = rows(n, device)
        assert torch.equal(compiled(x), x * 2)
        expected += (x * 2).sum(0)
        torch.testing.assert_close(total, expected)
    assert sg.stats().rows_padded == 0
    assert "written in place, changes with what padded rows hold" in sg.explain()


class SlotCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(70, 8, 4))

    def forward(self, x, slots, position):
        self.cache[slots, position] = double(x)
        return self.cache[slots].sum(1)


def test_a_slot_indexed_cache(device):
    ours, eager = SlotCache().to(device), SlotCache().to(device)
    compiled = probed(ours)
    for n in SIZES:
        x, slots = rows(n, device), torch.randperm(70, device=device)[:n]
        position = torch.randint(0, 8, (n,), device=device)
        torch.testing.assert_close(compiled(x, slots, position), eager(x, slots, position), rtol=1e-5, atol=1e-5)
        assert torch.equal(ours.cache, eager.cache)


def test_random_numbers_are_drawn_once_per_call(device):
    """By the operator itself, which does not say that it draws any."""
    compiled = probed(lambda x: noisy(x) * 2)
    torch.manual_seed(3)
    ours = [compiled(torch.zeros(n, 4, device=device)).clone() for n in (5, 7, 7, 9, 5, 7)]
    torch.manual_seed(3)
    assert [out.flatten()[0].item() for out in ours] == [2 * torch.rand((), device=device).item() for _ in ours]
    assert sg.stats().rows_padded > 0


@pytest.mark.parametrize("options", [{}, {"pad": "prove", "verify": "capture"}])
def test_a_region_that_draws(options, device):
    """For want of a proof it is not probed; a proof is looked over with the same draws in every run."""

    def function(x):
        rowwise = x * 2 if options else double(x)
        return rowwise + torch.rand(4, device=x.device)

    results = {}
    for backend in ("inductor", "sharedgraph"):
        torch._dynamo.reset()
        torch.manual_seed(3)
        compiled = torch.compile(function, backend="inductor") if backend == "inductor" else probed(function, **options)
        results[backend] = [compiled(torch.zeros(n, 4, device=device)).clone() for n in (5, 7, 7, 9, 5, 7)]
    for ours, theirs in zip(results["sharedgraph"], results["inductor"], strict=True):
        assert torch.equal(ours, theirs)
    if options:
        assert "probed in buckets 8, 16" in sg.explain()
    else:
        assert sg.stats().rows_padded == 0
        assert "no probe: the region draws random numbers" in sg.explain()


def test_strict_raises_at_every_call(device):
    total = torch.zeros(4, device=device)

    def function(x):
        total.add_(1)
        return MIXING["mean"](x)

    compiled = probed(function, strict=True)
    for _ in range(2):
        with pytest.raises(sg.RefusalError, match="probe with 5 of 8 rows: output 0 changes"):
            compiled(rows(5, device))
    assert total.tolist() == [0] * 4
    check(probed(double, strict=True), double, device)


@pytest.mark.parametrize("strict", [False, True])
def test_verify_catches_a_wrong_rule(strict, device, monkeypatch, caplog):
    wrong = RegisteredRule(lambda call: call.keep(Fact.NOTHING), frozenset())
    monkeypatch.setitem(RULES, "probe_tests::flip", wrong)
    compiled = probed(flip, pad="prove", verify="capture", strict=strict)
    if strict:
        with pytest.raises(sg.RefusalError, match="changes with what padded rows hold"):
            compiled(rows(5, device))
        return
    check(compiled, flip, device)
    assert sg.stats().rows_padded == 0
    assert "probe with 5 of 8 rows: output 0 changes with what padded rows hold" in sg.explain()
    assert [r.levelname for r in caplog.records if "please report this" in r.message] == ["ERROR"]


def test_verify_catches_a_wrong_assumption(device, caplog):
    check(probed(MIXING["mean"], pad="assume", verify="capture"), MIXING["mean"], device)
    assert sg.stats().rows_padded == 0
    assert "output 0 is not that of the exact size" in sg.explain()
    assert not [r for r in caplog.records if "please report this" in r.message]


@pytest.mark.parametrize(
    ("function", "fill"),
    [
        (lambda x: x.softmax(1).cumsum(0), "replica"),
        (lambda x: x + x.amax(0), "replica"),
        (lambda x: x + x.sum(0), "zero"),
        (lambda x: (x * 10).long() + 1, "replica"),
    ],
)
def test_verify_keeps_what_is_proven(function, fill, device):
    """Also where the proof needs the fill, and where a float becomes an integer."""
    check(probed(function, pad="prove", verify="capture", fill=fill), function, device)
    assert sg.stats().rows_padded > 0
    assert ", probed in buckets 4, 8, 16, 24" in sg.explain()


def test_a_region_that_never_gives_the_same_bits_twice(device, monkeypatch):
    """It does not refute a proof, and there is no other way to accept it."""
    compiled = probed(changing)
    for n in (5, 6):
        compiled(rows(n, device))
    assert sg.stats().rows_padded == 0
    torch._dynamo.reset()
    monkeypatch.setitem(RULES, "probe_tests::changing", RegisteredRule(lambda c: c.keep(Fact.NOTHING), frozenset()))
    compiled = probed(changing, pad="prove", verify="capture")
    for n in (5, 6):
        compiled(rows(n, device))
    assert sg.stats().rows_padded == 3 + 2


@pytest.mark.parametrize(("op", "padded"), [(double, True), (MIXING["mean"], False)], ids=["apart", "mixing"])
def test_two_dims_of_which_one_is_unproven(op, padded, device):
    def function(x, y):
        return x * 2, op(y)

    compiled = probed(function)
    for n, m in ((5, 6), (11, 6), (5, 9), (8, 9), (5, 6)):
        x, y = rows(n, device), rows(m, device)
        torch.testing.assert_close(compiled(x, y), function(x, y), rtol=1e-5, atol=1e-5)
    rest = 2 + 2 + 7 + 7 + 2 if padded else 0
    assert sg.stats().rows_padded == (8 - 5) * 3 + (16 - 11) + rest


def test_of_two_dims_the_one_that_fails_is_refused(device):
    def function(x, y):
        return double(x), MIXING["mean"](y)

    compiled = probed(function)
    for n, m in ((5, 6), (11, 6), (5, 9), (5, 6)):
        x, y = rows(n, device), rows(m, device)
        torch.testing.assert_close(compiled(x, y), function(x, y), rtol=1e-5, atol=1e-5)
    assert sg.stats().rows_padded == (8 - 5) * 3 + (16 - 11)


def test_sizes_that_are_equal_stay_equal(device):
    """The one indexes the other, which nothing says; only one of them has room in its bucket."""

    def function(x, y):
        return double(x), double(y)

    compiled = probed(function)
    for n, m in ((6, 6), (6, 5)):
        x, y = torch.randn(n, 4, device=device), torch.randn(m, 4, device=device)
        torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
        torch._dynamo.mark_dynamic(y, 0, min=2, max=6)
        torch.testing.assert_close(compiled(x, y), function(x, y))
        assert sg.stats().rows_padded == (0 if m == 6 else (8 - 6) + (6 - 5))


def test_integers_hold_valid_numbers_in_padded_rows(device):
    """An index into a table of three, and one into a table of one."""
    table, single = torch.randn(3, 4, device=device), torch.randn(1, 4, device=device)

    def function(ids, zeros):
        return table[double_ids(ids) // 2] + single[zeros]

    compiled = probed(function)
    for n in (5, 11, 6):
        ids, zeros = torch.randint(0, 3, (n,), device=device), torch.zeros(n, dtype=torch.long, device=device)
        ids[:2] = torch.tensor([1, 2])
        torch.testing.assert_close(compiled(ids, zeros), table[ids] + single[zeros])
    assert sg.stats().rows_padded == 0  # all zeros are no test


def test_zeros_tell_nothing_about_integers(device):
    """A warm-up call with zeros must not accept what mixes rows, and not refuse what doesn't."""
    for op, is_padded in ((sum_of_ids, False), (double_ids, True)):
        compiled = probed(op)
        for value in (0, 0, 5, 7):
            ids = torch.full((5,), value, device=device)
            torch._dynamo.mark_dynamic(ids, 0)
            assert torch.equal(compiled(ids), op(ids))
        assert sg.stats().rows_padded == (2 * 3 if is_padded else 0)
        torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"pad": "prove", "verify": "capture"}])
def test_a_probe_that_never_tells_ends(options, device):
    """Token types are zeros at every call."""
    is_unproven = not options

    def function(x, types):
        return (double(x) if is_unproven else x * 2) + types[:, None]

    compiled = probed(function, **options)
    for call in range(6):
        x, types = rows(5, device), torch.zeros(5, dtype=torch.long, device=device)
        torch._dynamo.mark_dynamic(types, 0)
        RUNS.clear()
        assert torch.equal(compiled(x, types), x * 2)
        if is_unproven and device.type == "cpu":
            assert RUNS["double"] == (3 if call < 3 else 1)
    assert sg.stats().rows_padded == (0 if is_unproven else 6 * 3)
    assert "the probe could not tell at 3 calls: all rows of an integer input are zero" in sg.explain()


def test_a_probe_that_can_not_tell_of_a_region_that_is_full(device):
    """At its exact size it would need one more graph."""

    def function(x, types):
        return double(x) + types[:, None]

    compiled = probed(function, max_graphs=1)
    for n, kind in ((5, 1), (12, 0), (5, 1)):
        x, types = rows(n, device), torch.full((n,), kind, device=device)
        torch._dynamo.mark_dynamic(types, 0)
        assert torch.equal(compiled(x, types), x * 2 + kind)
    assert sg.stats().graphs == 1
    assert sg.stats().fallbacks == {"the region holds max_graphs graphs": 1}


def test_no_probe_where_extremes_might_become_an_index(device):
    table = torch.randn(10, 4, device=device)

    def function(x):
        return table[x[:, 0].long() % 10] + double(x)

    check(probed(function), function, device)
    assert sg.stats().rows_padded == 0
    assert "no probe: integers are made of floats" in sg.explain()


def test_without_memory_for_the_probe_the_call_is_answered_at_its_size(device, monkeypatch):
    bound_to, failing = Allocations.bound_to, [True]

    def sometimes(self, compiled, device_type):
        run = bound_to(self, compiled, device_type)

        def run_or_fail(inputs):
            if failing:
                failing.clear()
                raise torch.OutOfMemoryError("none")
            return run(inputs)

        return run_or_fail

    monkeypatch.setattr(Allocations, "bound_to", sometimes)
    compiled = probed(double)
    check(compiled, double, device, (5,))
    assert failing == []
    assert sg.stats().rows_padded == 0
    assert sg.stats().fallbacks == {}
    check(compiled, double, device, (5,))
    assert sg.stats().rows_padded == 3


@CALLS_PYTHON
def test_errors_of_the_call_itself_are_the_callers(device):
    compiled = probed(raising)
    x = rows(5, device)
    x[1] = float("nan")
    with pytest.raises(ValueError, match="NaN is not accepted"):
        compiled(x)
    check(compiled, raising, device, (5, 6))


@CALLS_PYTHON
def test_a_runtime_error_is_no_lack_of_memory(device):
    compiled = probed(failing)
    x = rows(5, device)
    x[1] = float("nan")
    with pytest.raises(RuntimeError, match="NaN does not work"):
        compiled(x)
    check(compiled, failing, device, (5, 6))


@CALLS_PYTHON
def test_an_operator_that_raises_for_what_padded_rows_hold(device):
    check(probed(raising), raising, device)
    assert sg.stats().rows_padded == 0
    assert sg.stats().fallbacks == {}
    assert "rows: the padded region fails with ValueError: NaN is not accepted" in sg.explain()


def test_training(device):
    weight = torch.randn(4, 4, device=device, requires_grad=True)

    def function(x):
        return softmax(x.detach()) @ weight

    compiled = probed(function)
    with torch.enable_grad():
        for n in SIZES:
            x = rows(n, device)
            got, expected = (torch.autograd.grad((f(x) ** 2).sum(), weight)[0] for f in (compiled, function))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert "probed in buckets 4, 8, 16, 24" in sg.explain()
    assert "(what they hold matters, masked 2 times)" in sg.explain()  # the backward sums over the batch


@CALLS_PYTHON
def test_a_reset_forgets_the_verdict(device):
    compiled = probed(double)
    check(compiled, double, device, (5,))
    sg.reset()
    RUNS.clear()
    compiled(rows(5, device))
    assert RUNS["double"] == 4
