"""Fused attention: rows along the batch or the heads, along the queries alone, or a causal sequence."""

from __future__ import annotations

from ..call import Call, rule
from ..lattice import FREE, Fact, Operand, RefusePadding, Results, meet


@rule(
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_fused_attention_overrideable",
)
def attention(call: Call) -> Results:
    """Letters: batch, heads, queries (l), keys (s), features (e)."""
    query, key, value = (call.only("query", "key", "value", "attn_mask", "attn_bias"), call["key"], call["value"])
    mask: Operand | None = call["attn_mask"] or call["attn_bias"]
    if call["dropout_p"]:
        raise RefusePadding("draws random numbers for the rows")
    places = {_letter(query, "bhle"), _letter(key, "bhse"), _letter(value, "bhse")}
    if places in ({"b"}, {"h"}) or (places == {"l", None} and not call["is_causal"]):
        meet(query, mask)
        return call.each(Fact.REPLICA)
    if places == {"l", "s"} and call["is_causal"] and mask is None:
        return _causal(call, key, value)
    raise RefusePadding("attends over the padded rows")


def _causal(call: Call, key: Operand, value: Operand) -> Results:
    """A query sees no later key. Kernels multiply later values by zero, so they must not be NaN or infinite."""
    if key.rows and not key.rows.together:
        raise RefusePadding("padded keys come before real queries")
    if not (key.holds(Fact.REPLICA) and value.holds(Fact.REPLICA)):
        raise RefusePadding("zero weights meet padded rows that may not be finite")
    return call.each(Fact.NOTHING)


@rule(
    "aten::_scaled_dot_product_cudnn_attention_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::_scaled_dot_product_fused_attention_overrideable_backward",
)
def attention_backward(call: Call) -> Results:
    """Rows along the batch; a bias that all rows share would get a sum over them."""
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


def _letter(operand: Operand, letters: str) -> str | None:
    return None if operand.place is None else letters[operand.place]
