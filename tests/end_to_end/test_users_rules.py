"""Custom operators: padded with a rule of the user's, one graph per size without."""

from __future__ import annotations

import pytest
import torch

import cudagraph_backend as sg
from cudagraph_backend.padding import UNCHANGED, Call, Fact, RefusePadding
from tests.support.regions import assert_as_eager, compiled

pytestmark = pytest.mark.usefixtures("no_rules_left")

SIZES = (5, 11, 3, 30, 9, 2)


@torch.library.custom_op("padding_e2e::rotate", mutates_args=())
def rotate(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([-x[..., 1], x[..., 0]], -1)


@rotate.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("padding_e2e::total", mutates_args=())
def total(x: torch.Tensor) -> torch.Tensor:
    return x.sum()


@total.register_fake
def _(x):
    return x.new_empty(())


@torch.library.custom_op("padding_e2e::shift", mutates_args=("x",))
def shift(x: torch.Tensor, by: float) -> None:
    x.add_(by)


def check(function, device, **options):
    """Every call equals eager; the rows that were padded."""
    assert_as_eager(compiled(function, **options), function, lambda n: (torch.randn(n, 2, device=device),), SIZES)
    return sg.stats().rows_padded


def test_an_operator_is_padded_with_a_rule_and_exact_without(device):
    function = lambda x: rotate(x * 2).relu()
    assert check(function, device) == 0
    assert "no padding rule for this operator (padding_e2e.rotate.default)" in sg.explain()
    assert sg.stats().graphs == len(SIZES)

    @sg.padding_rule("padding_e2e::rotate")
    def row_by_row(call: Call):
        if call.only("x").row_dim != 0:
            raise RefusePadding("takes the last dim apart")
        return call.keep(Fact.REPLICA)

    torch._dynamo.reset()
    assert check(function, device) > 0
    assert "not padded" not in sg.explain()


@pytest.mark.parametrize(("fill", "is_padded"), [("zero", True), ({"x": 0}, True), ("replica", False)])
def test_a_rule_may_ask_for_zeros(fill, is_padded, device):
    @sg.padding_rule("padding_e2e::total")
    def exact_with_zeros(call: Call):
        if not call.only("x").holds(Fact.ZERO):
            raise RefusePadding("sums the padded rows")
        return UNCHANGED

    assert (check(lambda x: total(x), device, fill=fill) > 0) == is_padded
    assert ("sums the padded rows (padding_e2e.total.default)" in sg.explain()) == (not is_padded)


def test_an_operator_that_writes_is_not_padded_whatever_its_rule_says(device):
    sg.padding_rule("padding_e2e::shift")(lambda call: call.keep(Fact.ALL))

    def function(x):
        shift(x, 2.0)
        return x * 2, x

    assert check(function, device) == 0


def test_a_broken_rule_is_an_error_when_compiling(device):
    @sg.padding_rule("padding_e2e::rotate")
    def forgets_to_return(call: Call):
        call.keep(Fact.REPLICA)

    message = "padding rule for padding_e2e::rotate returned None"
    with pytest.raises(Exception, match=message) as raised:
        torch.compile(rotate, backend="sharedgraph", dynamic=True)(torch.randn(5, 2, device=device))
    assert isinstance(raised.value.inner_exception, sg.PaddingRuleError)
