"""Running a bucket without a graph: before it is captured, to probe it, and where no graph may answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import sympy
import torch

from cudagraph_backend.errors import Refusal
from cudagraph_backend.memory.copies import stage
from cudagraph_backend.memory.strides import extent
from cudagraph_backend.region import Region, TensorOutput, evaluate, evaluate_all
from cudagraph_backend.runtime.layout import detached, handed_back
from cudagraph_backend.runtime.plan import Plan
from cudagraph_backend.runtime.readings import Reading
from cudagraph_backend.runtime.region_state import RegionState
from cudagraph_backend.runtime.route import Route, bucket_inputs
from cudagraph_backend.torch_internals import Compiled


def with_static(inputs: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Return what to run a bucket with: its own inputs, and the call's static arguments."""
    return [arg if own is None else own for arg, own in zip_longest(args, inputs)]


def new_buffer(reading: Reading, device: torch.device) -> torch.Tensor:
    """Make memory of its own for an input of a bucket."""
    memory = torch.zeros(max(extent(*reading.shape), 1), dtype=reading.dtype, device=device)
    return memory.as_strided(*reading.shape)


def run_once(state: RegionState, route: Route, inputs: Sequence[Any]) -> list[Any] | Refusal:
    """Return the results of the bucket, or a refusal if there is no memory to run it and nothing was changed yet.

    A backward may have overwritten what it was given, if that was read in place.
    """
    try:
        with state.allocations.run({}):
            return list(state.run(list(inputs)))
    except torch.OutOfMemoryError:
        if state.region.has_effects or (state.region.kind == "backward" and route.in_place):
            raise
        return Refusal("no memory to run a padded bucket")


def run_padded(region: Region, plan: Plan, run: Compiled, args: Sequence[Any]) -> list[Any]:
    """Answer a call from a run of its bucket that is not captured, on copies of what is padded."""
    buffers: dict[int, torch.Tensor] = {}
    copies = []
    for reading in plan.readings:
        if reading.real != reading.shape:
            buffers[reading.index] = new_buffer(reading, region.device)
            copies.append(reading.copy_to(buffers[reading.index]))
    stage(copies, (), args)
    inputs = with_static(bucket_inputs(region, plan.bucket.sizes, buffers), args)
    return detached_outputs(region, plan, args, inputs, run(list(inputs)))


def detached_outputs(
    region: Region, plan: Plan, args: Sequence[Any], inputs: Sequence[Any], results: Sequence[Any]
) -> list[Any]:
    """Answer from a run whose results can't go to the pool: the real rows, in memory of their own."""
    values = region.values(plan.sizes)
    own = {id(inputs[index]): args[index] for index in handed_back(region)}
    outputs: list[Any] = []
    for result, known in zip(results, region.outputs, strict=True):
        if id(result) in own:
            outputs.append(own[id(result)])
        elif isinstance(result, torch.Tensor) and isinstance(known, TensorOutput):
            outputs.append(detached(result, evaluate_all(known.size, values)))
            own[id(result)] = outputs[-1]  # returned twice, it stays one object
        else:
            outputs.append(evaluate(known, values) if isinstance(known, sympy.Expr) else result)
    return outputs
