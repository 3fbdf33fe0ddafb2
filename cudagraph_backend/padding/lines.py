"""Lines of rows: a call whose operands have rows along several dims is judged one line at a time.

The scores of self-attention have rows along the queries and along the keys. Both are the same dynamic dim, and still
two questions: may the queries be padded, may the keys? A line holds the rows that meet in an operator, at most one dim
of each operand; the padded size in all other dims is a size like any other. If the answer is yes for every line, an
entry of the result that is real along each of them depends on real entries only.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .call import Call, RegisteredRule, leaves
from .lattice import Axes, Operand, RefusePadding, Results, Rows
from .symbolic import hide

#: The rows of a line, by the identity of the operand.
LineOfRows = Mapping[int, Rows]


def lines_of(rule: RegisteredRule, call: Call) -> list[LineOfRows]:
    """Return the lines that the rule sees in a call, in the order of dims where the rule tells them apart by place."""
    lines: dict[Hashable, dict[int, Rows]] = {}
    for name, argument in call.arguments.items():
        for operand in leaves(argument):
            for rows in operand.axes if isinstance(operand, Operand) else ():
                line = lines.setdefault(rule.line(call, name, operand, rows), {})
                if id(operand) in line:
                    raise RefusePadding("rows along different dims meet")
                line[id(operand)] = rows
    if all(isinstance(key, int) for key in lines):
        return [lines[key] for key in sorted(lines)]  # type: ignore[type-var]
    return list(lines.values())


def along(argument: Any, line: LineOfRows) -> Any:
    """Return arguments with every operand seen along ``line`` alone."""
    if isinstance(argument, dict):
        return {name: along(item, line) for name, item in argument.items()}
    if isinstance(argument, (list, tuple)):
        return [along(item, line) for item in argument]
    if not isinstance(argument, Operand) or not argument.axes:
        return argument
    rows = line.get(id(argument))
    hidden = [other.dim for other in argument.axes if other is not rows]
    return replace(argument, rows=rows, shape=hide(argument.shape, hidden) if hidden else argument.shape)


def together(results: Sequence[Results]) -> Axes | RefusePadding | list[Axes | RefusePadding]:
    """Return what the rule said of each line, put together per result."""
    width = next((len(result) for result in results if isinstance(result, tuple)), None)
    if width is None:
        return _axes(results)  # type: ignore[arg-type]
    columns = zip(*(result if isinstance(result, tuple) else (None,) * width for result in results), strict=True)
    return [_axes(column) for column in columns]


def _axes(results: Sequence[Rows | RefusePadding | None]) -> Axes | RefusePadding:
    refusal = next((one for one in results if isinstance(one, RefusePadding)), None)
    axes = [rows for rows in results if isinstance(rows, Rows)]
    return refusal or tuple(sorted(axes, key=lambda rows: rows.dim))
