"""What Dynamo knows of a frame: where its inputs come from, what is asked of its graph, whose code it has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import finalize

import torch
from torch._C._dynamo.eval_frame import _reset_precompile_entries
from torch._dynamo.eval_frame import innermost_fn
from torch._dynamo.package import DynamoCache
from torch._functorch._aot_autograd.descriptors import PlainAOTInput


def input_sources(gm: torch.fx.GraphModule) -> list[str]:
    """Return where the user's frame holds each input of a Dynamo graph, e.g. ``L['batch']['labels']``.

    Without Dynamo's record of that, the input's name in the graph.
    """
    nodes = gm.graph.find_nodes(op="placeholder")
    return [getattr(getattr(node, "_dynamo_source", None), "name", str(node.target)) for node in nodes]


def take_graph_override(gm: torch.fx.GraphModule) -> tuple[bool | None, bool | None]:
    """Take what ``torch._dynamo.override_cudagraphs`` says of forward and backward off a Dynamo graph.

    It is there since torch 2.13. Where it asks for graphs, Inductor would make stock's if it were left on the graph.
    """
    said = gm.meta.pop("cudagraph_annotation", None)
    return getattr(said, "fwd", None), getattr(said, "bwd", None)


def keep_precompiled_code_apart(backend: Any) -> None:
    """Let functions that ``backend`` compiles neither get nor leave anything in torch's precompile cache.

    With ``torch._dynamo.config.caching_precompile`` the cache is asked when a function is handed to ``torch.compile``,
    before any backend is called, and knows it by name and line alone: it would answer with what another backend left,
    plain Inductor's code. Of ours it could keep no more than an entry without code, in place of that of the other.
    """
    load, record = DynamoCache.load, DynamoCache.record_package
    ours: set[int] = set()  # by identity: equal code may stand in another file

    def load_unless_ours(function: Callable[..., Any]) -> Any:
        context = sys._getframe(1).f_locals.get("self")  # the cache is not told for which backend it is asked
        code = innermost_fn(function).__code__
        if backend in _backends_of(context):
            if id(code) not in ours:
                ours.add(id(code))
                finalize(code, ours.discard, id(code))
            _reset_precompile_entries(code)  # those that another backend has loaded
        return None if id(code) in ours else load(function)

    def record_unless_ours(package: Any) -> None:
        if id(package._innermost_fn.__code__) not in ours:
            record(package)

    DynamoCache.load = load_unless_ours  # type: ignore[method-assign, assignment]
    DynamoCache.record_package = record_unless_ours  # type: ignore[method-assign]


def _backends_of(context: Any) -> tuple[Any, ...]:
    """Return what a context of Dynamo compiles with: the backend, and what ``torch.compile``'s wrapper of it wraps."""
    found: Any = getattr(context, "callback", None)
    while hasattr(found, "_torchdynamo_orig_backend"):
        found = found._torchdynamo_orig_backend
    return found, getattr(found, "compiler_fn", None)


def call_input(node: torch.fx.Node) -> int | None:
    """Return which input of the Dynamo graph a region's input is, unchanged; ``None`` for all that AOTAutograd adds.

    Holds for backward regions too: what the forward hands on to them as it got it.
    """
    described = node.meta.get("desc")
    return described.idx if isinstance(described, PlainAOTInput) else None
