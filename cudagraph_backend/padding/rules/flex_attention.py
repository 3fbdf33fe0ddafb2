"""FlexAttention: rows along the batch, where nothing that the user's functions read tells one row from another."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch.fx import GraphModule, Node

from cudagraph_backend.graph.operators import targets_in
from cudagraph_backend.torch_internals import submodule_of

from ..call import Call, leaves, rule
from ..lattice import FREE, Fact, Operand, RefusePadding, Results, Rows, meet

_BATCH = -4
_BUFFERS = ("score_mod_other_buffers", "mask_mod_other_buffers")


def _line(call: Call, name: str, operand: Operand, rows: Rows) -> Hashable:
    """Puts rows along the batch, the first dim of all that has one, on one line; other rows meet none of these."""
    return "batch" if rows.dim == 0 and name not in _BUFFERS else (name, rows.dim)


@rule("higher_order::flex_attention", line=_line)
def flex_attention(call: Call) -> Results:
    """Lets a row attend to itself, by its own entries of the block mask, or by those that all rows share."""
    query, key, value = (_operand(call, name) for name in ("query", "key", "value"))
    if query.rows is FREE:
        raise RefusePadding("attends over the padded rows")
    return call.each(_facts(call, query, key, value))


@rule("higher_order::flex_attention_backward", line=_line)
def flex_attention_backward(call: Call) -> Results:
    """Allows rows as forward; a key that all rows share, or a captured tensor, would get a sum over them."""
    names = ("query", "key", "value", "out", "logsumexp", "grad_out")
    operands = [_operand(call, name) for name in names]
    if any(operand.rows is FREE for operand in operands):
        raise RefusePadding("sums over the padded rows")
    if any(isinstance(val, torch.Tensor) for val in leaves(call.node.meta["val"][3:])):
        raise RefusePadding("sums over the padded rows, for the gradient of a captured tensor")
    return call.each(_facts(call, *operands[:3]))


def _operand(call: Call, name: str) -> Operand:
    operand = call[name]
    if not isinstance(operand, Operand) or operand.row_dim not in (0, None):
        raise RefusePadding("attends over the padded rows")
    return operand


def _facts(call: Call, query: Operand, key: Operand, value: Operand) -> Fact:
    """Returns what padded rows of the results hold of what those of the arguments hold; refuses what can't be told."""
    if meet(query, key, value) != _BATCH:
        raise RefusePadding("attends over the padded rows")
    for name, argument in call.arguments.items():
        for operand in (leaf for leaf in leaves(argument) if isinstance(leaf, Operand)):
            if name == "block_mask":
                _check_block_mask(operand)
            elif name in _BUFFERS and operand.rows is not FREE:
                raise RefusePadding("a function of the user's reads a captured tensor by row")
            elif operand.row_dim not in (0, None):
                raise RefusePadding("attends over the padded rows")
    uses_batch = [graph for graph, batch in _functions(call) if graph.graph.find_nodes(op="placeholder")[batch].users]
    reads_more = any(isinstance(leaf, Operand) for name in _BUFFERS for leaf in leaves(call[name]))
    constants = any(graph.graph.find_nodes(op="get_attr") for graph in uses_batch)
    if uses_batch and (reads_more or constants):
        raise RefusePadding("a function of the user's may read a captured tensor at the number of a padded row")
    return Fact.NOTHING if uses_batch else Fact.REPLICA


def _check_block_mask(operand: Operand) -> None:
    """Checks the counts and indices of blocks that a row attends to: they must be valid in padded rows, too."""
    if operand.rows is FREE:
        if operand.shape[0] != 1:
            raise RefusePadding("the block mask has rows of its own, not those of the batch")
    elif operand.row_dim != 0 or not (operand.holds(Fact.REPLICA) or operand.holds(Fact.ZERO)):
        raise RefusePadding("padded rows of the block mask may hold no valid index")


def _functions(call: Call) -> Iterator[tuple[GraphModule, int]]:
    """Yields the user's functions as graphs, with the position of the batch's number among their arguments."""
    mask = list(leaves(call["block_mask"]))[-1]
    for node in (call["score_mod"], call["fw_graph"], call["joint_graph"], mask):
        graph = submodule_of(node) if isinstance(node, Node) else None
        if graph is None:
            continue
        if any(torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) for target in targets_in(graph.graph)):
            raise RefusePadding("draws random numbers for the rows")
        yield graph, 0 if node is mask else 1  # elsewhere a score comes first
