"""What a capture on a GPU holds: the state of generators, workspaces of cuBLAS, allocations of a pool."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def generator_state_apart(device: torch.device) -> Iterator[None]:
    """Begin a capture in here that draws no random numbers.

    A capture takes the device's default generator, from which no thread can draw until it ends. One that begins here
    takes a copy of the generator's state; the generator itself goes on with its own.
    """
    generator = torch.cuda.default_generators[device.index]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(state)


def register_generator(graph: torch.cuda.CUDAGraph, generator: torch.Generator) -> None:
    """Let a graph that will be captured draw from a generator, other numbers at every replay.

    A torch that lacks this finds the generators of a capture by itself.
    """
    if hasattr(graph, "register_generator_state"):
        graph.register_generator_state(generator)


def clear_cublas_workspaces() -> None:
    torch._C._cuda_clearCublasWorkspaces()


def end_failed_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """Stop routing allocations to a pool, which ``CUDAGraph.capture_end`` does not do when it fails."""
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
