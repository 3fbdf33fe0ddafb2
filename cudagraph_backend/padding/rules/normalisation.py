"""Normalisation layers: fine as long as no statistic is taken over rows."""

from __future__ import annotations

from ..call import Call, rule
from ..lattice import Fact, RefusePadding, Results


@rule("aten::native_layer_norm", "aten::_fused_rms_norm", "aten::rms_norm", sizes=("normalized_shape",))
def over_last_dims(call: Call) -> Results:
    """Takes statistics over the last dims, which must not be the rows."""
    operand = call.only("input")
    if operand.row_dim is None or operand.row_dim >= len(operand.shape) - len(call["normalized_shape"]):
        raise RefusePadding("normalises over the padded rows")
    several = isinstance(call.node.meta["val"], (list, tuple))
    return call.each(Fact.REPLICA) if several else call.keep(Fact.REPLICA)


@rule("aten::native_group_norm", sizes=("N",))
def over_groups(call: Call) -> Results:
    """Takes statistics per entry of dim 0 and group of channels, unless ``N`` divides memory in another way."""
    operand = call.only("input")
    if operand.row_dim != 0 or operand.shape[0] != call["N"]:
        raise RefusePadding("normalises over the padded rows")
    return call.each(Fact.REPLICA)


@rule("aten::_native_batch_norm_legit_no_training", "aten::_batch_norm_no_update")
def with_given_statistics(call: Call) -> Results:
    """Scales each entry by its channel's stored statistics, as in evaluation."""
    if call.only("input").row_dim == 1:
        raise RefusePadding("rows along the channels")
    return call.each(Fact.REPLICA)


@rule(
    "aten::_native_batch_norm_legit_functional",
    "aten::_native_batch_norm_legit.no_stats",
    "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm",
    "aten::native_batch_norm",
)
def batch_norm(call: Call) -> Results:
    """Refuses training, which takes statistics over the batch; evaluation does not."""
    if call["training"] is not False or call["running_mean"] is None:
        raise RefusePadding("takes batch statistics over the padded rows")
    return with_given_statistics(call)
