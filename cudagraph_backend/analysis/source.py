"""The user's source lines behind FX nodes."""

from __future__ import annotations

import re

from torch.fx import Graph, Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n\s*(?P<code>[^\n]*)')


def source_line(node: Node) -> str | None:
    """The innermost user frame that produced ``node``, as ``file.py:12 in forward: y = x.mean(0)``."""
    frame = _innermost_frame(node)
    if frame is None:
        return None
    return f"{frame['file']}:{frame['line']} in {frame['function']}: {frame['code'].strip()}"


def source_spans(graph: Graph) -> tuple[str, ...]:
    """The user's functions that a graph was traced from, in order, as ``file.py:10-34 in forward``."""
    spans: dict[tuple[str, str], list[int]] = {}
    for node in graph.nodes:
        frame = _innermost_frame(node)
        if frame is not None:
            spans.setdefault((frame["file"], frame["function"]), []).append(int(frame["line"]))
    return tuple(f"{file}:{min(lines)}-{max(lines)} in {name}" for (file, name), lines in spans.items())


def _innermost_frame(node: Node) -> re.Match[str] | None:
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    return frames[-1] if frames else None
