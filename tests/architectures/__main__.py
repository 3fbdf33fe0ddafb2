"""``python -m tests.architectures``: checks every architecture, and writes the table of the docs.

Ends with an error if a verdict is not the expected one, or is refuted by running the graph.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from tests.architectures import judging, programs_table
from tests.architectures.catalogue import ARCHITECTURES
from tests.architectures.program import Mode, Program
from tests.architectures.programs import PROGRAMS
from tests.architectures.table import Row, document, row
from tests.architectures.verdicts import findings, surprise


def main() -> int:
    arguments = _arguments()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # threads cost more than small tensors do
    warnings.simplefilter("ignore")
    check = _check_programs if arguments.programs else _check_architectures
    page, surprises = check(arguments.only, "" if arguments.write is None else arguments.write.as_posix())
    if arguments.write is not None and not surprises:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(page)
    for problem in surprises:
        print(problem, file=sys.stderr)
    return 1 if surprises else 0


def _check_architectures(only: str, path: str) -> tuple[str, list[str]]:
    """The page, and what is not as expected."""
    rows: list[Row] = []
    surprises: list[str] = []
    for architecture in ARCHITECTURES:
        if only not in architecture.name:
            continue
        found = findings(architecture)
        rows.append(row(architecture, found))
        print(rows[-1].text(), flush=True)
        if (problem := surprise(architecture, found)) is not None:
            surprises.append(f"{architecture.name}: {problem}")
    return document(rows, path), surprises


def _check_programs(only: str, path: str) -> tuple[str, list[str]]:
    """The page, and what is not as expected."""
    found: list[tuple[Program, dict[Mode, judging.Outcome]]] = []
    surprises: list[str] = []
    for program in PROGRAMS:
        if only not in program.name:
            continue
        outcomes = {mode: judging.judge(program, mode) for mode in program.modes}
        found.append((program, outcomes))
        print(programs_table.row(program, outcomes), flush=True)
        for mode, outcome in outcomes.items():
            if (problem := judging.surprise(program, mode, outcome)) is not None:
                surprises.append(f"{program.name}, {mode}: {problem}")
    return programs_table.document(found, path), surprises


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("--write", type=Path, help="the page to write, e.g. docs/padding_models.md")
    parser.add_argument("--only", default="", help="check the architectures whose name contains this")
    parser.add_argument("--programs", action="store_true", help="check programs, with training, instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
