"""Can a region be captured at all? Each predicate gives a refusal or ``None``; the first refusal counts."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from cudagraph_backend.analysis.operators import communicates, is_named, targets_of, waits
from cudagraph_backend.analysis.padding.call import leaves
from cudagraph_backend.analysis.source import source_line
from cudagraph_backend.errors import Refusal
from cudagraph_backend.torch_internals import SYMBOLIC, expr, is_backed, is_higher_order

_CAPTURABLE_DEVICES = ("cuda", "cpu")


def capture_refusal(
    graph: Graph, example_inputs: Sequence[Any], devices: set[torch.device], unsafe: Collection[str] = ()
) -> Refusal | None:
    """Why a region must always run as compiled code, or ``None``; ``unsafe`` names operators not to be captured."""
    return (
        _refused_device(devices, graph)
        or input_refusal(graph, example_inputs)
        or next((r for node in graph.nodes if (r := _refused_op(node, unsafe))), None)
    )


def devices_of(graph: Graph) -> set[torch.device]:
    """Every device that a value of the graph lives on."""
    return {t.device for node in graph.nodes for t in tensors_of(node)}


def main_device(graph: Graph) -> torch.device:
    """The device that graphs are captured on: if there is a GPU, the one with most of the values."""
    counts = Counter(t.device for node in graph.nodes for t in tensors_of(node))
    on_gpu = [device for device, _ in counts.most_common() if device.type == "cuda"]
    return next(iter((*on_gpu, *counts)), torch.device("cpu"))


def op_refusal(node: Node, device: torch.device, unsafe: Collection[str] = ()) -> Refusal | None:
    """Why an operator can't be part of a graph on ``device``, or ``None``."""
    return _refused_op(node, unsafe) or _refused_place(node, device)


def tensors_of(node: Node) -> Iterator[torch.Tensor]:
    return (v for v in leaves(node.meta.get("val")) if isinstance(v, torch.Tensor))


def _refused_device(devices: set[torch.device], graph: Graph) -> Refusal | None:
    if not devices:
        return Refusal("nothing to capture: the region holds no tensor")
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


def input_refusal(graph: Graph, example_inputs: Sequence[Any]) -> Refusal | None:
    """Why a graph can't be captured with these arguments, whatever it computes, or ``None``."""
    for node, value in zip(graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            continue
        if not isinstance(value, torch.Tensor):
            return Refusal(f"input {node.target} is a {type(value).__name__}, neither a tensor nor a size")
        if value.layout != torch.strided:
            return Refusal(f"input {node.target} has layout {value.layout}, not torch.strided")
        if value.is_conj() or value.is_neg():
            return Refusal(f"input {node.target} is a lazy conjugate or negative view")
    return None


def _refused_place(node: Node, device: torch.device) -> Refusal | None:
    others = {t.device for value in (node, *node.all_input_nodes) for t in tensors_of(value)} - {device}
    names = " and ".join(sorted(map(str, {device, *others})))
    return _refuse(node, f"the region mixes devices: {names}") if others else None


def _refused_op(node: Node, unsafe: Collection[str]) -> Refusal | None:
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
    if any(is_named(target, unsafe) for target in targets_of(node)):
        return _refuse(node, "the operator is named as one that must not be captured")
    return _refused_wait(node, unsafe) if waits(node.target) else None


def _refused_wait(node: Node, unsafe: Collection[str]) -> Refusal | None:
    """A captured wait waits for what was captured with it: of a collective begun elsewhere a replay knows nothing."""
    begun = node.args[0]
    while isinstance(begun, Node) and begun.target is operator.getitem:
        begun = begun.args[0]
    if not isinstance(begun, Node) or not communicates(begun.target):
        return _refuse(node, "it waits for a collective that is not in the graph")
    return _refused_op(begun, unsafe)


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
