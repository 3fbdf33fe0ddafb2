"""The user's source lines behind FX nodes."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.fx import Graph, Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n\s*(?P<code>[^\n]*)')
_TORCH = f"{Path(torch.__file__).parent}/"
_ROOT = re.compile(r"^L\['[^']*'\]\.?")
_SUBMODULE = re.compile(r"_modules\['([^']*)'\]")


def source_line(node: Node) -> str | None:
    """Return the innermost user frame that produced ``node``, as ``file.py:12 in forward: y = x.mean(0)``.

    Dynamo leaves out the frames of ``torch.nn``. Where there is no other, as in an ``nn.Sequential`` that is compiled
    itself, the module's path and class stand in: ``module layers.1 (BatchNorm1d)``.
    """
    frame = _innermost_frame(node)
    if frame is None:
        return _module(node)
    return f"{frame['file']}:{frame['line']} in {frame['function']}: {frame['code'].strip()}"


def source_spans(graph: Graph) -> tuple[str, ...]:
    """Return the user's functions that a graph was traced from, in order, as ``file.py:10-34 in forward``.

    Without any, the outermost modules, as in :func:`source_line`.
    """
    spans: dict[tuple[str, str], list[int]] = {}
    for node in graph.nodes:
        frame = _innermost_frame(node)
        if frame is not None:
            spans.setdefault((frame["file"], frame["function"]), []).append(int(frame["line"]))
    if spans:
        return tuple(f"{file}:{min(lines)}-{max(lines)} in {name}" for (file, name), lines in spans.items())
    return tuple(dict.fromkeys(module for node in graph.nodes if (module := _module(node, depth=0)) is not None))


def first_use(node: Node) -> str | None:
    """Return the source line of the first operator that reads ``node``, an input, which has no line of its own."""
    return next((line for user in node.users if (line := source_line(user)) is not None), None)


def _innermost_frame(node: Node) -> re.Match[str] | None:
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    users = [frame for frame in frames if not frame["file"].startswith(_TORCH)]
    return users[-1] if users else None


def _module(node: Node, depth: int = -1) -> str | None:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path, kind = list(stack.values())[depth]
    path = _SUBMODULE.sub(r"\1", _ROOT.sub("", path))
    name = getattr(kind, "__name__", str(kind))
    return f"module {path} ({name})" if path else f"module {name}"
