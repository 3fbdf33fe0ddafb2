"""What is measured, one module per topic.

A topic has ``JOBS``, the names of what is run in a process of its own; ``LIMIT_S``, the most seconds that a job may
take; and ``run(job, settings)``, which returns rows.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch

# In the order in which they run: where time is short, the last ones are left out.
NAMES = ("memory", "host_cost", "serving", "feedback", "kept", "graph_breaks", "training", "minilm", "irregular")


@dataclass(frozen=True, slots=True)
class Settings:
    """``quick``: tiny sizes, which test the code and measure nothing."""

    device: torch.device
    quick: bool


def load(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.topics.{name}")
