"""What compiling a region in parts needs: modules of the parts, and the strides that go in and out."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch._guards import TracingContext
from torch._inductor.compile_fx import fake_tensor_prop

from cudagraph_backend.torch_internals.fx import submodule_of
from cudagraph_backend.torch_internals.shapes import expr


@contextlib.contextmanager
def compiling_a_part() -> Iterator[list[Any]]:
    """Let a part of a region be compiled; yields the list to which Inductor appends its outputs' strides.

    AOTAutograd reads one such list per region. It also tells Inductor which inputs of a backward region may be
    overwritten: not here, as they are numbered in the region, and another part may read them.
    """
    context = TracingContext.try_get()
    metadata = getattr(context, "fw_metadata", None)
    donated = getattr(metadata, "bw_donated_idxs", None)
    if donated is not None:
        metadata.bw_donated_idxs = []  # type: ignore[union-attr]
    try:
        with TracingContext.report_output_strides() as strides:
            yield [] if strides is None else strides
    finally:
        if donated is not None:
            metadata.bw_donated_idxs = donated  # type: ignore[union-attr]


def retrace_strides(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Let the values of a graph have the strides that follow from those of its inputs.

    What a forward region saves may have other strides than those that its backward was traced with.
    """
    inputs = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    pairs = [(v, e) for v, e in zip(inputs, example_inputs, strict=True) if isinstance(v, torch.Tensor)]
    if any([*map(expr, v.stride())] != [*map(expr, e.stride())] for v, e in pairs):
        with torch.no_grad():
            fake_tensor_prop(gm, example_inputs)


def report_output_strides(strides: Sequence[Any]) -> None:
    """Tell AOTAutograd the strides of a region's outputs, as Inductor does of what it compiles; ``None``: as traced."""
    context = TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        context.output_strides.extend(strides)


def report_as_traced(outputs: Collection[int]) -> None:
    """Tell AOTAutograd that these outputs of a region have the strides that they were traced with."""
    context = TracingContext.try_get()
    if context is not None and context.output_strides:
        for index in outputs:
            context.output_strides[index] = None


def forget_output_strides() -> None:
    """Forget what was reported of the strides of a region's outputs, before it is compiled again."""
    context = TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        context.output_strides.clear()


def visible_outputs(graph: torch.fx.Graph) -> Sequence[int]:
    """Return the indices of the outputs whose strides Inductor must keep."""
    return graph.output_node().meta.get("user_visible_output_idxs", ())


def mark_visible(graph: torch.fx.Graph, indices: list[int]) -> None:
    graph.output_node().meta["user_visible_output_idxs"] = indices


def module_of(graph: torch.fx.Graph, whole: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return a module of a part of the graph of ``whole``, with the constants and the sizes' environment of that.

    The graphs inside are copied: Inductor changes what it compiles, and may be given several parts that hold them.
    """
    module = torch.fx.GraphModule(whole, graph)
    module.meta.update(whole.meta)
    inside = {str(n.target): submodule_of(n) for n in graph.find_nodes(op="get_attr")}
    for path, submodule in inside.items():
        if submodule is not None:
            module.set_submodule(path, _copied(submodule))
    if getattr(whole, "shape_env", None) is not None:
        module.shape_env = whole.shape_env  # type: ignore[assignment]
    return module


def _copied(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    graph.output_node().meta = dict(module.graph.output_node().meta)
    return module_of(graph, module)
