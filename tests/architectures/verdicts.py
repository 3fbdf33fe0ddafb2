"""What the analysis says of an architecture's regions, and whether that is true when they are run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.printers import PythonPrinter

from cudagraph_backend.compile.analysis import analyse, complete
from cudagraph_backend.errors import Refusal
from cudagraph_backend.options import Options
from cudagraph_backend.padding.prove import Verdict
from cudagraph_backend.region import DynamicDim
from tests.architectures.catalogue import Architecture, build
from tests.support.oracle import Region, dynamic, recorded, refute

SIZES = (5, 4)


@dataclass(frozen=True, slots=True)
class Finding:
    """One region of an architecture: its dynamic dims, or why it can't be captured."""

    region: Region
    dims: tuple[DynamicDim, ...]
    uncapturable: Refusal | None

    @property
    def refusals(self) -> list[Refusal]:
        """Everything that keeps the region from being padded."""
        whole = [self.uncapturable] if self.uncapturable else []
        return whole + [dim.refusal for dim in self.dims if dim.refusal]

    def refutation(self) -> str | None:
        """What is not as promised when the region is run with padded rows; None if all is well."""
        safe = [Verdict(dim.symbols, None, dim.needs_fill) for dim in self.dims if dim.refusal is None]
        return next((problem for verdict in safe if (problem := refute(self.region, verdict))), None)


def findings(architecture: Architecture) -> list[Finding]:
    """One per region of a model served with two batch sizes, as the backend would analyse them.

    After a graph break, Dynamo takes sizes as fixed until a second call shows that they change. So of the compilations
    of one frame the last counts.
    """
    model, batch = build(architecture)
    compiled, found = recorded(model, fullgraph=False)
    with torch.no_grad():
        for size in SIZES:
            compiled(**_with_dynamic_batch(batch(size)))
    last = {region.frame: region for region in found}
    return [_analysed(region, number) for number, region in enumerate(last.values())]


def _analysed(region: Region, number: int) -> Finding:
    sizes = region.sizes()
    analysed = analyse(region.module, region.metas, "inference", (), Options(), number)  # puts masks into the module
    completed = complete(analysed, as_compiled(region.module))
    counts = [count.make(sizes, torch.device("cpu")) for count in analysed.counts]
    return Finding(replace(region, args=(*region.args, *counts)), completed.dims, completed.refusal)


def as_compiled(module: GraphModule) -> SimpleNamespace:
    """What Inductor would say of a region; it keeps the strides of outputs as they are in the graph."""
    nodes = list(module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    written = {node.args[0] for node in nodes if node.target is torch.ops.aten.copy_.default}
    outputs = [item.meta.get("val") if isinstance(item, Node) else item for item in nodes[-1].args[0]]
    return SimpleNamespace(
        output_strides=[_strides(v) if isinstance(v, torch.Tensor) else None for v in outputs],
        mutated_input_idxs=[index for index, node in enumerate(inputs) if node in written],
        disabled_cudagraphs_reason=None,
    )


def _strides(value: torch.Tensor) -> tuple[str, ...] | None:
    """Strides as Inductor writes them; ``None`` if they depend on data."""
    strides = [stride.node.expr if isinstance(stride, torch.SymInt) else stride for stride in value.stride()]
    if any(free_unbacked_symbols(stride) for stride in strides):
        return None
    return tuple(PythonPrinter().doprint(stride) for stride in strides)


def _with_dynamic_batch(batch: dict[str, Any]) -> dict[str, Any]:
    for tensor in _tensors(batch):
        dynamic(tensor)
    return batch


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif hasattr(value, "layers"):  # a cache of transformers
        for layer in value.layers:
            yield from (layer.keys, layer.values)


def surprise(architecture: Architecture, found: list[Finding]) -> str | None:
    """What is not as the catalogue expects, or not true when run; None if all is well."""
    refusals = [refusal for finding in found for refusal in finding.refusals]
    reasons = [str(refusal) for refusal in refusals]
    if not any(finding.dims for finding in found):
        return "no region has a dynamic dim"
    if architecture.refused is None and reasons:
        return f"refused: {'; '.join(reasons)}"
    if architecture.refused is not None and not any(architecture.refused in reason for reason in reasons):
        return f"to be refused for {architecture.refused!r}, but got {reasons}"
    if any(refusal.source is None for refusal in refusals):
        return f"refused without a source line: {reasons}"
    return next((problem for finding in found if (problem := finding.refutation())), None)
