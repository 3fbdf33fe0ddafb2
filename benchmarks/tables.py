"""Rows as Markdown: ``python -m benchmarks table FOLDER``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import rows
from benchmarks.rows import LEFT_OUT, Environment, Row


def of_folder(folder: Path) -> str:
    """Tables of all results in a folder, by topic."""
    return "\n\n".join(of_topic(where, found) for _, where, found in rows.read_folder(folder))


def of_topic(where: Environment, found: Sequence[Row]) -> str:
    """One table per metric (a line per case, a column per way), or, of a single case, one table with all metrics."""
    results = [row for row in found if row.step is None and row.metric != LEFT_OUT]
    lines = [f"### {found[0].topic}", "", describe(where)]
    cases, metrics = distinct(row.case for row in results), distinct(row.metric for row in results)
    if len(metrics) > len(cases):
        for case in cases:
            chosen = [row for row in results if row.case == case]
            lines += ["", f"{case} ({settings(chosen)})", ""]
            lines += pivot(chosen, lambda row: row.way, lambda row: row.metric)
    else:
        for metric in metrics:
            chosen = [row for row in results if row.metric == metric]
            lines += ["", f"{metric}:", "", *pivot(chosen, lambda row: row.case, lambda row: row.way)]
    notes = distinct(f"{row.way}: {row.note}" for row in found if row.note)
    wrong = distinct(f"{row.way}, {row.case}" for row in found if row.wrong)
    lines += ["", *[f"- {note}" for note in notes]] if notes else []
    lines += ["", *[f"- WRONG RESULTS: {each}" for each in wrong]] if wrong else []
    return "\n".join(lines)


def describe(where: Environment) -> str:
    driver = f", driver {where.driver}" if where.driver else ""
    return f"{where.gpu}{driver}, torch {where.torch}, commit {where.commit}, {where.date}; median (p20 to p80)"


def settings(found: Sequence[Row]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found[0].settings.items())


def distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def pivot(found: Sequence[Row], line: Callable[[Row], str], column: Callable[[Row], str]) -> list[str]:
    lines, columns = distinct(map(line, found)), distinct(map(column, found))
    cells = {(line(row), column(row)): cell(row) for row in found}
    table = [f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    return table + [f"| {each} | {' | '.join(cells.get((each, name), '') for name in columns)} |" for each in lines]


def cell(row: Row) -> str:
    if row.median is None:
        return ""
    unit = f" {row.unit}" if row.unit else ""
    within = ""
    if row.samples > 1 and row.p20 is not None and row.p80 is not None:
        within = f" ({number(row.p20)} to {number(row.p80)})"
    return f"{number(row.median)}{unit}{within}"


def number(value: float) -> str:
    """Three digits that count; all digits before the point."""
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
