"""Rules that users write: what they make of a verdict, and what comes of a wrong one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.fx import Graph

import cudagraph_backend as sg
from cudagraph_backend.padding import UNCHANGED, Call, Fact, PaddingRuleError, RefusePadding, meet, padding_rule
from cudagraph_backend.padding.call import RULES
from cudagraph_backend.padding.prove import prove
from tests.support.oracle import Region, dynamic, refute, region

DEFINED = {
    "twice": ("twice(Tensor x) -> Tensor", lambda x: x * 2),
    "twice.Out": ("twice.Out(Tensor x, int n) -> Tensor", lambda x, n: x * 2),
    "gate": ("gate(Tensor x, Tensor y) -> Tensor", lambda x, y: x * y),
    "norm": ("norm(Tensor x, Tensor weight, int dim) -> Tensor", lambda x, weight, dim: x.softmax(dim) * weight),
    "total": ("total(Tensor x) -> Tensor", lambda x: x.sum()),
    "split": ("split(Tensor x) -> (Tensor, Tensor)", lambda x: (x + 1, x.sum(0))),
    "grid": ("grid(Tensor x, SymInt n) -> Tensor", lambda x, n: x.new_ones(n, 2)),
    "noise": ("noise(Tensor x) -> Tensor", torch.rand_like),
    "touch": ("touch(Tensor(a!) x, Tensor y) -> Tensor", lambda x, y: y * 2),
}


@pytest.fixture(autouse=True)
def library() -> Iterator[Any]:
    """The operators above, and at the end no rules for them."""
    known = dict(RULES)
    with torch.library._scoped_library("padding_test", "FRAGMENT") as library:
        for name, (schema, function) in DEFINED.items():
            library.define(schema, tags=(torch.Tag.nondeterministic_seeded,) if name == "noise" else ())
            library.impl(name, function, "CompositeExplicitAutograd")
            library._register_fake(name, function)
        yield torch.ops.padding_test
    RULES.clear()
    RULES.update(known)


def rows(*shape: int) -> torch.Tensor:
    return dynamic(torch.randn(*(shape or (5, 4))))


def is_padded(found: Region, fill: Any = "replica") -> bool:
    """Whether padding is proven; if so, execution must not refute it."""
    verdict = found.prove(fill=fill)
    if verdict.refusal is None:
        assert refute(found, verdict, fill) is None
    return verdict.refusal is None


# ------------------------------------------------------------------------------------------------ verdicts


def test_a_rule_makes_the_difference(library: Any):
    found = region(lambda x: library.twice(x), rows())
    assert found.prove().refusal.reason == "no padding rule for this operator"

    @padding_rule("padding_test::twice")
    def row_by_row(call: Call):
        return call.keep(Fact.REPLICA)

    assert is_padded(found)
    assert row_by_row.__name__ == "row_by_row"  # the function itself, so that it may be registered again


def test_facts_hold_as_far_as_the_operands_hold_them(library: Any):
    padding_rule("padding_test::twice")(lambda call: call.keep(Fact.REPLICA | Fact.ZERO))
    highest, total = (
        region(f, rows()) for f in (lambda x: library.twice(x).amax(0), lambda x: library.twice(x).sum(0))
    )
    assert (is_padded(highest), is_padded(highest, "zero")) == (True, False)
    assert (is_padded(total), is_padded(total, "zero")) == (False, True)


def test_rows_of_several_operands_must_meet(library: Any):
    @padding_rule("padding_test::gate")
    def row_by_row(call: Call):
        meet(*call.operands)
        return call.keep(Fact.REPLICA)

    assert is_padded(region(lambda x, y: library.gate(x, y), rows(), rows()))
    assert is_padded(region(lambda x, y: library.gate(x, y), rows(), torch.randn(4)))
    crossed = region(lambda x, y: library.gate(x[:, :1], y[:, 0]), rows(), rows())
    assert crossed.prove().refusal.reason == "rows along different dims meet"


def test_the_rule_of_the_guide_for_a_reduction_over_other_dims(library: Any):
    @padding_rule("padding_test::norm")
    def within_rows(call: Call):
        x = call.only("x")
        if x.row_dim == x.dim(call["dim"]):
            raise RefusePadding("normalises over the padded rows")
        return call.keep(Fact.REPLICA)

    weight = torch.randn(4)
    assert is_padded(region(lambda x: library.norm(x, weight, 1), rows()))
    assert is_padded(region(lambda x: library.norm(x, weight, -1), rows()))
    refusal = region(lambda x: library.norm(x, weight, 0), rows()).prove().refusal
    assert refusal.reason == "normalises over the padded rows"
    assert refusal.op == "padding_test.norm.default"
    assert "test_users_rules.py" in refusal.source


def test_the_rule_of_the_guide_for_a_sum(library: Any):
    @padding_rule("padding_test::total")
    def total(call: Call):
        if not call.only("x").holds(Fact.ZERO):
            raise RefusePadding("sums the padded rows")
        return UNCHANGED

    found = region(lambda x: library.total(x), rows())
    assert is_padded(found, "zero")
    assert found.prove().refusal.reason == "sums the padded rows"


def test_several_results(library: Any):
    found, first = region(lambda x: library.split(x), rows()), region(lambda x: library.split(x)[0], rows())
    padding_rule("padding_test::split")(lambda call: (call.each(Fact.REPLICA)[0], RefusePadding("sums padded rows")))
    assert is_padded(first)
    assert found.prove().refusal.reason == "sums padded rows"

    @padding_rule("padding_test::split")
    def exact_sum(call: Call):
        if not call.only("x").holds(Fact.ZERO):
            raise RefusePadding("sums")
        return call.each(Fact.NOTHING)[0], UNCHANGED

    assert is_padded(found, "zero")
    assert not is_padded(found)


def test_only_arguments_named_as_sizes_may_depend_on_the_padded_size(library: Any):
    found = region(lambda x: (library.grid(x, x.shape[0]), x * 2), rows())
    padding_rule("padding_test::grid")(lambda call: call.keep(Fact.REPLICA))
    assert "through argument 'n'" in found.prove().refusal.reason
    padding_rule("padding_test::grid", sizes=("n",))(lambda call: call.keep(Fact.REPLICA))
    assert is_padded(found)


@pytest.mark.parametrize("name", ["padding_test::twice", "padding_test::twice.default", "padding_test::twice.Out"])
def test_names_with_and_without_overload(library: Any, name: str):
    padding_rule(name)(lambda call: call.keep(Fact.REPLICA))
    assert is_padded(region(lambda x: library.twice(x), rows())) == (not name.endswith(".Out"))
    assert is_padded(region(lambda x: library.twice.Out(x, 3), rows())) == name.endswith(".Out")


def test_a_rule_for_several_operators_and_a_later_rule_replaces_one(library: Any):
    padding_rule("padding_test::twice", "padding_test::gate")(lambda call: call.keep(Fact.REPLICA))
    doubled, gated = region(lambda x: library.twice(x), rows()), region(lambda x: library.gate(x, x), rows())
    assert is_padded(doubled)
    assert is_padded(gated)

    @padding_rule("padding_test::twice")
    def refuses(call: Call):
        raise RefusePadding("on second thought")

    assert doubled.prove().refusal.reason == "on second thought"
    assert is_padded(gated)


# ------------------------------------------------------------------------------------------------ soundness


def written(target: Any) -> tuple[Graph, Any]:
    """A graph in which ``target`` itself changes what it is given; AOTAutograd makes none like it."""
    found = region(lambda x: x * 2, rows())
    (node,) = found.module.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    node.target, node.args = target, (node.args[0], node.args[0])
    return found.module.graph, *found.symbols()


def test_a_rule_can_not_vouch_for_writes_or_draws(library: Any):
    padding_rule("padding_test::touch", "padding_test::noise")(lambda call: call.keep(Fact.REPLICA))
    drawn = region(lambda x: library.noise(x), rows()).prove().refusal
    assert drawn.reason == "draws random numbers for the rows"
    graph, symbol = written(library.touch.default)
    assert prove(graph, frozenset([symbol]), "replica").refusal.reason == "writes in place"


def test_the_shape_of_the_result_has_the_last_word(library: Any):
    doubled, total = region(lambda x: library.twice(x), rows()), region(lambda x: library.total(x), rows())
    padding_rule("padding_test::twice")(lambda call: UNCHANGED)
    padding_rule("padding_test::total")(lambda call: call.keep(Fact.REPLICA))
    assert "shape changes with the padded size" in doubled.prove().refusal.reason
    assert doubled.prove().refusal.op == "padding_test.twice.default"
    assert "no row dim" in total.prove().refusal.reason


WRONG = [
    ("twice", lambda call: None, "returned None; accepted is call.keep(…), UNCHANGED"),
    ("total", lambda call: None, "returned None; accepted is call.keep(…), UNCHANGED"),
    ("twice", lambda call: True, "returned True; accepted is call.keep(…)"),
    ("twice", lambda call: (call.keep(Fact.REPLICA),), "accepted is call.keep(…)"),
    ("twice", lambda call: RefusePadding, "accepted is call.keep(…), UNCHANGED or raising RefusePadding(reason)"),
    ("split", lambda call: UNCHANGED, "accepted is a tuple of 2 answers"),
    ("split", lambda call: (UNCHANGED,), "accepted is a tuple of 2 answers"),
    ("split", lambda call: call.each(Fact.REPLICA), "returned None; accepted is"),
    ("split", lambda call: call.keep(Fact.REPLICA), "raised "),
    ("twice", lambda call: call["slef"].rows, "raised AttributeError: 'NoneType' object has no attribute 'rows'"),
    ("twice", lambda: None, "raised TypeError"),
]


@pytest.mark.parametrize(("name", "answer", "message"), WRONG)
def test_a_wrong_rule_is_an_error_that_names_the_operator(library: Any, name: str, answer: Any, message: str):
    padding_rule(f"padding_test::{name}")(answer)
    with pytest.raises(PaddingRuleError) as caught:
        region(lambda x: getattr(library, name)(x), rows()).prove()
    assert f"the padding rule for padding_test::{name} " in str(caught.value)
    assert message in str(caught.value)


def test_the_error_of_a_rule_is_the_cause(library: Any):
    @padding_rule("padding_test::twice")
    def broken(call: Call):
        raise KeyError("no such thing")

    with pytest.raises(PaddingRuleError, match="raised KeyError: 'no such thing'; accepted is RefusePadding") as caught:
        region(lambda x: library.twice(x), rows()).prove()
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_refusal_that_is_returned_counts_as_raised(library: Any):
    padding_rule("padding_test::twice")(lambda call: RefusePadding("returned"))
    assert region(lambda x: library.twice(x), rows()).prove().refusal.reason == "returned"


# ------------------------------------------------------------------------------------------------ registering

UNREGISTRABLE = [
    ((), {}, "got no operator"),
    (("twice",), {}, "got 'twice'; accepted is 'mylib::op' or 'mylib::op.overload'"),
    (("mylib.twice",), {}, "accepted is 'mylib::op'"),
    (("mylib::",), {}, "accepted is 'mylib::op'"),
    (("mylib::a.b.c",), {}, "accepted is 'mylib::op'"),
    ((torch.ops.aten.cumsum.default,), {}, "accepted is an operator's name"),
    ((lambda call: None,), {}, "use it as @padding_rule('mylib::op')"),
    (("mylib::twice",), {"sizes": "n"}, "got sizes='n'; accepted is a tuple of argument names"),
    (("mylib::twice",), {"sizes": (1,)}, "accepted is a tuple of argument names"),
    (("aten::sum",), {}, "'aten::sum' has a built-in rule"),
    (("mylib::twice", "aten::sum.dim_IntList"), {}, "'aten::sum.dim_IntList' has a built-in rule"),
    (("aten::cumsum.default",), {}, "'aten::cumsum' has a built-in rule"),
    (("aten::add.Tensor",), {}, "'aten::add.Tensor' has a built-in rule"),
]


@pytest.mark.parametrize(("names", "sizes", "message"), UNREGISTRABLE)
def test_what_can_not_be_registered(names: tuple[Any, ...], sizes: dict[str, Any], message: str):
    before = dict(RULES)
    with pytest.raises(PaddingRuleError) as caught:
        padding_rule(*names, **sizes)
    assert message in str(caught.value)
    assert before == RULES


def test_a_rule_is_a_function():
    with pytest.raises(PaddingRuleError, match="got 3; accepted is a function of a Call"):
        padding_rule("mylib::twice")(3)  # type: ignore[type-var]
    assert "mylib::twice" not in RULES


def test_an_operator_of_torch_without_a_rule_may_get_one():
    found = region(lambda x: torch.linalg.qr(x)[1], dynamic(torch.randn(5, 3, 3)))
    assert not is_padded(found)
    padding_rule("aten::linalg_qr")(lambda call: call.each(Fact.REPLICA))
    assert found.prove().refusal is None


def test_rules_are_at_hand_at_the_top():
    assert sg.padding_rule is padding_rule
    assert sg.PaddingRuleError is PaddingRuleError
    assert issubclass(PaddingRuleError, sg.SharedGraphError)
