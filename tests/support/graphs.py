"""Takes the graph of a region as AOTAutograd hands it over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

Captured = tuple[GraphModule, Sequence[Any]]


def captured(model: Callable[..., Any], *args: Any, dynamic: bool | None = True) -> Captured:
    """The region that AOTAutograd hands over for a call, with its fake example inputs."""
    seen: list[Captured] = []

    def keep(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append((gm, list(example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=aot_autograd(fw_compiler=keep), dynamic=dynamic, fullgraph=True)(*args)
    return seen[0]
