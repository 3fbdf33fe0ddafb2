"""Fused attention: rows along the batch or the heads, along the queries alone, or a causal sequence."""

from __future__ import annotations

from ..call import Call, rule
from ..lattice import FREE, Fact, Filling, Operand, RefusePadding, Results, Rows, meet
from ..symbolic import HIDDEN, ROWS

_SEQUENCE = -2
_BY_KEY = {"key": "bhse", "value": "bhse", "attn_mask": "bhls", "attn_bias": "bhls"}
_BY_QUERY = ("query", "out", "logsumexp", "grad_out", "grad_out_")
_OTHERWISE = "attends over the padded rows"


def _letter(call: Call, name: str, operand: Operand, rows: Rows) -> str:
    """Names a row dim: batch, heads, queries (l), keys (s), features (e)."""
    place = rows.dim if name == "logsumexp" else rows.dim - len(operand.shape)
    return _BY_KEY.get(name, "bhle")[place]


@rule(
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    line=_letter,
)
def attention(call: Call) -> Results:
    """Allows rows along the batch or the heads, along the queries, or along the keys."""
    query, key, value = (call.only("query", "key", "value", "attn_mask", "attn_bias"), call["key"], call["value"])
    mask: Operand | None = call["attn_mask"] or call["attn_bias"]
    if call["dropout_p"]:
        raise RefusePadding("draws random numbers for the rows")
    if call["is_causal"] and not _as_many(query, key):
        raise RefusePadding(_OTHERWISE)
    if query.rows is FREE and key.place == value.place == _SEQUENCE:
        return _over_keys(call, key, value, mask)
    together = {query.place, key.place, value.place}
    if together not in ({-4}, {-3}, {_SEQUENCE, None}) or query.rows is FREE:
        raise RefusePadding(_OTHERWISE)
    meet(query, mask)
    return call.each(Fact.REPLICA if together != {_SEQUENCE, None} or not call["is_causal"] else Fact.NOTHING)


def _over_keys(call: Call, key: Operand, value: Operand, mask: Operand | None) -> Results:
    """Makes sure that padded keys weigh nothing: by the mask, or as they come after every real query.

    Kernels multiply keys and values that weigh nothing by zero, so these must not be NaN or infinite. In a backward
    padded queries, which repeat the last one, may attend to them: no more than to the last key, if they repeat that.
    """
    after_all_queries = call["is_causal"] and mask is None and key.rows is not FREE and key.rows.together
    if not after_all_queries and (mask is None or mask.rows is FREE):
        raise RefusePadding(_OTHERWISE)
    key, value, *masks = call.aligned([key, value, *([mask] if mask and mask.rows else [])])
    for one in masks:
        call.fill(one, "lowest", _OTHERWISE)
    is_backward = call["logsumexp"] is not None
    for one in (key, value):
        if not one.holds(Fact.REPLICA) and (is_backward or not one.holds(Fact.ZERO)):
            filling: Filling = "last" if is_backward else 0
            call.fill(one, filling, "zero weights meet padded rows that may not be finite")
    return FREE


def _as_many(query: Operand, key: Operand) -> bool:
    """Returns whether there are always as many queries as keys: else kernels differ in how a causal mask pairs them."""
    return query.shape[_SEQUENCE].xreplace({HIDDEN: ROWS}) == key.shape[_SEQUENCE].xreplace({HIDDEN: ROWS})


@rule(
    "aten::_scaled_dot_product_cudnn_attention_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::_scaled_dot_product_fused_attention_overrideable_backward",
    sizes=("max_q", "max_k"),
    line=_letter,
)
def attention_backward(call: Call) -> Results:
    """Allows rows as :func:`attention` does; a bias that all rows share would get a sum over them."""
    mask: Operand | None = call["attn_mask"] or call["attn_bias"]
    wanted = call["grad_input_mask"]
    if call["dropout_p"]:
        raise RefusePadding("draws random numbers for the rows")
    if call["is_causal"] and not _as_many(call["query"], call["key"]):
        raise RefusePadding(_OTHERWISE)
    by_query = [call[name] for name in _BY_QUERY if call[name] is not None]
    key, value = call["key"], call["value"]
    letters = {_letter(call, name, one, one.rows) for name, one in call.arguments.items() if _has_rows(one)}
    if call["attn_bias"] and call["attn_bias"].rows is FREE and wanted and wanted[3]:
        raise RefusePadding("sums over the padded rows")
    if letters == {"l"} and key.rows is value.rows is FREE and all(one.rows for one in by_query):
        return _gradients_by_query(call, by_query, mask)
    if letters == {"s"} and key.rows and value.rows and not any(one.rows for one in by_query):
        _over_keys(call, key, value, mask)
        _, *of_keys = call.each(Fact.NOTHING)
        return (None, *of_keys)
    if letters not in ({"b"}, {"h"}) or any(one.rows is FREE for one in (*by_query, key, value)):
        raise RefusePadding(_OTHERWISE)
    if mask:
        mask.check_place({"b": -4, "h": -3}[letters.pop()])
    return call.each(Fact.REPLICA)


def _gradients_by_query(call: Call, by_query: list[Operand], mask: Operand | None) -> Results:
    """Makes sure that padded queries add nothing to the gradients of keys and values.

    Their own gradients are zero; what these are multiplied by is finite, as they are the last query once more, with its
    weights.
    """
    *repeated, gradient = call.aligned([*([mask] if mask and mask.rows else []), *by_query])
    call.fill(gradient, 0, _OTHERWISE)
    for operand in repeated:
        if not operand.holds(Fact.REPLICA):
            call.fill(operand, "last", _OTHERWISE)
    of_queries, _, _, *of_mask = call.each(Fact.NOTHING)
    return (of_queries, None, None, *of_mask)


def _has_rows(argument: object) -> bool:
    return isinstance(argument, Operand) and argument.rows is not FREE
