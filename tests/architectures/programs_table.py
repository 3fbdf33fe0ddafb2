"""The table of programs and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from itertools import groupby

import torch
import transformers

from tests.architectures.judging import Outcome
from tests.architectures.program import Mode, Program
from tests.architectures.table import reason

Outcomes = Mapping[Mode, Outcome]

_HEADER = """\
# Programs and their padding verdicts

Written by `python -m tests.architectures --programs --write {path}` with torch {torch}, transformers {transformers} and
PyTorch Geometric {geometric}.

Each program is built small with random weights and called with changing sizes of all the dims that are named, marked
dynamic: as inference without gradients, in training with the backward of its loss. All but Inductor's code is the
backend's own (graphs that are interpreted stand in for that, on the host driver, which overwrites with NaN what must
not be read); results, gradients and buffers of every call were held to eager's.

{padded} of {all} are padded along every dim. A refusal is no error: such a dim gets one graph per size.
"""


def row(program: Program, outcomes: Outcomes) -> str:
    """One program's line."""
    cells = [_verdict(outcomes[mode]) if mode in outcomes else "" for mode in ("inference", "training")]
    refusals: dict[str, list[str]] = {}
    for mode, outcome in outcomes.items():
        for name, found in outcome.refusals.items():
            for refusal in found:
                refusals.setdefault(reason(refusal), []).append(f"{name} ({mode})")
    reasons = [f"{', '.join(dict.fromkeys(where))}: {text}" for text, where in refusals.items()]
    reasons += [
        f"runs uncaptured: {text}" for outcome in outcomes.values() for text in dict.fromkeys(outcome.uncaptured)
    ]
    return f"| {program.name} | {cells[0]} | {cells[1]} | {'; '.join(dict.fromkeys(reasons))} |"


def document(found: Iterable[tuple[Program, Outcomes]], path: str) -> str:
    """The whole page."""
    found = list(found)
    padded = [all(not any(o.refusals.values()) for o in outcomes.values()) for _, outcomes in found]
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    versions["geometric"] = version("torch_geometric")
    header = _HEADER.format(path=path, padded=sum(padded), all=len(padded), **versions)
    return "\n".join([header, *_sections(found)])


def _sections(found: list[tuple[Program, Outcomes]]) -> Iterator[str]:
    for kind, members in groupby(found, key=lambda pair: pair[0].kind):
        yield f"## {kind[0].upper()}{kind[1:]}\n"
        yield "| program | inference | training | reason |"
        yield "| --- | --- | --- | --- |"
        yield from (row(*pair) for pair in members)
        yield ""


def _verdict(outcome: Outcome) -> str:
    """The dims that are padded, and those that are not."""
    padded = sorted(name for name, refusals in outcome.refusals.items() if not refusals)
    refused = sorted(name for name, refusals in outcome.refusals.items() if refusals)
    told = [f"padded: {', '.join(padded)}"] if padded else []
    return "; ".join(told + ([f"**not: {', '.join(refused)}**"] if refused else []))
