"""Rows as a PNG per topic. matplotlib is imported only here, and only when something is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import LEFT_OUT, Environment, Row
from benchmarks.tables import distinct

# One colour per way, the same in every plot, and distinct for readers who see few colours.
COLOURS = {
    "eager": "#999999",
    "inductor": "#56b4e9",
    "reduce-overhead": "#e69f00",
    "cudagraphs": "#cc79a7",
    "hand-padded": "#f0e442",
    "hand-written": "#009e73",
    "raw replay": "#000000",
    "sharedgraph": "#d55e00",
    "sharedgraph, warmed up": "#0072b2",
}
PANELS = 3  # in one line
FAR = 10  # times the lowest line


def draw(file: Path, where: Environment, found: Sequence[Row]) -> None:
    """A panel per series of rows (memory after each capture), or else per metric."""
    series = [row for row in found if row.step is not None]
    results = series or [row for row in found if row.metric != LEFT_OUT and row.median is not None]
    if not results:
        return
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    keys = distinct(f"{row.metric}|{row.case}" if series else row.metric for row in results)
    columns = min(2 if len(keys) == 4 else PANELS, len(keys))
    lines = math.ceil(len(keys) / columns)
    height = 3.9 if series or len({row.case for row in results}) < 4 else 6  # names of many cases are written upwards
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.2 * columns, height * lines), squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        if series:
            _lines(axis, [row for row in results if f"{row.metric}|{row.case}" == key])
        else:
            _bars(axis, [row for row in results if row.metric == key])
    for axis in axes.flat[len(keys) :]:
        axis.axis("off")
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=7)
    title = f"{found[0].topic}: {where.gpu}, torch {where.torch}, commit {where.commit}, {where.date}"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.3 / (height * lines), 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _lines(axis: Any, results: Sequence[Row]) -> None:
    """A line per way. One that is far above the others would flatten them, and is told of instead."""
    ways = distinct(row.way for row in results)
    highest = {way: max(row.median or 0 for row in results if row.way == way) for way in ways}
    far = [way for way in ways if highest[way] > FAR * min(highest.values())]
    for way in ways:
        chosen = [row for row in results if row.way == way and way not in far]
        heights = [row.median for row in chosen]
        axis.plot([row.step for row in chosen], heights, marker=".", label=way, color=COLOURS.get(way))
    told = "".join(f"\n(not drawn: {way}, up to {highest[way]:.0f} {results[0].unit})" for way in far)
    axis.set_title(f"{results[0].metric}, {results[0].case}{told}", fontsize=9)
    axis.set_xlabel("sizes captured, the largest first")
    axis.set_ylabel(_label(results[0]))
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _bars(axis: Any, results: Sequence[Row]) -> None:
    """A group of bars per case, with the 20th to 80th percentile; logarithmic where bars differ a lot."""
    ways, cases = distinct(row.way for row in results), distinct(row.case for row in results)
    width = 0.8 / len(ways)
    for index, way in enumerate(ways):
        chosen = [row for row in results if row.way == way]
        places = [cases.index(row.case) + (index + 0.5) * width - 0.4 for row in chosen]
        below = [_distance(row.p20, row.median) for row in chosen]
        above = [_distance(row.median, row.p80) for row in chosen]
        axis.bar(
            places,
            [row.median for row in chosen],
            width,
            yerr=(below, above),
            label=way,
            color=COLOURS.get(way),
            capsize=2,
        )
    axis.set_title(results[0].metric, fontsize=9)
    axis.set_xticks(range(len(cases)), cases, rotation=60 if len(cases) > 3 else 0, fontsize=7)
    axis.set_ylabel(_label(results[0]))
    heights = [row.median for row in results if row.median and row.median > 0]
    if heights and max(heights) > 30 * min(heights):
        axis.set_yscale("log")
    axis.grid(axis="y", alpha=0.3)


def _distance(first: float | None, second: float | None) -> float:
    return 0 if first is None or second is None else second - first


def _label(row: Row) -> str:
    return f"{row.metric} ({row.unit})" if row.unit else row.metric
