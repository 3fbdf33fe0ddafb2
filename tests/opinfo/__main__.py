"""The whole sweep: ``python -m tests.opinfo --jobs 2 --write docs/padding_operators.md``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path

import torch
from torch.testing._internal.common_methods_invocations import op_db
from tqdm import tqdm

from tests.opinfo.judge import Outcome
from tests.opinfo.report import markdown, summary
from tests.opinfo.sweep import Limits, sweep


def main() -> int:
    """Zero if no verdict "safe" was refuted, else one."""
    parser = argparse.ArgumentParser(prog="python -m tests.opinfo", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--samples", type=int, default=8, help="samples per operator")
    parser.add_argument("--seconds", type=float, default=60.0, help="for one case")
    parser.add_argument("--only", default="", help="only operators whose name contains this")
    parser.add_argument("--write", type=Path, help="the generated table")
    parser.add_argument("--json", type=Path, help="every outcome, to look into")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)  # operators that cannot be traced are counted, not logged
    torch.set_num_threads(1)
    ops = [op for op in op_db if given.only in op.formatted_name]
    with tqdm(total=len(ops), unit="op") as bar:
        found = list(sweep(ops, Limits(given.samples, given.seconds), given.jobs, bar.update))
    order = {op.formatted_name: place for place, op in enumerate(ops)}
    found.sort(key=lambda outcome: order[outcome.op])  # stable: cases stay in their order
    print(summary(found))
    if given.json:
        given.json.write_text(json.dumps([dataclasses.asdict(outcome) for outcome in found], indent=0))
    if given.write:
        given.write.write_text(markdown(found, given.samples))
    return _wrong(found)


def _wrong(found: list[Outcome]) -> int:
    wrong = [outcome for outcome in found if outcome.wrong]
    for outcome in wrong:
        print(f"WRONG: {outcome.op}, sample {outcome.sample}, dims {outcome.dims}: {outcome.wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
