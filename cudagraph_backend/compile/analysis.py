"""Analysis: reads a region's FX graph before Inductor consumes it, and says what may be padded and captured.

``analyse`` runs before Inductor and needs the graph alone; ``complete`` adds what only Inductor knows: the layout of
outputs, which inputs are written, and the sizes that the compiled code admits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule

from cudagraph_backend import torch_internals
from cudagraph_backend.compile.capturable import capture_refusal, devices_of, main_device
from cudagraph_backend.compile.dims import dynamic_dims
from cudagraph_backend.compile.inputs import object_inputs, plain_inputs, size_inputs, tensor_inputs
from cudagraph_backend.compile.outputs import graph_outputs, with_strides
from cudagraph_backend.compile.probing import (
    draws_random_numbers,
    lasting_effect,
    may_draw_random_numbers,
    number_from_floats,
    precision,
)
from cudagraph_backend.drivers.platforms import is_accelerator
from cudagraph_backend.errors import Refusal
from cudagraph_backend.fill import InputName
from cudagraph_backend.graph.operators import communicates, targets_in
from cudagraph_backend.graph.source import source_spans
from cudagraph_backend.memory.strides import overlaps_itself
from cudagraph_backend.options import Options
from cudagraph_backend.region import CountInput, DynamicDim, Kind, Region, SizeInput, TensorInput


def analyse(
    module: GraphModule,
    example_inputs: Sequence[Any],
    kind: Kind,
    static: Collection[int],
    options: Options,
    number: int,
    names: Sequence[InputName] = (),
    driver_refusal: Callable[[torch.device], Refusal | None] = lambda device: None,
    known_refusal: Refusal | None = None,
    marked: frozenset[sympy.Symbol] = frozenset(),
) -> Region:
    """Return what the FX graph of a region says. A dim that needs masks gets them, and the graph an input (``counts``).

    Args:
        static: the indices of inputs whose address never changes.
        names: what the user's call names the inputs of the Dynamo graph, in their order.
        driver_refusal: why a device has no driver.
        known_refusal: why the region can't be captured, where that is known before.
        marked: the sizes that the user has marked dynamic.

    Raises:
        OptionError: a number to fill an input's padded rows with does not fit its dtype.
    """
    graph = module.graph
    devices = devices_of(graph)
    device = next(iter(devices), torch.device("cpu"))
    refusal = (
        known_refusal or capture_refusal(graph, example_inputs, devices, unsafe_ops(options)) or driver_refusal(device)
    )
    sizes = size_inputs(example_inputs)
    inputs = tensor_inputs(graph, example_inputs, device, static, names, options.fill)
    objects = object_inputs(graph, example_inputs)
    shapes = shapes_of(sizes, example_inputs)
    refusal = refusal or _refused_symbols(inputs, sizes)
    effect = lasting_effect(graph)
    agreed = marked if any(map(communicates, targets_in(graph))) else None
    dims, counts = dynamic_dims(module, sizes, inputs, shapes, options, agreed) if refusal is None else ((), ())
    return Region(
        number=number,
        kind=kind,
        device=device,
        inputs=(*inputs, *(_count_tensor(count) for count in counts)),
        sizes=sizes,
        dims=dims,
        counts=counts,
        outputs=graph_outputs(graph, {i.index for i in inputs}),
        shapes=shapes,
        refusal=refusal,
        has_effects=effect is not None or draws_random_numbers(graph),
        effect=effect,
        may_draw=may_draw_random_numbers(graph),
        source_lines=source_spans(graph),
        takes_extremes=number_from_floats(graph) is None,
        precision=precision(graph),
        objects=objects,
    )


def unknown_region(
    module: GraphModule, example_inputs: Sequence[Any], number: int, kind: Kind, refusal: Refusal
) -> Region:
    """Return the record of a region of which nothing is known but why it runs uncaptured.

    A backward needs the shapes of its arguments, as those that were saved may have the strides of a bucket.
    """
    is_backward = kind == "backward"
    return Region(
        number=number,
        kind=kind,
        device=main_device(module.graph),
        inputs=plain_inputs(example_inputs) if is_backward else (),
        sizes=size_inputs(example_inputs) if is_backward else (),
        dims=(),
        counts=(),
        outputs=(None,) * len(module.graph.output_node().args[0]),
        shapes=torch_internals.Shapes([]),
        refusal=refusal,
        has_effects=True,
        source_lines=source_spans(module.graph),
    )


def complete(region: Region, compiled: Any) -> Region:
    """Return the same region with what Inductor decided while compiling it."""
    if region.refusal is not None:
        return region  # it is called as it is; what Inductor states of it may name sizes that only a run tells
    guards_known = region.shapes.freeze_guards()
    mutated = torch_internals.mutated_inputs(compiled)
    inputs = tuple(dataclasses.replace(i, mutated=i.index in mutated) for i in region.inputs)
    outputs = with_strides(region.outputs, torch_internals.output_strides(compiled), region.shapes)
    sends = region.effect is not None
    refusal = _refused_by_inductor(region, compiled) or _refused_mutation(inputs)
    return dataclasses.replace(
        region,
        inputs=inputs,
        outputs=outputs,
        dims=tuple(_with_layout(dim, inputs, sends) if guards_known else _unguarded(dim) for dim in region.dims),
        refusal=refusal,
        has_effects=region.has_effects or bool(mutated),
    )


def unsafe_ops(options: Options) -> frozenset[str]:
    """Return the names of operators not to be captured: the user's, and those in Inductor's own setting just now."""
    return frozenset((*options.uncapturable_ops, *torch_internals.ops_to_partition()))


def shapes_of(sizes: Sequence[SizeInput], example_inputs: Sequence[Any]) -> torch_internals.Shapes:
    """Return what is known of the sizes that are read from the arguments of a region."""
    values = ((example_inputs[size.index], size.dim) for size in sizes)
    return torch_internals.Shapes([value if dim is None else value.shape[dim] for value, dim in values])


def _count_tensor(count: CountInput) -> TensorInput:
    return TensorInput(count.index, count.name, "staged", False, torch.int64, (), ())


def _refused_symbols(inputs: Sequence[TensorInput], sizes: Sequence[SizeInput]) -> Refusal | None:
    known = {s.size for s in sizes}
    for tensor in inputs:
        if unknown := tensor.symbols - known:
            return Refusal(f"no argument of the region gives the size {next(iter(unknown))} of input {tensor.name}")
    return None


def _refused_by_inductor(region: Region, compiled: Any) -> Refusal | None:
    reason = torch_internals.uncapturable_reason(compiled)
    return Refusal(f"Inductor: {reason}") if reason and is_accelerator(region.device) else None


def _refused_mutation(inputs: Sequence[TensorInput]) -> Refusal | None:
    for tensor in inputs:
        if tensor.mutated and tensor.role == "staged" and _is_expanded(tensor):
            return Refusal(f"input {tensor.name} is written in place and several of its entries share an address")
    return None


def _unguarded(dim: DynamicDim) -> DynamicDim:
    reason = "a guard compares the dim with a size that the region does not receive"
    return dim if dim.refusal is not None else dataclasses.replace(dim, refusal=Refusal(reason))


def _with_layout(dim: DynamicDim, inputs: Sequence[TensorInput], sends: bool) -> DynamicDim:
    if dim.refusal is not None:
        return dim
    for tensor in inputs:
        if sends and tensor.mutated and tensor.symbols & dim.symbols:
            refusal = Refusal(f"input {tensor.name} is written in place in a region that communicates")
            return dataclasses.replace(dim, refusal=refusal)
        if _overlaps_when_padded(tensor, dim):
            refusal = Refusal(f"input {tensor.name} would overlap itself in memory")
            return dataclasses.replace(dim, refusal=refusal)
    return dim


def _is_expanded(tensor: TensorInput) -> bool:
    return any(stride == 0 and size != 1 for size, stride in zip(tensor.size, tensor.stride, strict=True))


def _overlaps_when_padded(tensor: TensorInput, dim: DynamicDim) -> bool:
    """Return whether a dynamic size meets a fixed stride that it outgrows: windows, or rows cut from columns.

    Strides that are dynamic themselves are judged call by call, when the bucket is chosen.
    """
    if not tensor.symbols & dim.symbols or any(e.free_symbols for e in tensor.stride):
        return False
    stride = [int(e) for e in tensor.stride]
    padded = dict.fromkeys(dim.symbols, sympy.Integer(1 + max(stride, default=0)))
    size = [int(e.xreplace({**dict.fromkeys(e.free_symbols, sympy.Integer(2)), **padded})) for e in tensor.size]
    return overlaps_itself(size, stride)
