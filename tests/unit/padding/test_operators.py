"""Single operators, each with the rows along every dim in turn: what is judged safe holds, and enough is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.oracle import dynamic, refute, traced

aten, prims = torch.ops.aten, torch.ops.prims
FIXED = torch.tensor([1, 0, 1])


def weights(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)


def norm_stats(training: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        return aten.native_batch_norm(x, None, None, weights(6), weights(6).exp(), training, 0.1, 1e-5)[0]

    return run


def uneven_groups(x: torch.Tensor) -> torch.Tensor:
    """Statistics over two entries of the batch at a time, of which there may be an odd number."""
    twice = torch.cat([x, x])
    return aten.native_group_norm(twice, None, None, x.shape[0], 6, 7, 1, 1e-5)[0].chunk(2)[0] * 1


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
    "layer norm over a size": (
        lambda x: aten.native_layer_norm(x, [x.shape[2]], None, None, 1e-5)[0],
        (5, 6, 7),
        {0, 1},
    ),
    "batch norm with other statistics": (
        lambda x: aten.native_batch_norm(x, None, None, x[0, :, 0], x[0, :, 0].exp(), False, 0.1, 1e-5)[0],
        (5, 6, 7),
        {0, 2},
    ),
    "batch norm, functional": (
        lambda x: aten._native_batch_norm_legit_functional(
            x, None, None, weights(6), weights(6).exp(), False, 0.1, 1e-5
        )[0],
        (5, 6, 7),
        {0, 2},
    ),
    "group norm of channels": (
        lambda x: aten.native_group_norm(x, None, None, x.shape[1], 5, 7, 5, 1e-5)[0],
        (5, 6, 7),
        set(),
    ),
    "group norm over two entries": (uneven_groups, (5, 3, 7), set()),
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
    "max pool with offsets": (
        lambda x: prims._low_memory_max_pool_with_offsets(x, [3, 3], [1, 1], [1, 1], [1, 1], False)[0],
        (5, 6, 7, 8),
        {0, 1},
    ),
    "max pool with offsets in 3d": (
        lambda x: prims._low_memory_max_pool_with_offsets(x, [3] * 3, [1] * 3, [1] * 3, [1] * 3, False)[0],
        (4, 5, 6, 7, 8),
        {0, 1},
    ),
    "reflection_pad1d": (lambda x: aten.reflection_pad1d(x, [1, 1]), (5, 6, 7), {0, 1}),
    "replication_pad2d": (lambda x: aten.replication_pad2d(x, [1, 1, 0, 0]), (5, 6, 7, 8), {0, 1}),
    "pixel_shuffle": (lambda x: aten.pixel_shuffle(x, 2), (5, 8, 6, 7), {0}),
    "pixel_unshuffle": (lambda x: aten.pixel_unshuffle(x, 2), (5, 3, 6, 8), {0}),
    "upsample": (lambda x: aten.upsample_nearest2d(x, [9, 9]), (5, 6, 7, 8), {0, 1}),
    "grid_sampler": (
        lambda x: aten.grid_sampler_2d(x, x[:, :2, :3].permute(0, 2, 3, 1).tanh(), 0, 0, False),
        (5, 6, 7, 8),
        {0, 1},
    ),
    "grid_sampler with a fixed grid": (
        lambda x: aten.grid_sampler_2d(x, weights(1, 3, 3, 2), 0, 0, False),
        (1, 6, 7, 8),
        {1},
    ),
    "triu": (lambda x: aten.triu(x, 1), (5, 6, 7), {0, 1, 2}),
    "unfold": (lambda x: aten.unfold(x, 1, 3, 2), (6, 7), {0}),
    "split_with_sizes": (lambda x: aten.split_with_sizes(x, [3, 4], 1)[1] * 1, (6, 7), {0}),
    "squeeze": (lambda x: aten.squeeze(x) * 1, (6, 1, 7, 1), {0, 2}),
    "squeeze.dims": (lambda x: aten.squeeze.dims(x, [1]) * 1, (6, 1, 7), {0, 2}),
    "transpose": (lambda x: aten.transpose.int(x, 0, -1) * 1, (5, 6, 7), {0, 1, 2}),
    "view.dtype": (lambda x: aten.view.dtype(x, torch.int32) * 1, (6, 7), {0}),
    "view_as_complex": (lambda x: aten.view_as_real(aten.view_as_complex(x) * 2j), (6, 7, 2), {0, 1}),
    "slice_scatter": (lambda x: aten.slice_scatter(x, x[:, :2], 1, 3, 5), (6, 7), {0, 1}),
    "select_scatter": (lambda x: aten.select_scatter(x, x[:, 0], 1, 3), (6, 7), {0, 1}),
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
    "complex": (lambda x: aten.view_as_real(aten.complex(x, weights(7))), (6, 7), {0}),
    "polar": (lambda x: aten.view_as_real(aten.polar(x, x + 1)), (6, 7), {0, 1}),
    "quotient": (lambda x: prims.div(x, x.exp()), (6, 7), {0, 1}),
    "quotient of integers": (lambda x: prims.div((x * 0 + 4).long(), (x * 0 + 2).long()), (6,), set()),
    "prelu": (lambda x: aten._prelu_kernel(x, weights(7)), (6, 7), {0}),
    "frexp": (lambda x: aten.frexp(x)[1] * 1, (6, 7), {0, 1}),
    "embedding of columns": (lambda x: aten.embedding(x, FIXED), (6, 7), {1}),
    "transpose of one dim": (lambda x: aten.t(x) * 2, (6,), {0}),
    "rows of none": (lambda x: weights(0, 4).view(x.shape[0], 0), (6,), set()),
    "part at the size": (lambda x: weights(9, 7)[x.shape[0] : x.shape[0] + 2] * x[0], (6, 7), set()),
    "split what is left of rows": (lambda x: x[1:].view(-1, 2, 2) * 1, (6, 4), {0}),
    "merge what is left of rows": (lambda x: x[1:].reshape(-1) * 1, (6, 7), {0}),
    "cut from inside what is left": (lambda x: x.repeat_interleave(2, 0)[1:][x.shape[0] :] * 1, (6, 7), {1}),
    "triangle of blocks": (lambda x: torch.cat([x, x]).tril(), (6, 7), {1}),
    "fixed places among blocks": (
        lambda x: aten.gather(torch.cat([x, x]), 0, FIXED[None].expand(2, 3)),
        (6, 7),
        {1},
    ),
    "numbers as many as rows, and one": (lambda x: torch.cat([x, x]).new_zeros(x.shape[0] + 1), (6, 7), set()),
    "numbers in a square": (lambda x: aten.new_zeros(x, [x.shape[0], x.shape[0]]), (6, 7), set()),
    "extreme of blocks": (lambda x: aten.max.dim(torch.cat([x, x]), 0), (6, 7), {1}),
    "as_strided": (lambda x: x.as_strided([x.shape[0], x.shape[2]], [x.shape[2], 1]) * 1, (6, 1, 7), {0, 2}),
    "as_strided from the front": (lambda x: x.as_strided([3, 7], [7, 1]) * 1, (6, 7), set()),
    "as_strided to windows": (lambda x: x.as_strided([x.shape[0] - 1, 2], [1, 1]) * 1, (6,), set()),
    "as_strided at an offset": (lambda x: x[1:].as_strided([x.shape[0] - 1, 7], [7, 1], 0) * 1, (6, 7), set()),
    "as_strided across": (lambda x: x.t().as_strided([x.shape[1], 6], [6, 1]) * 1, (6, 7), set()),
    "an operator without a rule": (lambda x: aten.ormqr(x, weights(6, 7)[:, 0], x), (6, 6), set()),
    "fft": (lambda x: aten._fft_r2c(x, [1], 0, True), (6, 7), {0}),
    "inverse fft": (lambda x: aten._fft_c2r(aten._fft_c2c(x + 0j, [0], 0, False), [0, 1], 0, 8), (6, 5, 7), {2}),
    "inverse matrix or an error": (lambda x: aten.linalg_inv_ex(x.cos(), check_errors=True)[0], (6, 4, 4), {0}),
    "solve or an error": (lambda x: aten._linalg_solve_ex(x.cos(), x, check_errors=True)[0], (6, 4, 4), {0}),
    "inverse matrix": (lambda x: aten.linalg_inv_ex(x.cos())[0], (6, 4, 4), {0}),
    "determinant": (lambda x: aten._linalg_slogdet(x.cos()), (6, 4, 4), {0}),
    "eigenvalues": (lambda x: aten._linalg_eigh(x, compute_v=False)[0], (6, 4, 4), {0}),
    "eigenvectors": (lambda x: aten._linalg_eigh(x)[1], (6, 4, 4), set()),
    "solve": (lambda x: aten._linalg_solve_ex(weights(1, 4, 4).cos(), x)[0], (6, 4, 3), {0, 2}),
    "solve for vectors": (lambda x: aten._linalg_solve_ex(x[:, :4], x[:, 4])[0], (6, 5, 4), {0, 1}),
    "solve from the right": (lambda x: aten._linalg_solve_ex(weights(1, 4, 4).cos(), x, left=False)[0], (6, 3, 4), {0}),
    "solve many": (lambda x: aten._linalg_solve_ex(x, weights(6, 4, 3))[0], (6, 4, 4), set()),
    "triangular solve": (lambda x: aten.linalg_solve_triangular(weights(4, 4), x, upper=True), (4, 6), {1}),
    "cholesky solve": (lambda x: aten._cholesky_solve_helper(x, weights(1, 4, 4).cos(), True), (6, 4, 3), {0, 2}),
    "pivots": (lambda x: aten.lu_unpack(x, FIXED.new_tensor([[1, 2, 3]], dtype=torch.int32)), (1, 3, 3), set()),
    "matrix exponential": (lambda x: aten.linalg_matrix_exp(x), (6, 4, 4), {0}),
    "cross product": (lambda x: aten.linalg_cross(x, weights(6, 3), dim=1), (6, 3), set()),
    "cross product with one": (lambda x: aten.linalg_cross(x, x.exp(), dim=0), (3, 6), {1}),
    "distances": (lambda x: aten._cdist_forward(x, weights(1, 7, 4), 2.0, None), (6, 5, 4), {0}),
    "distances, one way": (lambda x: aten._cdist_forward(weights(1, 7, 4), x, 1.0, None), (6, 5, 4), {0, 1}),
    "glu": (lambda x: aten.glu(x, 1), (5, 6), {0}),
    "diagonal": (lambda x: aten.diagonal(x, 0, 0, 2) * 1, (6, 7, 4), {1}),
    "diagonal that may be cut": (lambda x: aten.diagonal(x, -1) * 1, (6, 3), set()),
    "diagonal_scatter": (lambda x: aten.diagonal_scatter(x, x[0, :, :6] * 1, 0, 0, 2), (6, 7, 6), {1}),
    "diagonal_scatter of one for all": (
        lambda x: aten.diagonal_scatter(x, weights(7, 6), 0, 1, 2),
        (7, 8, 6),
        set(),
    ),
    "diagonal_scatter over rows": (lambda x: aten.diagonal_scatter(x, weights(6)), (6, 7), set()),
    "searchsorted": (lambda x: aten.searchsorted.Tensor(weights(5), x), (6, 7), {0, 1}),
    "searchsorted by a sorter": (
        lambda x: aten.searchsorted.Tensor(x, x, sorter=aten.sort(x)[1] + x.long() * 0),
        (6, 7),
        set(),
    ),
    "searchsorted in rows": (lambda x: aten.searchsorted.Tensor(aten.sort(x)[0], x), (6, 7), {0}),
    "searchsorted, entries": (lambda x: aten.searchsorted.Tensor(weights(2, 5), x), (2, 7), {1}),
    "index_reduce": (lambda x: aten.index_reduce(x, 1, FIXED, x[:, 2:5], "amax"), (6, 7), {0}),
    "gather fixed places": (lambda x: aten.gather(x, 0, FIXED[None].expand(2, 3)), (6, 7), {1}),
    "scatter to fixed places": (lambda x: aten.scatter.value(x, 0, FIXED[None].expand(2, 3), 2.0), (6, 7), {1}),
    "scatter from rows": (lambda x: aten.scatter_add(weights(3, 4), 1, FIXED[None].expand(2, 3), x), (6, 7), {0, 1}),
    "slice_scatter over rows": (lambda x: aten.slice_scatter(x, weights(2, 7), 0, 1, 3), (6, 7), {0}),
    "slice_scatter to the end": (lambda x: aten.slice_scatter(x, weights(2, 7), 0, 4, 99), (6, 7), set()),
    "select_scatter over rows": (lambda x: aten.select_scatter(x, weights(7), 0, 1), (6, 7), {0}),
    "select_scatter from the end": (lambda x: aten.select_scatter(x, weights(7), 0, -1), (6, 7), set()),
    "kernel of size one": (
        lambda x: aten.convolution(x, weights(2, 4, 1, 3), None, [1, 1], [0, 1], [1, 1], False, [0, 0], 1),
        (5, 4, 6, 7),
        {0, 2},
    ),
    "kernel of size one, padded": (
        lambda x: aten.convolution(x, weights(2, 4, 1), None, [2], [1], [1], False, [0], 1),
        (5, 4, 6),
        {0},
    ),
    "output channels": (
        lambda x: aten.convolution(weights(2, 4, 9), x, None, [1], [0], [1], False, [0], 1),
        (5, 4, 3),
        {0},
    ),
    "output channels with a bias": (
        lambda x: aten.convolution(weights(2, 4, 9), x, x[:, 0, 0], [1], [0], [1], False, [0], 1),
        (5, 4, 3),
        {0},
    ),
    "output channels, transposed": (
        lambda x: aten.convolution(weights(2, 4, 9), x, None, [1], [0], [1], True, [0], 1),
        (4, 5, 3),
        {1},
    ),
    "output channels in groups": (
        lambda x: aten.convolution(weights(2, 4, 9), x, None, [1], [0], [1], False, [0], 2),
        (6, 2, 3),
        set(),
    ),
    "grid of places": (
        lambda x: aten.grid_sampler_2d(weights(1, 3, 5, 4), x.tanh(), 0, 0, False),
        (1, 6, 7, 2),
        {1, 2},
    ),
}


@pytest.mark.slow
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
