"""Calls of whole regions without generated code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import cudagraph_backend
from cudagraph_backend import torch_internals
from tests.support.ungenerated import Compile, RunsItsGraph


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compile]:
    """``torch.compile`` with our backend; nothing is generated."""
    monkeypatch.setattr(torch_internals, "compile_region", lambda gm, example_inputs, **kwargs: RunsItsGraph(gm))
    monkeypatch.setattr(torch_internals, "is_compiled_graph", lambda compiled: isinstance(compiled, RunsItsGraph))
    monkeypatch.setattr(torch_internals, "uncapturable_reason", lambda compiled: None)
    monkeypatch.setattr(torch_internals, "output_strides", lambda compiled: compiled.strides)
    monkeypatch.setattr(torch_internals, "mutated_inputs", lambda compiled: compiled.mutated)

    def compile_with(model: Callable[..., Any], dynamic: bool | None = True, **options: Any) -> Callable[..., Any]:
        return torch.compile(model, backend=cudagraph_backend.sharedgraph, dynamic=dynamic, options=options)

    torch._dynamo.reset()
    yield compile_with
    torch._dynamo.reset()
