"""The table of architectures and verdicts in the docs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import transformers

from cudagraph_backend.errors import Refusal
from tests.architectures.catalogue import Architecture
from tests.architectures.verdicts import Finding

_HERE = f"{Path(__file__).parents[2]}/"
_HEADER = """\
# Architectures and their padding verdicts

Written by `python -m tests.architectures --write {path}` with torch {torch} and transformers {transformers}.

Each architecture is built small with random weights, compiled with the batch marked dynamic, and served with two batch
sizes. The analysis is the backend's own; text models get an attention mask with rows of different lengths. Every padded
verdict was then tested by running the graph with padded rows: the real rows must not change.

{padded} of {all} are padded throughout; *partly* means that of several dims or regions some are refused.
*Padded rows hold* says what the proof needs: anything (tested with NaN and the largest numbers, too), or a copy of the
last real row, the default fill; *masked*: the graph is changed so that they hold what else is needed. A refusal is no
error: such a dim gets one graph per batch size, and what can't be captured runs as Inductor compiled it. It means that
padding is not proven, not that it would be wrong.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One architecture's findings in words."""

    architecture: Architecture
    regions: int
    verdict: str
    holds: str
    reason: str

    def text(self) -> str:
        return f"| {self.architecture.name} | {self.regions} | {self.verdict} | {self.holds} | {self.reason} |"


def row(architecture: Architecture, found: list[Finding]) -> Row:
    refusals = [refusal for finding in found for refusal in finding.refusals]
    padded = [dim for finding in found for dim in finding.dims if dim.refusal is None and not finding.uncapturable]
    holds = "last row" if any(dim.needs_fill for dim in padded) else "anything"
    masked = ", masked" if any(dim.masks for dim in padded) else ""
    verdict = ("partly" if padded else "refused") if refusals else "padded"
    return Row(
        architecture,
        regions=len(found),
        verdict=verdict,
        holds=holds + masked if padded else "",
        reason="; ".join(dict.fromkeys(map(reason, refusals))),
    )


def document(rows: Iterable[Row], path: str) -> str:
    """The whole page."""
    rows = list(rows)
    padded = sum(row.verdict == "padded" for row in rows)
    header = _HEADER.format(
        path=path,
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        padded=padded,
        all=len(rows),
    )
    return "\n".join([header, *_sections(rows)])


def _sections(rows: list[Row]) -> Iterator[str]:
    for kind, members in groupby(rows, key=lambda row: row.architecture.kind):
        yield f"## {kind[0].upper()}{kind[1:]}\n"
        yield "| architecture | regions | verdict | padded rows hold | reason |"
        yield "| --- | --- | --- | --- | --- |"
        yield from (row.text() for row in members)
        yield ""


def reason(refusal: Refusal) -> str:
    """The reason, the operator without its overload, and the source line without what depends on the machine."""
    text = refusal.reason
    if refusal.op is not None:
        text += f" (`{'.'.join(refusal.op.split('.')[:2])}`)"
    if refusal.source is not None:
        place, _, code = refusal.source.partition(": ")
        text += f" at `{place.removeprefix(_HERE).split('site-packages/')[-1].split(' in ')[0]}`: `{code}`"
    return text.replace("|", "\\|")
