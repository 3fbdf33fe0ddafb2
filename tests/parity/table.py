"""What was found, as text and as the page in the docs; and as JSON, to bring it from one machine to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from benchmarks.rows import Environment
from tests.parity.judge import Outcome, Side

_HEADER = """\
# Capture parity

Written by `{command}`.
{where}.

Each program is a few lines with one behaviour of PyTorch's own CUDA graph trees. It runs as eager code, with
`torch.compile(mode="reduce-overhead")` (*stock*) and with sharedgraph (*ours*), each from the same seeds, every size
called three times or more, and all values are compared with eager's: results, gradients, and what was changed in place.
*Partly* means that some operators run uncaptured, as the last column says; of those, all that are named in the program
have to (they work on another device, wait for it, or branch on data).

{summary}
"""


def summary(found: Sequence[Outcome]) -> str:
    """The counts that matter, in one paragraph."""
    ours = [outcome.ours for outcome in found if outcome.ours is not None]
    stock = [outcome.stock for outcome in found if outcome.stock is not None]
    verdicts = [side.verdict for side in ours]
    text = f"**{len(found)} programs"
    if left_out := len(found) - len(ours):
        text += f", {left_out} of them left out as they need a GPU"
    text += f".** Ours captures {len(verdicts) - verdicts.count('no')} ({verdicts.count('partly')} of them partly)"
    if stock:
        text += (
            f", stock records graphs in {sum(side.graphs > 0 for side in stock)}. Captured by stock and not by ours:"
        )
        text += f" {sum(outcome.missed for outcome in found)}. Wrong values or errors: ours"
        text += f" {_problems(ours)}, stock {_problems(stock)}."
    else:
        text += f". Not as the program says: {sum(outcome.surprise for outcome in found)}. Wrong values or errors:"
        text += f" {_problems(ours)}. Stock captures nothing on a CPU."
    return text


def document(found: Sequence[Outcome], where: Environment, command: str) -> str:
    """The whole page."""
    driver = f", driver {where.driver}" if where.driver else " with the host driver"
    place = f"{where.gpu}{driver}, torch {where.torch}, commit {where.commit}, {where.date}"
    header = _HEADER.format(command=command, where=place, summary=summary(found))
    return "\n".join([header, *_sections(found)])


def line(outcome: Outcome) -> str:
    """One row of the table."""
    if outcome.ours is None:
        cells = ["", "", "", "", outcome.left_out]
    else:
        verdict = f"**missed** ({outcome.ours.verdict})" if outcome.missed else outcome.ours.verdict
        reasons = "; ".join(_marked(reason, outcome) for reason in outcome.ours.uncaptured)
        cells = [_graphs(outcome.stock), str(outcome.ours.graphs), verdict, _values(outcome), reasons]
    behaviour = described(outcome.name, outcome.what)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in [behaviour, *cells]) + " |"


def described(name: str, what: str) -> str:
    """A row's first cell: what a program is called, and what it does."""
    return f"**{name}**: {what[:1].lower()}{what[1:]}".replace("``", "`")


def as_json(found: Sequence[Outcome], where: Environment) -> dict[str, Any]:
    return {"environment": dataclasses.asdict(where), "programs": [dataclasses.asdict(outcome) for outcome in found]}


def from_json(data: dict[str, Any]) -> tuple[list[Outcome], Environment]:
    return [_outcome(row) for row in data["programs"]], Environment(**data["environment"])


def _outcome(row: dict[str, Any]) -> Outcome:
    sides = {name: _side(row[name]) for name in ("stock", "ours")}
    return Outcome(**{**row, "unexpected": tuple(row["unexpected"]), **sides})


def _side(row: dict[str, Any] | None) -> Side | None:
    return None if row is None else Side(**{**row, "uncaptured": tuple(row["uncaptured"])})


def _problems(sides: Sequence[Side]) -> int:
    return sum(side.problem is not None for side in sides)


def _sections(found: Sequence[Outcome]) -> Iterator[str]:
    for kind, members in groupby(found, key=lambda outcome: outcome.kind):
        yield f"## {kind}\n"
        yield "| behaviour | stock: graphs | ours: graphs | ours | values | uncaptured in ours |"
        yield "| --- | --- | --- | --- | --- | --- |"
        yield from (line(outcome) for outcome in members)
        yield ""


def _graphs(stock: Side | None) -> str:
    if stock is None:
        return ""
    cut = f", {stock.partitions} partitions" if stock.partitions else ""
    return f"{stock.graphs}{cut}" + (f", {stock.skips} skipped" if stock.skips else "")


def _values(outcome: Outcome) -> str:
    sides = {"stock": outcome.stock, "ours": outcome.ours}
    wrong = [f"**{name}**: {side.problem}" for name, side in sides.items() if side is not None and side.problem]
    return "; ".join(wrong)[:240] or "equal"


def _marked(reason: str, outcome: Outcome) -> str:
    return f"**{reason}**" if reason in outcome.unexpected else reason
