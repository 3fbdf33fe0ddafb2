"""Can a region be captured at all? Each predicate gives a refusal or ``None``; the first refusal counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from cudagraph_backend.analysis.inputs import input_refusals
from cudagraph_backend.analysis.padding.call import leaves
from cudagraph_backend.analysis.source import source_line
from cudagraph_backend.errors import Refusal
from cudagraph_backend.torch_internals import SYMBOLIC, expr, is_backed, is_higher_order

_CAPTURABLE_DEVICES = ("cuda", "cpu")


def capture_refusal(graph: Graph, example_inputs: Sequence[Any], devices: set[torch.device]) -> Refusal | None:
    """Why a region must always run as compiled code, or ``None``."""
    return (
        _refused_device(devices, graph)
        or next(iter(input_refusals(graph, example_inputs).values()), None)
        or next((r for node in graph.nodes if (r := _refused_op(node))), None)
    )


def devices_of(graph: Graph) -> set[torch.device]:
    """Every device that a value of the graph lives on; ``meta`` is none."""
    return {device for node in graph.nodes for device in _places(node)}


def main_device(graph: Graph) -> torch.device:
    """The device that graphs are captured on: if there is a GPU, the one with most of the values."""
    counts = Counter(device for node in graph.nodes for device in _places(node))
    on_gpu = [device for device, _ in counts.most_common() if device.type == "cuda"]
    return next(iter((*on_gpu, *counts)), torch.device("cpu"))


def op_refusal(node: Node, device: torch.device) -> Refusal | None:
    """Why an operator can't be part of a graph on ``device``, or ``None``."""
    return _refused_op(node) or _refused_place(node, device)


def tensors_of(node: Node) -> Iterator[torch.Tensor]:
    return (v for v in leaves(node.meta.get("val")) if isinstance(v, torch.Tensor))


def _places(node: Node) -> Iterator[torch.device]:
    """Where the tensors of a node are. One on the device ``meta`` is nowhere: it has a shape, and no memory."""
    return (t.device for t in tensors_of(node) if t.device.type != "meta")


def _refused_device(devices: set[torch.device], graph: Graph) -> Refusal | None:
    if not devices:
        return Refusal("nothing to capture: the region holds no tensor that has memory")
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        minority = next((n for n in graph.nodes if any(t.device.type == "cpu" for t in tensors_of(n))), None)
        source = source_line(minority) if minority is not None else None
        return Refusal(
            f"the region mixes devices: {names}", op=str(minority.target) if minority else None, source=source
        )
    return device_refusal(next(iter(devices)))


def device_refusal(device: torch.device) -> Refusal | None:
    return None if device.type in _CAPTURABLE_DEVICES else Refusal(f"no graph driver for device {device}")


def _refused_place(node: Node, device: torch.device) -> Refusal | None:
    others = {place for value in (node, *node.all_input_nodes) for place in _places(value)} - {device}
    names = " and ".join(sorted(map(str, {device, *others})))
    return _refuse(node, f"the region mixes devices: {names}") if others else None


def _refused_op(node: Node) -> Refusal | None:
    if node.op in ("placeholder", "output"):
        return None
    if node.op == "get_attr":
        value = node.meta.get("val")
        return None if isinstance(value, torch.Tensor) or value is None else _refuse(node, "a captured object is read")
    if is_higher_order(node.target):
        return _refuse(node, "a higher-order operator may branch on data")
    tags = getattr(node.target, "tags", ())
    # The tag dynamic_output_shape says too little: aten.index has it, and gives such a shape for boolean masks only.
    read = (node, *node.all_input_nodes)
    if torch.Tag.data_dependent_output in tags or any(map(_has_unbacked_size, read)):
        return _refuse(node, "a size or value depends on data")
    if any(tag.name == "cudagraph_unsafe" for tag in tags):
        return _refuse(node, "the operator is tagged unsafe for CUDA graphs")
    return None


def _has_unbacked_size(node: Node) -> bool:
    for value in leaves(node.meta.get("val")):
        sizes: tuple[Any, ...] = (value,)
        if isinstance(value, torch.Tensor):
            sizes = (*value.shape, *value.stride(), value.storage_offset())
        if any(isinstance(size, SYMBOLIC) and not is_backed(expr(size)) for size in sizes):
            return True
    return False


def _refuse(node: Node, reason: str) -> Refusal:
    return Refusal(reason, op=str(node.target), source=source_line(node))
