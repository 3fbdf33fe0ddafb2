"""Convolutions, pooling and resizing: they work on the last dims and leave the leading ones alone."""

from __future__ import annotations

from ..call import Call, rule
from ..lattice import FREE, Fact, RefusePadding, Results, in_order


@rule("aten::convolution", "aten::_convolution")
def convolution(call: Call) -> Results:
    """Rows along the batch; or along another dim, step by step, if the padded ones are zero, as a convolution pads."""
    image = call.only("input")
    if len(image.shape) != len(call["weight"].shape) or image.row_dim in (None, 1):
        raise RefusePadding("convolves over the padded rows")
    if image.row_dim == 0:
        return call.keep(Fact.REPLICA, dim=0)
    steps, dim = call["stride"], image.dim(image.row_dim or 0)
    if call["transposed"] or not image.together or (steps * 3)[dim - 2] != 1:
        raise RefusePadding("convolves over the padded rows")
    if not image.holds(Fact.ZERO):
        call.fill(image, 0, "convolves over the padded rows")
    return in_order(call.keep(Fact.NOTHING, dim=dim))


@rule("aten::convolution_backward")
def convolution_backward(call: Call) -> Results:
    """Gradients of weight and bias sum over the batch: exact only over zeros."""
    grad, image = call["grad_output"], call.only("input", "grad_output")
    if grad.row_dim != 0 or image.row_dim != 0:
        raise RefusePadding("convolves over the padded rows")
    summed = RefusePadding("sums over the padded rows")
    zero_grad, zero_image = grad.holds(Fact.ZERO), image.holds(Fact.ZERO)
    grad_image, *_ = call.each(Fact.REPLICA)
    return (grad_image, FREE if zero_grad and zero_image else summed, FREE if zero_grad else summed)


def _over_last(count: int, *operators: str) -> None:
    """Registers a rule for ``operators`` that work on the last ``count`` dims of each tensor."""

    @rule(*operators)
    def over_last_dims(call: Call) -> Results:
        places = {operand.place for operand in call.operands}
        if len(places) != 1 or not all(place is not None and place < -count for place in places):
            raise RefusePadding("works over the padded rows")
        several = isinstance(call.node.meta["val"], (list, tuple))
        return call.each(Fact.REPLICA) if several else call.keep(Fact.REPLICA)


_over_last(
    1,
    "aten::reflection_pad1d",
    "aten::replication_pad1d",
    "aten::_upsample_nearest_exact1d",
    "aten::upsample_linear1d",
    "aten::upsample_nearest1d",
)
_over_last(
    2,
    "aten::_adaptive_avg_pool2d",
    "aten::_adaptive_avg_pool2d_backward",
    "aten::_upsample_bicubic2d_aa",
    "aten::_upsample_bilinear2d_aa",
    "aten::_upsample_nearest_exact2d",
    "aten::adaptive_max_pool2d",
    "aten::avg_pool2d",
    "aten::avg_pool2d_backward",
    "aten::max_pool2d_with_indices",
    "aten::max_pool2d_with_indices_backward",
    "aten::reflection_pad2d",
    "aten::replication_pad2d",
    "aten::upsample_bicubic2d",
    "aten::upsample_bilinear2d",
    "aten::upsample_nearest2d",
    "prims::_low_memory_max_pool_with_offsets",
)
_over_last(
    3,
    "aten::_adaptive_avg_pool3d",
    "aten::_upsample_nearest_exact3d",
    "aten::adaptive_max_pool3d",
    "aten::avg_pool3d",
    "aten::im2col",
    "aten::max_pool3d_with_indices",
    "aten::pixel_shuffle",
    "aten::pixel_unshuffle",
    "aten::reflection_pad3d",
    "aten::replication_pad3d",
    "aten::upsample_nearest3d",
    "aten::upsample_trilinear3d",
)


@rule("aten::grid_sampler_2d", "aten::grid_sampler_3d")
def grid_sampler(call: Call) -> Results:
    """Each image with its own grid."""
    if call["input"].row_dim != 0 or call["grid"].row_dim != 0:
        raise RefusePadding("samples over the padded rows")
    return call.keep(Fact.REPLICA)
