"""Users' padding rules: their registration, and the check of what they answer."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch

from cudagraph_backend.errors import PaddingRuleError
from cudagraph_backend.graph.operators import targets_of

from .call import RULES, Call, one_line, rule
from .lattice import FREE, RefusePadding, Results, Rows

_NAME = re.compile(r"\w+::\w+(\.\w+)?")
_Function = TypeVar("_Function", bound=Callable[[Call], Any])


class Answer(enum.Enum):
    UNCHANGED = enum.auto()


#: The result has no rows, and is the same however many padded rows there are. A rule must say so: its author may have
#: forgotten to return anything.
UNCHANGED: Final = Answer.UNCHANGED


def padding_rule(
    *operators: str, sizes: tuple[str, ...] = (), writes: bool = False
) -> Callable[[_Function], _Function]:
    """Register a rule for custom operators, so that regions with them can be padded; see this module's examples.

    The rule is asked while a region is compiled, if rows (or sizes that depend on them) reach the operator, and only
    if the operator changes none of its arguments, unless it is registered with ``writes``. It returns

    - ``call.keep(facts)``: the result has rows, and of ``facts`` those hold of its padded rows that hold of all
      operands' (``Fact.NOTHING``, if the author is not sure);
    - ``UNCHANGED``: the result has no rows, and padded rows can't reach it;
    - for several results a tuple of these, as ``call.each(facts)`` gives it, with ``UNCHANGED`` for those without rows.

    It raises ``RefusePadding(reason)`` for all that it can't vouch for: the dim then gets one graph per size. Which dim
    of a result has the rows is checked against its shape; that no real row depends on padded ones is the rule's word.
    An operator that fails on bad values (an index out of range) must ask ``operand.holds(Fact.REPLICA)``: otherwise
    padded rows may hold anything.

    Args:
        operators: ``"mylib::op"``, or with an overload ``"mylib::op.Tensor"``. A new rule replaces one's earlier rule.
        sizes: names of arguments that are sizes. A number that depends on the padded size is refused in others.
        writes: the rule speaks of an operator that changes arguments (``mutates_args``). It answers for what these hold
            afterwards, too: one more answer for each, after those for the results. Padded rows must change nothing in
            an argument without rows: with ``Fact.REPLICA`` they write what the last real row writes, where it does.

    Raises:
        PaddingRuleError: a bad name, an operator with a built-in rule, or no function. Also when a region is compiled,
            if the rule raises anything but ``RefusePadding``, or answers with anything but the above.
    """
    names = [_checked_name(name) for name in operators]
    if not names:
        raise PaddingRuleError("padding_rule: got no operator; accepted is one or more, as padding_rule('mylib::op')")
    if isinstance(sizes, str) or not all(isinstance(name, str) for name in sizes):
        raise PaddingRuleError(f"padding_rule: got sizes={sizes!r}; accepted is a tuple of argument names: ('n',)")

    def register(function: _Function) -> _Function:
        if not callable(function):
            raise PaddingRuleError(f"padding_rule: got {function!r}; accepted is a function of a Call")
        for name in names:
            rule(name, sizes=tuple(sizes), line=one_line, writes=bool(writes))(_UsersRule(name, function))
        return function

    return register


def _checked_name(name: Any) -> str:
    if not isinstance(name, str):
        raise PaddingRuleError(
            f"padding_rule: got {name!r}; accepted is an operator's name: use it as @padding_rule('mylib::op')"
        )
    if not _NAME.fullmatch(name):
        raise PaddingRuleError(f"padding_rule: got {name!r}; accepted is 'mylib::op' or 'mylib::op.overload'")
    name = name.removesuffix(".default")
    if _has_built_in_rule(name):
        raise PaddingRuleError(
            f"padding_rule: {name!r} has a built-in rule, which is tested against execution and is not replaced; "
            "if it refuses what is safe, wrap the computation in a custom operator (torch.library.custom_op)"
        )
    return name


def _has_built_in_rule(name: str) -> bool:
    if name in RULES:
        return not isinstance(RULES[name].apply, _UsersRule)
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    if namespace not in ("aten", "prims"):
        return False
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload or "default", None)
    return torch.Tag.pointwise in getattr(found, "tags", ())


@dataclass(frozen=True, slots=True)
class _UsersRule:
    """A user's rule: what it answers is checked, and its errors are its author's to see."""

    name: str
    function: Callable[[Call], Any]

    def __call__(self, call: Call) -> Results:
        draws = torch.Tag.nondeterministic_seeded
        if any(draws in getattr(target, "tags", ()) for target in targets_of(call.node)):
            raise RefusePadding("draws random numbers for the rows")
        try:
            answer = self.function(call)
        except RefusePadding:
            raise
        except Exception as error:
            raise PaddingRuleError(
                f"the padding rule for {self.name} raised {type(error).__name__}: {error}; "
                "accepted is RefusePadding(reason), where it can't vouch for padding"
            ) from error
        val = call.val
        if not isinstance(val, (list, tuple)):
            return self._checked(answer, val)
        if not isinstance(answer, tuple) or len(answer) != len(val):
            raise self._error(answer, f"a tuple of {len(val)} answers, one per result")
        return tuple(self._checked_one_of_several(item, each) for item, each in zip(answer, val, strict=True))

    def _checked(self, answer: Any, val: Any) -> Rows | None:
        if isinstance(answer, RefusePadding):
            raise answer
        if answer is UNCHANGED or (answer is None and not isinstance(val, torch.Tensor)):
            return FREE
        if isinstance(answer, Rows):
            return answer
        raise self._error(answer, "call.keep(…), UNCHANGED or raising RefusePadding(reason)")

    def _checked_one_of_several(self, answer: Any, val: Any) -> Rows | RefusePadding | None:
        return answer if isinstance(answer, RefusePadding) else self._checked(answer, val)

    def _error(self, answer: Any, accepted: str) -> PaddingRuleError:
        return PaddingRuleError(f"the padding rule for {self.name} returned {answer!r}; accepted is {accepted}")
