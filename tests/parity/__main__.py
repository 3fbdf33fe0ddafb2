"""``python -m tests.parity``: runs every program as eager, stock and sharedgraph, and writes the table of the docs.

Ends with an error if sharedgraph gives a wrong value, or captures less than it should where stock records graphs; on a
CPU, where stock captures nothing, if it captures another part than a program says.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # each program has a process already

import torch

from benchmarks.rows import Environment, environment
from tests.parity.catalogue import PROGRAMS
from tests.parity.judge import Outcome
from tests.parity.sweep import sweep
from tests.parity.table import as_json, document, from_json, line, summary


def main() -> int:
    given = _arguments()
    found, where = from_json(json.loads(given.from_json.read_text())) if given.from_json else _run(given)
    if given.json:
        given.json.write_text(json.dumps(as_json(found, where), indent=1))
    if given.write:
        device = "cpu" if where.gpu == "CPU" else "cuda"
        command = f"python -m tests.parity --device {device} --write {given.write.as_posix()}"
        given.write.parent.mkdir(parents=True, exist_ok=True)
        given.write.write_text(document(found, where, command))
    for outcome in found:
        if outcome.failed:
            print(line(outcome), file=sys.stderr)
    print(summary(found))
    return 1 if any(outcome.failed for outcome in found) else 0


def _run(given: argparse.Namespace) -> tuple[list[Outcome], Environment]:
    from tqdm import tqdm  # not in the processes of the sweep, which import this file

    programs = [program for program in PROGRAMS if given.only in program.name]
    with tqdm(total=len(programs), unit="program") as bar:
        found = []
        for outcome in sweep(programs, torch.device(given.device), given.jobs):
            found.append(outcome)
            bar.update()
    order = {program.name: place for place, program in enumerate(programs)}
    found.sort(key=lambda outcome: order[outcome.name])
    return found, environment(given.device, given.commit)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="where to run; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; default: %(default)s")
    parser.add_argument("--only", default="", help="run the programs whose name contains this")
    parser.add_argument("--write", type=Path, help="the page to write, e.g. docs/capture_parity.md")
    parser.add_argument("--json", type=Path, help="everything that was found, to be rendered elsewhere")
    parser.add_argument("--from-json", type=Path, help="run nothing: take what --json wrote")
    parser.add_argument("--commit", help="of the code that is run, where its history is not there; default: ask git")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
