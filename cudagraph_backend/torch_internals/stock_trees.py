"""PyTorch's own CUDA graph trees: how they count steps, and how many graphs they hold."""

from __future__ import annotations

import torch
from torch._dynamo.mutation_guard import GenerationTracker
from torch._inductor.cudagraph_trees import MarkStepBox, get_manager


def current_step() -> tuple[int, int]:
    """Return the step as PyTorch's own trees count it.

    Every outermost compiled call is a step; from the first ``torch.compiler.cudagraph_mark_step_begin()`` on, these
    calls say where steps begin (the second number, which falls). Read from ``cudagraph_trees.get_curr_generation``.
    """
    marked = MarkStepBox.mark_step_counter
    return (0, marked) if marked else (GenerationTracker.generation, 0)


def forget_marked_steps() -> None:
    """Make every outermost compiled call a step until the next ``torch.compiler.cudagraph_mark_step_begin()``.

    As a reset of stock's trees does. The count is the process's: of all threads, and of stock's trees, too.
    """
    MarkStepBox.mark_step_counter = 0


def stock_graph_count(device: torch.device) -> int:
    """Return the graphs that PyTorch's own cudagraph trees hold; they keep no counter, so the tree is walked."""
    manager = get_manager(device.index or 0, create_if_none_exists=False)
    waiting = [node for nodes in manager.roots.values() for node in nodes] if manager else []
    count = 0
    while waiting:
        node = waiting.pop()
        count += 1
        waiting.extend(child for children in node.children.values() for child in children)
    return count
