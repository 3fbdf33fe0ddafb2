"""Capture: run a bucket once for real, which answers the call, then capture it without running it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import sympy
import torch

from cudagraph_backend.dispatch import Table
from cudagraph_backend.drivers import Graph
from cudagraph_backend.errors import Refusal
from cudagraph_backend.outputs import (
    Layout,
    Pooled,
    apart_refusal,
    copy_out,
    detached,
    handed_back,
    layout_at,
    observed_layout,
    range_nbytes_at,
    stride_refusal,
)
from cudagraph_backend.plan import Bucket, Plan
from cudagraph_backend.region import TensorOutput, evaluate, evaluate_all
from cudagraph_backend.staging import Reading, stage
from cudagraph_backend.strides import extent
from cudagraph_backend.torch_internals import Compiled, is_generator
from cudagraph_backend.tree import Place, Route, bucket_inputs, no_memory


def with_static(inputs: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """What to run a bucket with: its own inputs, and the call's static arguments."""
    return [arg if own is None else own for arg, own in zip_longest(args, inputs)]


def run_padded(table: Table, plan: Plan, run: Compiled, args: Sequence[Any]) -> list[Any]:
    """Answer a call from a run of its bucket that is not captured, on copies of what is padded."""
    buffers: dict[int, torch.Tensor] = {}
    copies = []
    for reading in plan.readings:
        if reading.real != reading.shape:
            buffers[reading.index] = new_buffer(reading, table.region.device)
            copies.append(reading.copy_to(buffers[reading.index]))
    stage(copies, (), args)
    inputs = with_static(bucket_inputs(table.region, plan.bucket.sizes, buffers), args)
    return detached_outputs(table, plan, args, inputs, run(list(inputs)))


def new_buffer(reading: Reading, device: torch.device) -> torch.Tensor:
    """Memory of its own for an input of a bucket."""
    memory = torch.zeros(max(extent(*reading.shape), 1), dtype=reading.dtype, device=device)
    return memory.as_strided(*reading.shape)


def run_once(table: Table, route: Route, inputs: Sequence[Any]) -> list[Any] | Refusal:
    """The results of the bucket, or a refusal if there is no memory to run it and nothing was changed yet.

    A backward may have overwritten what it was given, if that was read in place.
    """
    try:
        with table.allocations.run({}):
            return list(table.run(list(inputs)))
    except torch.OutOfMemoryError:
        if table.region.has_effects or (table.region.kind == "backward" and route.in_place):
            raise
        return Refusal("no memory to run a padded bucket")


def provide(table: Table, plan: Plan, results: Sequence[Any], inputs: Sequence[Any], route: Route) -> Route | Refusal:
    """Observe the bucket's layout, and find ranges for it; the route may lead to a new place then.

    They are long enough for the largest bucket that is known of.
    """
    region, bucket = table.region, plan.bucket
    values = region.values(bucket.sizes)
    layout = observed_layout(region, results, inputs, values)
    if isinstance(layout, Refusal):
        return layout
    if refusal := stride_refusal(region, layout, values):
        return refusal
    if bucket.layout not in (None, layout):  # graphs of the bucket share one layout
        return Refusal("with these static inputs the outputs lie elsewhere than with those captured before")
    largest = range_nbytes_at(region, layout, table.largest(values))
    provided = [max(pair) for pair in zip(layout.range_nbytes, largest, strict=True)]
    try:
        route = table.tree.provide(route, layout.range_nbytes, provided)
    except torch.OutOfMemoryError as error:
        return no_memory(error)
    bucket.layout = layout
    plan.layout = layout_at(region, layout, region.values(plan.sizes))
    return apart_refusal(plan.layout) or route


def record(table: Table, bucket: Bucket, results: list[Any], inputs: Sequence[Any], place: Place) -> Graph:
    """Put the results of the run in the pool, and capture the bucket, which writes them there itself.

    The list of results is emptied, so that they take no memory while the bucket is captured. Raises ``CaptureError``.
    """
    layout, pool, run, allocations = bucket.layout, table.device.pool, table.run, table.allocations
    assert layout is not None
    ranges = zip(place.outputs, layout.range_nbytes, strict=False)
    storages = [pool.bytes(taken.offset, nbytes).untyped_storage() for taken, nbytes in ranges]
    memory = _memory_of_buffers(table, layout, results, storages)
    copy_out(layout, results, storages)
    results.clear()

    def run_into_pool() -> None:
        with allocations.run(memory):
            bucket.copied = copy_out(layout, run(list(inputs)), storages)

    generators = [inputs[i] for i in table.region.objects if is_generator(inputs[i])]
    return table.device.driver.capture(
        run_into_pool, draws=table.region.may_draw, stages=bool(table.region.staged), generators=generators
    )


def _memory_of_buffers(
    table: Table, layout: Layout, results: Sequence[Any], storages: Sequence[torch.UntypedStorage]
) -> Mapping[int, torch.UntypedStorage]:
    """For those buffers of the run that ended up as outputs, the memory of their ranges."""
    memory: dict[int, torch.UntypedStorage] = {}
    for entry, result in zip(layout.entries, results, strict=True):
        if isinstance(entry, Pooled):
            number, storage = table.allocations.number_of(result), storages[entry.range]
            if number is not None and result.untyped_storage().nbytes() <= storage.nbytes():
                memory[number] = storage
    return memory


def detached_outputs(
    table: Table, plan: Plan, args: Sequence[Any], inputs: Sequence[Any], results: Sequence[Any]
) -> list[Any]:
    """Answer from a run whose results can't go to the pool: the real rows, in memory of their own."""
    values = table.region.values(plan.sizes)
    own = {id(inputs[index]): args[index] for index in handed_back(table.region)}
    outputs: list[Any] = []
    for result, known in zip(results, table.region.outputs, strict=True):
        if id(result) in own:
            outputs.append(own[id(result)])
        elif isinstance(result, torch.Tensor) and isinstance(known, TensorOutput):
            outputs.append(detached(result, evaluate_all(known.size, values)))
            own[id(result)] = outputs[-1]  # returned twice, it stays one object
        else:
            outputs.append(evaluate(known, values) if isinstance(known, sympy.Expr) else result)
    return outputs
