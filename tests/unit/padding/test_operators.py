"""Single operators, each with the rows along every dim in turn: what is judged safe holds, and enough is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.unit.padding.oracle import dynamic, refute, traced

aten = torch.ops.aten
FIXED = torch.tensor([1, 0, 1])


def weights(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)


def norm_stats(training: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        return aten.native_batch_norm(x, None, None, weights(6), weights(6).exp(), training, 0.1, 1e-5)[0]

    return run


#: A function of one tensor, the tensor's shape, and the dims along which padding must be judged safe.
CASES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...], set[int]]] = {
    "aminmax": (lambda x: aten.aminmax(x, dim=1), (6, 7), {0}),
    "all": (lambda x: aten.all(x > 0), (6, 7), set()),
    "all.dims": (lambda x: aten.all.dims(x > 0, [1, 2]), (6, 7, 5), {0}),
    "any.dims": (lambda x: aten.any.dims(x > 0, [0]), (6, 7, 5), {1, 2}),
    "argmin": (lambda x: aten.argmin(x, 1), (6, 7), {0}),
    "argmin of all": (lambda x: aten.argmin(x), (6, 7), set()),
    "count_nonzero": (lambda x: aten.count_nonzero.dim_IntList(x, [0]), (6, 7), {1}),
    "kthvalue": (lambda x: aten.kthvalue(x, 2, 1), (6, 7), {0}),
    "logsumexp": (lambda x: aten.logsumexp(x, [0], True), (6, 7), {1}),
    "mean": (lambda x: aten.mean(x), (6, 7), set()),
    "median": (lambda x: aten.median.dim(x, 1), (6, 7), {0}),
    "min": (lambda x: aten.min(x) + x, (6, 7), {0, 1}),
    "min.dim": (lambda x: aten.min.dim(x, -1), (6, 7), {0}),
    "mode": (lambda x: aten.mode(x.round(), 0), (6, 7), {1}),
    "nansum": (lambda x: aten.nansum(x, [1]), (6, 7), {0}),
    "norm": (lambda x: aten.norm.ScalarOpt_dim(x, 2, [1], True), (6, 7), {0}),
    "prod": (lambda x: aten.prod.dim_int(x, 1), (6, 7), {0}),
    "sort": (lambda x: aten.sort.stable(x, stable=True, dim=0), (6, 7), {1}),
    "std": (lambda x: aten.std.correction(x, [1], correction=1), (6, 7), {0}),
    "std_mean": (lambda x: aten.std_mean.correction(x, [0, 1]), (6, 7, 5), {2}),
    "safe_softmax": (lambda x: aten._safe_softmax(x, 1), (6, 7), {0}),
    "softmax backward": (lambda x: aten._softmax_backward_data(x, x.exp(), 1, torch.float32), (6, 7), {0}),
    "cummin": (lambda x: aten.cummin(x, 0)[0], (6, 7), {0, 1}),
    "logcumsumexp": (lambda x: aten.logcumsumexp(x, 1), (6, 7), {0, 1}),
    "mv": (lambda x: aten.mv(x, weights(7)), (6, 7), {0}),
    "mv with rows": (lambda x: aten.mv(weights(5, 7), x), (7,), set()),
    "dot": (lambda x: aten.dot(x, x), (7,), set()),
    "addmm": (lambda x: aten.addmm(weights(5), x, weights(7, 5)), (6, 7), {0}),
    "addmm to rows": (lambda x: aten.addmm(x, weights(6, 4), weights(4, 7)), (6, 7), set()),
    "addmv": (lambda x: aten.addmv(weights(1), x, weights(7)), (6, 7), {0}),
    "batch norm": (norm_stats(False), (5, 6, 7), {0, 2}),
    "batch norm in training": (norm_stats(True), (5, 6, 7), set()),
    "layer norm": (lambda x: aten.native_layer_norm(x, [7], weights(7), None, 1e-5)[0], (5, 6, 7), {0, 1}),
    "group norm": (lambda x: aten.native_group_norm(x, None, None, x.shape[0], 6, 7, 3, 1e-5)[0], (5, 6, 7), {0}),
    "convolution": (
        lambda x: aten.convolution(x, weights(2, 4, 3), None, [1], [1], [1], False, [0], 1),
        (5, 4, 7),
        {0},
    ),
    "transposed convolution": (
        lambda x: aten.convolution(x, weights(4, 2, 3), None, [1], [1], [1], True, [0], 1),
        (5, 4, 7),
        {0},
    ),
    "avg_pool2d": (lambda x: aten.avg_pool2d(x, [3, 3], [1, 1], [1, 1]), (5, 6, 7, 8), {0, 1}),
    "adaptive_max_pool2d": (lambda x: aten.adaptive_max_pool2d(x, [2, 2])[0], (5, 6, 7, 8), {0, 1}),
    "max_pool3d": (lambda x: aten.max_pool3d_with_indices(x, [3] * 3, [1] * 3, [1] * 3), (4, 5, 6, 7, 8), {0, 1}),
    "reflection_pad1d": (lambda x: aten.reflection_pad1d(x, [1, 1]), (5, 6, 7), {0, 1}),
    "replication_pad2d": (lambda x: aten.replication_pad2d(x, [1, 1, 0, 0]), (5, 6, 7, 8), {0, 1}),
    "pixel_shuffle": (lambda x: aten.pixel_shuffle(x, 2), (5, 8, 6, 7), {0}),
    "pixel_unshuffle": (lambda x: aten.pixel_unshuffle(x, 2), (5, 3, 6, 8), {0}),
    "upsample": (lambda x: aten.upsample_nearest2d(x, [9, 9]), (5, 6, 7, 8), {0, 1}),
    "grid_sampler": (
        lambda x: aten.grid_sampler_2d(x, x[:, :2, :3].permute(0, 2, 3, 1).tanh(), 0, 0, False),
        (5, 6, 7, 8),
        {0},
    ),
    "triu": (lambda x: aten.triu(x, 1), (5, 6, 7), {0, 1, 2}),
    "unfold": (lambda x: aten.unfold(x, 1, 3, 2), (6, 7), {0}),
    "split_with_sizes": (lambda x: aten.split_with_sizes(x, [3, 4], 1)[1] * 1, (6, 7), {0}),
    "squeeze": (lambda x: aten.squeeze(x) * 1, (6, 1, 7, 1), {0, 2}),
    "squeeze.dims": (lambda x: aten.squeeze.dims(x, [1]) * 1, (6, 1, 7), {0, 2}),
    "transpose": (lambda x: aten.transpose.int(x, 0, -1) * 1, (5, 6, 7), {0, 1, 2}),
    "view.dtype": (lambda x: aten.view.dtype(x, torch.int32) * 1, (6, 7), {0}),
    "view_as_complex": (lambda x: aten.view_as_real(aten.view_as_complex(x) * 2j), (6, 7, 2), {0, 1}),
    "slice_scatter": (lambda x: aten.slice_scatter(x, x[:, :2], 1, 3, 5), (6, 7), {0}),
    "select_scatter": (lambda x: aten.select_scatter(x, x[:, 0], 1, 3), (6, 7), {0}),
    "scatter": (lambda x: aten.scatter.src(x, 1, aten.argsort(x, 1), x.exp()), (6, 7), set()),
    "index_copy": (lambda x: aten.index_copy(x, 1, FIXED[:2], x[:, 2:4]), (6, 7), {0}),
    "index_fill": (lambda x: aten.index_fill.int_Scalar(x, 1, FIXED, 2.0), (6, 7), {0}),
    "index_add": (lambda x: aten.index_add(x, 1, FIXED, x[:, 2:5]), (6, 7), {0}),
    "index_add to a table": (lambda x: aten.index_add(weights(2, 7), 0, FIXED, x), (3, 7), set()),
    "index_select": (lambda x: aten.index_select(x, 1, FIXED), (6, 7), {0}),
    "unsafe_index": (lambda x: aten._unsafe_index(x, [None, FIXED, FIXED]), (6, 7, 5), {0}),
    "bucketize": (lambda x: aten.bucketize.Tensor(x, weights(5)), (6, 7), {0, 1}),
    "masked_fill": (lambda x: aten.masked_fill.Scalar(x, x > 0, 1.5), (6, 7), {0, 1}),
    "where": (lambda x: aten.where.ScalarOther(x > 0, x, 1.5), (6, 7), {0, 1}),
    "full_like": (lambda x: aten.full_like(x, 2.0) * x, (6, 7), {0, 1}),
    "new_full": (lambda x: aten.new_full(x, [x.shape[0], 3], 2.0), (6, 7), {0}),
    "arange": (lambda x: aten.arange.start_step(0, x.shape[0], 1) + 1, (6,), {0}),
    "arange from the end": (lambda x: aten.arange.start_step(-x.shape[0], 0, 1) + 1, (6,), set()),
    "scalar": (lambda x: aten.scalar_tensor(x.shape[0]) + x, (6,), set()),
    "eye": (lambda x: aten.eye.m(x.shape[0], 3), (6,), set()),
    "roll all": (lambda x: aten.roll(x, [1]), (6, 7), set()),
    "prelu": (lambda x: aten._prelu_kernel(x, weights(7)), (6, 7), {0}),
    "frexp": (lambda x: aten.frexp(x)[1] * 1, (6, 7), {0, 1}),
    "embedding of columns": (lambda x: aten.embedding(x, FIXED), (6, 7), {1}),
    "as_strided": (lambda x: x.as_strided([x.shape[0], x.shape[2]], [x.shape[2], 1]) * 1, (6, 1, 7), {0, 2}),
    "as_strided from the front": (lambda x: x.as_strided([3, 7], [7, 1]) * 1, (6, 7), set()),
    "as_strided to windows": (lambda x: x.as_strided([x.shape[0] - 1, 2], [1, 1]) * 1, (6,), set()),
    "as_strided at an offset": (lambda x: x[1:].as_strided([x.shape[0] - 1, 7], [7, 1], 0) * 1, (6, 7), set()),
    "as_strided across": (lambda x: x.t().as_strided([x.shape[1], 6], [6, 1]) * 1, (6, 7), set()),
    "an operator without a rule": (lambda x: aten.ormqr(x, weights(6, 7)[:, 0], x), (6, 6), set()),
}


@pytest.mark.parametrize("fill", ["replica", "zero"])
@pytest.mark.parametrize("name", CASES)
def test_rows_along_each_dim(name, fill):
    function, shape, expected = CASES[name]
    safe = set()
    for dim in range(len(shape)):
        found = traced(function, dynamic(torch.randn(shape), dim), decompose=False)
        if not found.symbols():
            continue  # the operator fixed the size
        verdict = found.prove(fill=fill)
        if verdict.refusal is None:
            safe.add(dim)
            assert refute(found, verdict, fill) is None, f"rows along dim {dim}"
    if fill == "replica":
        assert safe == expected
