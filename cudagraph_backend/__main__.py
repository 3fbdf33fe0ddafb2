"""``python -m cudagraph_backend <command>``: the commands of this package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cudagraph_backend.demo import cli as demo


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cudagraph_backend",
        description="sharedgraph: a torch.compile backend; graphs of all sizes write into one pooled output tensor.",
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    demo.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = build_parser().parse_args(argv)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
