"""``python -m benchmarks [TOPIC …] --device cuda --out FOLDER``; ``table FOLDER`` and ``plot FOLDER`` show results."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import plots, rows, suite, tables, topics

DEFAULT_OUT = Path(__file__).parent / "results"
EPILOG = f"""\
topics: {", ".join(topics.NAMES)}

`python -m benchmarks table FOLDER` prints the results of a folder as Markdown; `plot FOLDER` draws them again.

exit status: 0 all right; 1 something failed, was not run or gave a wrong result; 2 it can't run as asked.
"""


def run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compares sharedgraph with eager, Inductor, PyTorch's CUDA graphs and a hand-written runner.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the code, measures nothing")
    parser.add_argument("--commit", help="of the measured code, where its history is not there; default: ask git")
    parser.add_argument("--minutes", type=float, default=12, help="start nothing after that; default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run benchmarks or show results; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["table"], ["plot"]):
        return show(*words)
    parser = run_parser()
    args = parser.parse_args(words)
    if unknown := [name for name in args.topics if name not in topics.NAMES]:
        parser.error(f"{unknown[0]!r} is no topic; there are {', '.join(topics.NAMES)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA GPU; --device cpu --quick tests the code")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    where = rows.environment(args.device, args.commit)
    deadline = time.monotonic() + 60 * args.minutes
    outcomes = suite.Suite(args.device, out, args.quick, where, deadline).run(args.topics or topics.NAMES)
    print(f"\n{suite.end_table(outcomes)}")
    return 1 if any(outcome.problems for outcome in outcomes) else 0


def show(command: str, *folders: str) -> int:
    if len(folders) != 1 or not Path(folders[0]).is_dir():
        print(f"error: {command} needs one folder with results", file=sys.stderr)
        return 2
    folder = Path(folders[0])
    if command == "table":
        print(tables.of_folder(folder))
        return 0
    for file, where, found in rows.read_folder(folder):
        plots.draw(file.with_suffix(".png"), where, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
