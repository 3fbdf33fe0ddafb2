"""Debugging: what our passes change in a region's graph, as diffs in the log (``SHAREDGRAPH_DEBUG=graphs``)."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator, Sequence

from torch.fx import GraphModule

log = logging.getLogger("cudagraph_backend")


@contextlib.contextmanager
def logged_change(what: str, module: GraphModule) -> Iterator[None]:
    """Log what is changed in the module's graph within the ``with`` block; ``what`` names the pass, and the region."""
    before = _lines(module)
    yield
    _log(what, before, _lines(module))


def log_split(what: str, module: GraphModule, parts: Sequence[tuple[str, GraphModule]]) -> None:
    """Log how a graph was split into parts, each with a title."""
    after = [line for title, part in parts for line in (f"# {title}", *_lines(part))]
    _log(what, _lines(module), after)


def _log(what: str, before: Sequence[str], after: Sequence[str]) -> None:
    diff = list(difflib.unified_diff(before, after, f"before {what}", f"after {what}", lineterm=""))
    if diff:
        log.info("\n".join(diff))


def _lines(module: GraphModule) -> list[str]:
    """Return the graph as code, with the type, sizes and device of each value: a pass may change these alone."""
    return module.print_readable(print_output=False, include_device=True).splitlines()
