"""Fused attention: rows along the batch or the heads, along the queries alone, or a causal sequence."""

from __future__ import annotations

from ..call import Call, one_line, rule
from ..lattice import FREE, Fact, Operand, RefusePadding, Results, Rows, meet
from ..symbolic import HIDDEN, ROWS

_SEQUENCE = -2
_LETTERS = {"query": "bhle", "key": "bhse", "value": "bhse", "attn_mask": "bhls", "attn_bias": "bhls"}


def _letter(call: Call, name: str, operand: Operand, rows: Rows) -> str:
    """Names a row dim: batch, heads, queries (l), keys (s), features (e)."""
    return _LETTERS.get(name, "bhle")[rows.dim - len(operand.shape)]


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
        raise RefusePadding("attends over the padded rows")
    if query.rows is FREE and key.place == value.place == _SEQUENCE:
        return _over_keys(call, key, value, mask)
    together = {query.place, key.place, value.place}
    if together not in ({-4}, {-3}, {_SEQUENCE, None}) or query.rows is FREE:
        raise RefusePadding("attends over the padded rows")
    meet(query, mask)
    return call.each(Fact.REPLICA if together != {_SEQUENCE, None} or not call["is_causal"] else Fact.NOTHING)


def _over_keys(call: Call, key: Operand, value: Operand, mask: Operand | None) -> Results:
    """Makes sure that padded keys weigh nothing: by the mask, or as they come after every real query.

    Kernels multiply keys and values that weigh nothing by zero, so these must not be NaN or infinite.
    """
    otherwise = "attends over the padded rows"
    after_all_queries = call["is_causal"] and mask is None and key.rows is not FREE and key.rows.together
    if not after_all_queries and (mask is None or mask.rows is FREE):
        raise RefusePadding(otherwise)
    key, value, *masks = call.aligned([key, value, *([mask] if mask and mask.rows else [])])
    for one in masks:
        call.fill(one, "lowest", otherwise)
    for one in (key, value):
        if not one.holds(Fact.REPLICA) and not one.holds(Fact.ZERO):
            call.fill(one, 0, "zero weights meet padded rows that may not be finite")
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
    line=one_line,
)
def attention_backward(call: Call) -> Results:
    """Allows rows along the batch; a bias that all rows share would get a sum over them."""
    bias: Operand | None = call["attn_bias"]
    per_row = ("query", "key", "value", "out", "logsumexp", "grad_out", "grad_out_")
    if call["dropout_p"] or any(call[name] is not None and call[name].row_dim != 0 for name in per_row):
        raise RefusePadding("attends over the padded rows")
    mask = call["attn_mask"] or bias
    if mask:
        mask.check_place(-4)
    wanted = call["grad_input_mask"]
    if bias and bias.rows is FREE and wanted and wanted[3]:
        raise RefusePadding("sums over the padded rows")
    return call.each(Fact.REPLICA)
