"""Convolutions, pooling and resizing: they work on the last dims and leave the leading ones alone."""

from __future__ import annotations

from ..call import Call, one_line, rule
from ..lattice import FREE, Fact, RefusePadding, Results, Rows, in_order


@rule("aten::convolution", "aten::_convolution", line=one_line)
def convolution(call: Call) -> Results:
    """Allows rows along the batch, along the output channels, or along a dim that the kernel goes over.

    There padded rows must be zero, as a convolution pads, and the steps be single ones.
    """
    image = call["input"]
    if image.rows is FREE:
        return _by_channel(call)
    call.only("input")
    if len(image.shape) != len(call["weight"].shape) or image.row_dim in (None, 1):
        raise RefusePadding("convolves over the padded rows")
    dim = image.dim(image.row_dim)
    if dim == 0 or _is_single(call, dim - 2):
        return call.keep(Fact.REPLICA, dim=dim)
    if call["transposed"] or not image.together or (call["stride"] * 3)[dim - 2] != 1:
        raise RefusePadding("convolves over the padded rows")
    if not image.holds(Fact.ZERO):
        call.fill(image, 0, "convolves over the padded rows")
    return in_order(call.keep(Fact.NOTHING, dim=dim))


def _is_single(call: Call, dim: int) -> bool:
    """Returns whether along spatial dim ``dim`` each output entry comes from the input entry at the same place."""
    given = (call["stride"], call["padding"], call["output_padding"])
    stride, padding, more = (numbers[dim if len(numbers) > 1 else 0] for numbers in given)
    return call["weight"].shape[dim + 2] == 1 and (stride, padding, more) == (1, 0, 0)


def _by_channel(call: Call) -> Results:
    weight, bias = call["weight"], call["bias"]
    if call["groups"] != 1 or weight.row_dim != (1 if call["transposed"] else 0):
        raise RefusePadding("convolves over the padded rows")
    if bias is not None and bias.rows is FREE:
        raise RefusePadding("rows meet a dim of another size")
    return call.keep(Fact.REPLICA)


@rule("aten::convolution_backward")
def convolution_backward(call: Call) -> Results:
    """Sums the gradients of weight and bias over the rows, along the batch or a dim that the kernel goes over.

    That is exact over zeros. Along such a dim an entry's gradient comes from places around it: from padded ones, zero.
    """
    grad, image = call["grad_output"], call.only("input", "grad_output")
    if grad.row_dim != image.row_dim or image.row_dim in (None, 1):
        raise RefusePadding("convolves over the padded rows")
    along = image.row_dim != 0
    if along and (call["transposed"] or not (grad.together and image.together)):
        raise RefusePadding("convolves over the padded rows")
    of_image, of_weight, of_bias = call["output_mask"]
    grad_image, *_ = call.each(Fact.NOTHING if along else Fact.REPLICA)
    for operand, is_mixed in ((grad, of_weight or of_bias or (along and of_image)), (image, of_weight)):
        if is_mixed and not operand.holds(Fact.ZERO):
            call.fill(operand, 0, "convolves over the padded rows" if along else "sums over the padded rows")
    return (in_order(grad_image) if along and isinstance(grad_image, Rows) else grad_image, FREE, FREE)


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


@rule("prims::_low_memory_max_pool_offsets_to_indices", "prims::_low_memory_max_pool_with_offsets")
def pooling(call: Call) -> Results:
    """Pools over as many of the last dims as the kernel has, which must not be the rows."""
    (operand,) = call.operands
    if operand.place is None or operand.place >= -len(call["kernel_size"]):
        raise RefusePadding("works over the padded rows")
    several = isinstance(call.node.meta["val"], (list, tuple))
    return call.each(Fact.REPLICA) if several else call.keep(Fact.REPLICA)


@rule("aten::grid_sampler_2d", "aten::grid_sampler_3d")
def grid_sampler(call: Call) -> Results:
    """Samples each image with its own grid, or has rows along the channels, or along the places to sample at."""
    image, grid = call["input"], call["grid"]
    by_channel = image.row_dim == 1 and grid.rows is FREE
    by_place = image.rows is FREE and grid.row_dim in range(1, len(grid.shape) - 1)
    if (image.row_dim, grid.row_dim) != (0, 0) and not by_channel and not by_place:
        raise RefusePadding("samples over the padded rows")
    return call.keep(Fact.REPLICA)
