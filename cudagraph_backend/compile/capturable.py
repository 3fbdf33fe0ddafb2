"""Can a region be captured at all? Each predicate gives a refusal or ``None``; the first refusal counts."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from cudagraph_backend.compile.inputs import input_refusals, is_read
from cudagraph_backend.drivers.platforms import device_refusal, is_accelerator
from cudagraph_backend.errors import Refusal
from cudagraph_backend.graph.operators import (
    communicates,
    has_token,
    is_named,
    is_token,
    nodes_inside,
    waits,
    wrapped,
)
from cudagraph_backend.graph.source import source_line
from cudagraph_backend.padding.call import leaves
from cudagraph_backend.torch_internals import (
    attribute_of,
    calls_its_graph,
    expr,
    flat_arguments,
    is_backed,
    is_higher_order,
    is_operator,
    operator_schema,
    submodule_of,
    symbols_of,
)

# They launch the same kernels at every call, those of the operator, kernel or graphs that they are given: no more can
# stand in their way than in these. Not so those that choose or count by data on the host (cond, while_loop, scan,
# map_impl), that call Python (print, call_torchbind, invoke_leaf_function, flat_apply), code of another compiler, and
# any that this list does not know.
_RUN_STRAIGHT = frozenset(
    (
        "associative_scan",
        "auto_functionalized",
        "auto_functionalized_v2",
        "autograd_function_apply",
        "flex_attention",
        "flex_attention_backward",
        "graphsafe_run_with_rng_state",
        "hints_wrapper",
        "inline_asm_elementwise",
        "invoke_subgraph",
        "local_map_hop",
        "out_dtype",
        "run_and_save_rng_state",
        "run_with_rng_state",
        "strict_mode",
        "tag_activation_checkpoint",
        "triton_kernel_wrapper_functional",
        "triton_kernel_wrapper_mutation",
        "with_effects",
        "wrap",
        "wrap_activation_checkpoint",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    )
)
_STATE_ON_THE_HOST = ("run_and_save_rng_state", "run_with_rng_state")
_INLINED = ("flex_attention", "flex_attention_backward")  # their graphs become part of a kernel, constants too
# Beyond those that their tags tell.
_READ_BACK = (
    "aten::_fused_moving_avg_obs_fq_helper",
    "aten::_fused_moving_avg_obs_fq_helper_functional",
    "aten::_linalg_check_errors",
    "fbgemm::dense_to_jagged",
    "fbgemm::jagged_to_padded_dense",
)
_OTHER_MEMORY = ("aten::set_", "aten::resize_", "aten::resize_as_", "inductor::resize_storage_bytes_")
_MASKED_WRITES = ("aten::index_put", "aten::index_put_", "aten::_unsafe_index_put", "prims::_unsafe_index_put_")
_MASKED_READS = ("aten::index", "aten::_unsafe_index")


def capture_refusal(
    graph: Graph, example_inputs: Sequence[Any], devices: set[torch.device], unsafe: Collection[str] = ()
) -> Refusal | None:
    """Return why a region must always run as compiled code, or ``None``; ``unsafe`` names what must not be captured."""
    return (
        _refused_device(devices, graph)
        or next(iter(input_refusals(graph, example_inputs).values()), None)
        or next((r for node in graph.nodes if (r := _refused_op(node, unsafe))), None)
    )


def devices_of(graph: Graph) -> set[torch.device]:
    """Return the devices on which a graph computes: not ``meta``, nor that of an input which is only handed back.

    If nothing is computed, those of the inputs.
    """
    used = {device for node in graph.nodes if not _is_passed_by(node) for device in _devices(node)}
    return used or {device for node in graph.nodes for device in _devices(node)}


def main_device(graph: Graph) -> torch.device:
    """Return the device that graphs are captured on: if there is a GPU, the one with most of the values."""
    counts = Counter(device for node in graph.nodes if not _is_passed_by(node) for device in _devices(node))
    on_gpu = [device for device, _ in counts.most_common() if is_accelerator(device)]
    return next(iter((*on_gpu, *counts)), torch.device("cpu"))


def _is_passed_by(node: Node) -> bool:
    return node.op == "placeholder" and not is_read(node)


def op_refusal(node: Node, device: torch.device, unsafe: Collection[str] = ()) -> Refusal | None:
    """Return why an operator can't be part of a graph on ``device``, or ``None``."""
    return _refused_op(node, unsafe) or _refused_place(node, device)


def tensors_of(node: Node) -> Iterator[torch.Tensor]:
    """Yield the tensors that a node gives; tokens are none."""
    if is_token(node):
        return iter(())
    return (v for v in leaves(value_of(node)) if isinstance(v, torch.Tensor))


def value_of(node: Node) -> Any:
    """Return what is known of a node's value, tokens apart; of several results, perhaps only of those that are read."""
    value = node.meta.get("val")
    if value is None and is_higher_order(node.target):
        return [value_of(user) for user in node.users if user.target is operator.getitem and not is_token(user)]
    return value[1:] if has_token(node) and isinstance(value, (list, tuple)) else value


def _devices(node: Node) -> set[torch.device]:
    """Return the devices of what a node gives and of all it computes inside; not ``meta``, which has no memory."""
    inside = nodes_inside(node) if is_higher_order(node.target) and node.target.name() not in _INLINED else ()
    return {t.device for t in tensors_of(node) if t.device.type != "meta"}.union(*map(_devices, inside))


def _refused_device(devices: set[torch.device], graph: Graph) -> Refusal | None:
    if not devices:
        return Refusal("nothing to capture: the region holds no tensor that has memory")
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        on_cpu = [node for node in graph.nodes if any(device.type == "cpu" for device in _devices(node))]
        minority = min(on_cpu, key=_is_passed_by, default=None)
        source = source_line(minority) if minority is not None else None
        return Refusal(
            f"the region mixes devices: {names}", op=str(minority.target) if minority else None, source=source
        )
    return device_refusal(next(iter(devices)))


def _refused_place(node: Node, device: torch.device) -> Refusal | None:
    read = [other for other in node.all_input_nodes if not _is_passed_by(other)]
    others = set[torch.device]().union(*map(_devices, (node, *read))) - {device}
    names = " and ".join(sorted(map(str, {device, *others})))
    return _refuse(node, f"the region mixes devices: {names}") if others else None


def _refused_op(node: Node, unsafe: Collection[str]) -> Refusal | None:
    if node.op in ("placeholder", "output"):
        return None
    if node.op == "get_attr":
        value = node.meta.get("val")
        is_known = isinstance(value, torch.Tensor) or value is None or submodule_of(node) is not None
        return None if is_known else _refuse(node, "a captured object is read")
    if (reason := _reason_against(node.target, unsafe)) is not None:
        return _refuse(node, reason)
    # The tag dynamic_output_shape says too little: aten.index has it, and gives such a shape for boolean masks only.
    # What reads the size is captured for the sizes that it is given, as any other.
    if any(not is_backed(symbol) for symbol in symbols_made(node)):
        return _refuse(node, "a size or value depends on data")
    if _counts_a_mask(node):
        return _refuse(node, "how many entries a mask has is read back")
    if is_higher_order(node.target):
        return _refused_inside(node, unsafe)
    return _refused_wait(node, unsafe) if waits(node.target) else None


def _reason_against(target: Any, unsafe: Collection[str]) -> str | None:
    """Return why an operator can't be captured, whatever it is given."""
    if is_named(target, unsafe):
        return "the operator is named as one that must not be captured"
    if is_higher_order(target) and target.name() not in _RUN_STRAIGHT and not calls_its_graph(target):
        return "a higher-order operator may branch on data"
    tags = getattr(target, "tags", ())
    if torch.Tag.data_dependent_output in tags:
        return "a size or value depends on data"
    if any(tag.name == "cudagraph_unsafe" for tag in tags):
        return "the operator is tagged unsafe for CUDA graphs"
    name = operator_schema(target).name if is_operator(target) else ""
    if name == "aten::_print":
        return "it prints, which a replay does not"
    if name in _OTHER_MEMORY:
        return "it gives a tensor other memory, which a replay does not"
    return "it reads a value back" if name in _READ_BACK else None


def _refused_inside(node: Node, unsafe: Collection[str]) -> Refusal | None:
    """Return why what a higher-order operator runs can't be captured."""
    devices = set[torch.device]().union(*map(_devices, (node, *node.all_input_nodes)))
    on_gpu = any(map(is_accelerator, devices))
    for target in (node.target, *wrapped(node)):
        if is_higher_order(target) and target.name() in _STATE_ON_THE_HOST and on_gpu:
            return _refuse(node, "the state of a random number generator is read or set on the host")
        if (reason := _reason_against(target, unsafe)) is not None:
            return Refusal(reason, op=str(target), source=source_line(node))
    if symbols_made(node):
        return _refuse(node, "a size is known only when it has run")
    if any(read.op == "get_attr" and attribute_of(read) is None for read in node.all_input_nodes):
        return _refuse(node, "what it runs can't be found")
    refusal = next((r for inner in nodes_inside(node) if (r := _refused_op(inner, unsafe))), None)
    return refusal and replace(refusal, source=refusal.source or source_line(node))


def _counts_a_mask(node: Node) -> bool:
    """Return whether a boolean index is turned into numbers, as many as it has true entries.

    A write of one value is none of these: Inductor writes it with ``where``.
    """
    name = operator_schema(node.target).name if is_operator(node.target) else ""
    if name not in _MASKED_WRITES + _MASKED_READS:
        return False
    indices = [index for index in leaves(node.args[1]) if index is not None]
    is_masked = any(t.dtype in (torch.bool, torch.uint8) for index in indices for t in tensors_of(index))
    if name in _MASKED_READS or len(node.args[1]) > 1:  # type: ignore[arg-type]
        return is_masked
    counts = (expr(t.numel()) for t in tensors_of(node.args[2]))  # type: ignore[arg-type]
    return is_masked and any(count != 1 for count in counts)  # as expressions: a comparison of sizes may be a guard


def _refused_wait(node: Node, unsafe: Collection[str]) -> Refusal | None:
    """Refuse a wait for a collective that is begun elsewhere: a replay knows nothing of it."""
    begun = node.args[0]
    while isinstance(begun, Node) and begun.target is operator.getitem:
        begun = begun.args[0]
    if not isinstance(begun, Node) or not communicates(begun.target):
        return _refuse(node, "it waits for a collective that is not in the graph")
    return _refused_op(begun, unsafe)


def symbols_in(node: Node) -> frozenset[sympy.Symbol]:
    """Return the symbols in a node's value."""
    return frozenset().union(*map(symbols_of, leaves(value_of(node))))


def symbols_made(node: Node) -> frozenset[sympy.Symbol]:
    """Return the symbols that nothing which a node is given has: what they stand for is first known when it has run."""
    if not (symbols := symbols_in(node)) or node.op != "call_function":
        return frozenset()
    return symbols.difference(*map(symbols_in, node.all_input_nodes), *map(symbols_of, flat_arguments(node)))


def _refuse(node: Node, reason: str) -> Refusal:
    return Refusal(reason, op=str(node.target), source=source_line(node))
