"""All programs: what people run and train beside the architectures of the catalogue, each with its verdicts."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from tests.architectures import agents, graphs, losses, recommenders, training
from tests.architectures.program import Program


def _of_pyg() -> Iterator[Program]:
    """Those of PyTorch Geometric, where it is installed."""
    if find_spec("torch_geometric") is not None:
        from tests.architectures import pyg

        yield from pyg.programs()


PROGRAMS: tuple[Program, ...] = (
    *_of_pyg(),
    *graphs.programs(),
    *training.programs(),
    *losses.programs(),
    *agents.programs(),
    *recommenders.programs(),
)
