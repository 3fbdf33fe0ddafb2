"""Compiles regions without Inductor: what stands for its code is the graph itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Compile = Callable[..., Callable[..., Any]]


class RunsItsGraph:
    """Stands for the code that Inductor makes: runs the graph and states what Inductor would state of it."""

    _boxed_call = True

    def __init__(self, gm: torch.fx.GraphModule):
        self.run = gm.forward
        outputs = gm.graph.output_node().args[0]
        values = [o.meta["val"] if isinstance(o, torch.fx.Node) else o for o in outputs]
        self.strides = [tuple(map(str, v.stride())) if isinstance(v, torch.Tensor) else None for v in values]
        inputs = list(gm.graph.find_nodes(op="placeholder"))
        writes = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
        self.mutated = frozenset(inputs.index(node.args[0]) for node in writes)

    def __call__(self, args: list[Any]) -> Any:
        given = list(args)
        args.clear()
        return self.run(*given)
