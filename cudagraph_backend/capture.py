"""Capture: run a bucket once for real, which answers the call, then capture it without running it again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import sympy
import torch

from cudagraph_backend.dispatch import Bucket, Plan, Table
from cudagraph_backend.errors import Refusal
from cudagraph_backend.outputs import (
    Layout,
    copy_out,
    detached,
    layout_at,
    observed_layout,
    range_nbytes_at,
    stride_refusal,
)
from cudagraph_backend.region import TensorOutput, evaluate, evaluate_all
from cudagraph_backend.tree import CapturedGraph, Ranges


def bucket_inputs(plan: Plan, args: Sequence[Any]) -> list[Any]:
    """The arguments to run a bucket with: its sizes and staging buffers, and the call's own static arguments."""
    return [arg if own is None else own for arg, own in zip_longest(args, plan.bucket.args)]


def run_once(table: Table, inputs: Sequence[Any]) -> Sequence[Any] | Refusal:
    """The results of the bucket, or a refusal if there is no memory to run it and nothing was changed yet."""
    try:
        return table.device.driver.run_once(lambda: table.run(list(inputs)))
    except torch.OutOfMemoryError:
        if table.region.has_effects:
            raise
        return Refusal("no memory to run a padded bucket")


def provide_ranges(
    table: Table, plan: Plan, results: Sequence[Any], inputs: Sequence[Any], ranges: Ranges
) -> Layout | Refusal:
    """Observe the bucket's layout and make the place's ranges long enough for it, and for the largest bucket."""
    region, bucket = table.region, plan.bucket
    values, real = region.values(bucket.sizes), region.values(plan.sizes)
    layout = observed_layout(region, results, inputs, values)
    if isinstance(layout, Refusal):
        return layout
    if refusal := stride_refusal(region, layout, values):
        return refusal
    if bucket.layout not in (None, layout):  # graphs of the bucket share one layout
        return Refusal("with these static inputs the outputs lie elsewhere than with those captured before")
    largest = range_nbytes_at(region, layout, table.largest(values))
    needs = [max(pair) for pair in zip(layout.range_nbytes, largest, strict=True)]
    try:
        try:
            table.place.reserve(ranges, needs)
        except torch.OutOfMemoryError:
            table.place.reserve(ranges, layout.range_nbytes)
    except torch.OutOfMemoryError as error:
        return Refusal(f"no memory for the output pool: {error}")
    bucket.layout, plan.layout = layout, layout_at(region, layout, real)
    copy_out(layout, results, ranges)
    return layout


def record(table: Table, bucket: Bucket, layout: Layout, inputs: Sequence[Any], ranges: Ranges) -> None:
    """Capture the bucket, which writes its outputs as ``layout`` says. Raises ``CaptureError`` if that fails."""
    run, targets = table.run, ranges[: len(layout.range_nbytes)]

    def run_into_pool() -> None:
        copy_out(layout, run(list(inputs)), targets)

    graph = table.device.driver.capture(run_into_pool)
    addresses = [value.data_ptr() if i in table.static else None for i, value in enumerate(inputs)]
    table.add(bucket, CapturedGraph(graph, addresses, targets))


def detached_outputs(
    table: Table, plan: Plan, args: Sequence[Any], inputs: Sequence[Any], results: Sequence[Any]
) -> list[Any]:
    """Answer from a run whose results can't go to the pool: the real rows, in memory of their own."""
    values = table.region.values(plan.sizes)
    own = {id(value): arg for value, arg in zip(inputs, args, strict=True) if isinstance(value, torch.Tensor)}
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
