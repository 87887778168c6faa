"""Each rule against the true derivative: what is nonzero is listed, and with a fixed structure, no more."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from detection import detect_hessian, detect_jacobian
from elementwise_rows import ELEMENTWISE, MASK, A, Row, halves
from matrix_rows import PRODUCTS
from needs_torch import aminmax_derived, grid_sample_derived_twice, nextafter_derived
from torch import Tensor

from torchzygote.sparsity.rules import RULES

M34 = A[:12].reshape(3, 4) + 0.05
M44 = A[:16].reshape(4, 4) + 0.03
BAND = torch.diag(torch.ones(5, dtype=torch.float64)) + torch.diag(torch.ones(4, dtype=torch.float64), 1)
PERM = torch.tensor([3, 1, 0, 2])
M33 = torch.eye(3, dtype=torch.float64)
EYES = M33 + 0.2 + A.repeat(2)[:27].reshape(3, 3, 3) / 9
LU = torch.linalg.lu_factor(EYES)
PIVOTS = torch.tensor([[2, 3, 3], [1, 2, 3]], dtype=torch.int32)
WORDS, BAGS = torch.tensor([0, 2, 1, 0, 2]), torch.tensor([0, 2, 2])
SEGMENTS = torch.tensor([1, 0, 3])
DRAW = torch.tensor([[[0.3, 0.8, 0.4]]], dtype=torch.float64)


def spd(x: Tensor) -> Tensor:
    return x @ x.mT + 3 * torch.eye(x.shape[-1], dtype=x.dtype)


def written(x: Tensor) -> Tensor:
    y = torch.zeros(6, dtype=x.dtype)
    y[1:4] = x[:3] * 2
    y[::2] += x[0]
    y[0].mul_(x[1])
    return y


ROWS = [
    *ELEMENTWISE,
    # moving data
    Row("cat", lambda x: torch.cat([x[2:], A[:2], x**2]), (4,)),
    Row("stack", lambda x: torch.stack([x, x**2, A[:4]], 1), (4,)),
    Row("flip", lambda x: x.flip(0, 1), (2, 3)),
    Row("roll", lambda x: x.roll((1, 1), (0, 1)), (2, 3)),
    Row("rot90", lambda x: torch.rot90(x), (2, 3)),
    Row("repeat", lambda x: x.repeat(2, 2), (2, 3)),
    Row("repeat_interleave", lambda x: x.repeat_interleave(2, 0), (2, 3)),
    Row("tile", lambda x: x.tile(3), (2, 3)),
    Row("tril", torch.tril, (3, 3)),
    Row("triu", lambda x: torch.triu(x, 1), (3, 3)),
    Row("diag", torch.diag, (3,)),
    Row("diagonal", lambda x: x.diagonal(1), (3, 3)),
    Row("diag_embed", torch.diag_embed, (2, 3)),
    Row("permute", lambda x: x.permute(2, 0, 1), (2, 3, 2)),
    Row("transpose and view", lambda x: x.t().reshape(-1), (2, 3)),
    Row("expand", lambda x: x.expand(3, 4) * M34, (4,)),
    Row("unfold", lambda x: x.unfold(0, 3, 2), (7,)),
    Row("view of an operation on a slice", lambda x: (x[2:] ** 2).view(2, 2).t(), (6,)),
    Row("as_strided", lambda x: x.as_strided((2, 2), (2, 1), 1), (6,)),
    Row("unbind", lambda x: x.unbind(1)[1] * x.unbind(1)[0], (3, 2)),
    Row("split", lambda x: x.split([1, 3])[1] ** 2, (4,)),
    Row("narrow", lambda x: x.narrow(0, 1, 2), (4,)),
    Row("select", lambda x: x[1], (3, 2)),
    Row("ellipsis and None", lambda x: x[..., None, 0], (3, 2)),
    Row("constant_pad", lambda x: F.pad(x, (1, 2), value=3.0), (4,)),
    Row("circular pad", lambda x: F.pad(x[None], (1, 2), mode="circular"), (1, 4)),
    Row("reflection pad", lambda x: F.pad(x, (1, 2), mode="reflect"), (1, 4)),
    Row("reflection pad 2d", lambda x: F.pad(x, (1, 2, 1, 1), mode="reflect"), (1, 3, 4)),
    Row("replication pad", lambda x: F.pad(x, (1, 2), mode="replicate"), (1, 4)),
    Row("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), (1, 4, 2, 2)),
    Row("im2col", lambda x: F.unfold(x, 2, padding=1), (1, 2, 3, 3)),
    Row("col2im", lambda x: F.fold(x, (3, 3), 2), (1, 4, 4)),
    Row("indexing by a tensor", lambda x: x[PERM] ** 2, (4,)),
    Row("indexing by tensors", lambda x: x[PERM[:3], torch.tensor([0, 1, 0])], (4, 2)),
    Row("indexing by a mask", lambda x: x[MASK], (6,)),
    Row("index_select", lambda x: x.index_select(0, PERM), (4, 2)),
    Row("gather", lambda x: x.gather(0, PERM[:, None]), (4, 2)),
    Row("take", lambda x: x.take(PERM), (2, 3)),
    Row("take_along_dim", lambda x: x.take_along_dim(PERM[None], 1), (1, 4)),
    Row("masked_select", lambda x: x.masked_select(MASK), (6,)),
    Row("masked_scatter", lambda x: torch.zeros(6, dtype=x.dtype).masked_scatter(MASK, x), (4,)),
    Row("index_put", lambda x: torch.zeros(5, dtype=x.dtype).index_put((PERM,), x), (4,)),
    Row(
        "index_put, accumulating",
        lambda x: (x * 2).index_put((torch.tensor([0, 0, 2]),), x[:3] ** 2, accumulate=True),
        (4,),
    ),
    Row(
        "index_add", lambda x: torch.zeros(2, dtype=x.dtype).index_add(0, torch.tensor([0, 1, 0, 1]), x), (4,)
    ),
    Row("index_copy", lambda x: (x * 2).index_copy(0, PERM[:2], x[:2] ** 2), (4,)),
    Row("index_fill", lambda x: (x * 2).index_fill(0, PERM[:2], 1.0), (4,)),
    Row("scatter", lambda x: (x * 2).scatter(0, PERM[:2], x[2:] ** 2), (4,)),
    Row("scatter of a number", lambda x: (x * 2).scatter(0, PERM[:2], 3.0), (4,)),
    Row("scatter_add", lambda x: (x * 2).scatter_add(0, torch.tensor([0, 0, 1]), x[:3]), (4,)),
    Row("scatter_reduce", lambda x: (x * 2).scatter_reduce(0, torch.tensor([0, 0, 1]), x[:3], "mean"), (4,)),
    Row("scatter_reduce prod", lambda x: (x * 2).scatter_reduce(0, PERM[:2], x[:2], "prod"), (4,), exact="1"),
    Row("slice_scatter", lambda x: (x * 2).slice_scatter(x[:2] ** 2, 0, 1, 3), (4,)),
    Row("select_scatter", lambda x: (x * 2).select_scatter(x[0] ** 2, 0, 1), (3, 2)),
    Row("diagonal_scatter", lambda x: (x * 2).diagonal_scatter(x[0] ** 2), (3, 3)),
    Row("writing into a buffer", written, (4,)),
    Row("embedding", lambda x: F.embedding(torch.tensor([0, 2, 0]), x), (3, 2)),
    Row("embedding_bag", lambda x: F.embedding_bag(WORDS, x, BAGS) ** 2, (3, 2), orders=1),
    Row(
        "embedding_bag, largest",
        lambda x: F.embedding_bag(WORDS, x, BAGS, mode="max"),
        (3, 2),
        exact="",
        orders=1,
    ),
    Row(
        "embedding_bag, padded",
        lambda x: F.embedding_bag(WORDS, x, BAGS, padding_idx=2) ** 2,
        (3, 2),
        orders=1,
    ),
    Row(
        "embedding_bag, last offset",
        lambda x: F.embedding_bag(WORDS, x, BAGS, include_last_offset=True, mode="sum") ** 2,
        (3, 2),
        orders=1,
    ),
    Row(
        "embedding_bag, weighted",
        lambda x: F.embedding_bag(WORDS, x[:3], BAGS, mode="sum", per_sample_weights=x[3:].reshape(-1)[:5]),
        (6, 2),
        orders=1,
    ),
    Row("segment sums", lambda x: torch.segment_reduce(x, "sum", lengths=SEGMENTS) ** 2, (4, 2), orders=1),
    Row("segment products", lambda x: torch.segment_reduce(x, "prod", lengths=SEGMENTS), (4, 2), orders=1),
    Row(
        "segments between",
        lambda x: torch.segment_reduce(x, "mean", offsets=torch.tensor([0, 1, 4])),
        (4,),
        orders=1,
    ),
    Row("lu_unpack", lambda x: torch.cat(torch.lu_unpack(x, PIVOTS)[1:], 1) ** 2, (2, 3, 3)),
    Row("lu_unpack, wide", lambda x: torch.lu_unpack(x, PIVOTS[:, 1:] - 1)[2] ** 2, (2, 2, 3)),
    Row("meshgrid", lambda x: torch.meshgrid(x, x, indexing="ij")[0] * 2, (3,)),
    Row("tensordot", lambda x: torch.tensordot(x, M34, ([0], [0])), (3, 2)),
    Row("kron", lambda x: torch.kron(x, M34[:2, :2]), (2, 2)),
    Row("block_diag", lambda x: torch.block_diag(x, x**2), (2, 2)),
    Row("cross", lambda x: torch.linalg.cross(x[0], x[1]), (2, 3)),
    Row("diff", torch.diff, (5,)),
    Row("gradient", lambda x: torch.gradient(x)[0], (5,)),
    Row("trapezoid", torch.trapezoid, (5,)),
    # along dimensions
    Row("sum", torch.sum, (2, 3)),
    Row("sum along a dimension", lambda x: x.sum(1) ** 2, (2, 3)),
    Row("sum along two, kept", lambda x: x.sum((0, 2), keepdim=True), (2, 3, 2)),
    Row("mean", lambda x: x.mean(-1) ** 2, (2, 3)),
    Row("nansum", lambda x: x.nansum(0), (2, 3)),
    Row("trace", torch.trace, (3, 3)),
    Row("prod", torch.prod, (5,)),
    Row("prod along a dimension", lambda x: x.prod(1, keepdim=True), (2, 3)),
    Row("var", lambda x: x.var(1), (2, 3)),
    Row("std", lambda x: x.std(), (4,)),
    Row("norm", lambda x: x.norm(dim=1), (2, 3)),
    Row("vector_norm 1", lambda x: torch.linalg.vector_norm(x, 1), (4,)),
    Row("vector_norm 3", lambda x: torch.linalg.vector_norm(x, 3), (4,)),
    Row("dist", halves(torch.dist), (6,)),
    Row("dist 1", halves(lambda a, b: torch.dist(a, b, 1)), (6,)),
    Row("dist, broadcasting", lambda x: torch.dist(x[:, None], x[:2], 3), (4,)),
    Row("renorm", lambda x: torch.renorm(x, 2, 0, 0.2), (2, 3)),
    Row("renorm 1", lambda x: torch.renorm(x, 1, -1, 0.2), (2, 3), exact="1"),
    Row("renorm of some", lambda x: torch.renorm(x, 2, 1, 0.9), (2, 3), exact=""),
    Row("logsumexp", lambda x: x.logsumexp(1), (2, 3)),
    Row("cumsum", lambda x: x.cumsum(1) ** 2, (2, 4)),
    Row("cumprod", lambda x: x.cumprod(0), (5,)),
    Row("logcumsumexp", lambda x: x.logcumsumexp(0), (5,)),
    Row("softmax", lambda x: x.softmax(1), (2, 3)),
    Row("log_softmax", lambda x: x.log_softmax(0), (2, 3)),
    Row("softmin", lambda x: F.softmin(x, 1), (2, 3)),
    Row("layer_norm", lambda x: F.layer_norm(x, (3,)), (2, 3)),
    Row("layer_norm by all", lambda x: F.layer_norm(x[:2], (3,), x[2], x[3]), (4, 3), exact="1"),
    Row("rms_norm", lambda x: F.rms_norm(x, (3,)), (2, 3)),
    Row("group_norm", lambda x: F.group_norm(x, 2), (2, 4, 3)),
    Row("instance_norm", lambda x: F.instance_norm(x), (2, 2, 3)),
    Row("batch_norm, training", lambda x: F.batch_norm(x, None, None, training=True), (3, 2)),
    Row(
        "batch_norm, fixed statistics",
        lambda x: F.batch_norm(x, torch.zeros(2).double(), torch.ones(2).double()),
        (3, 2),
    ),
    Row("normalize", lambda x: F.normalize(x, dim=1), (2, 3), exact="1"),
    Row("cosine_similarity", lambda x: F.cosine_similarity(x[:2], x[2:], dim=1), (4, 3), exact=""),
    Row("pairwise_distance", lambda x: F.pairwise_distance(x[:2], x[2:]), (4, 3), exact="1"),
    Row("cdist", lambda x: torch.cdist(x[:2], x[2:]), (5, 3), exact="1", orders=1),
    Row("mse_loss", lambda x: F.mse_loss(x, A[:4]), (4,)),
    Row("mse_loss of both", lambda x: F.mse_loss(x[:2], x[2:], reduction="none"), (4,)),
    Row("l1_loss", lambda x: F.l1_loss(x, A[:4]), (4,)),
    Row("smooth_l1_loss", lambda x: F.smooth_l1_loss(x, A[:4]), (4,), exact="1"),
    Row("huber_loss", lambda x: F.huber_loss(x, A[:4]), (4,), exact="1"),
    Row("bce", lambda x: F.binary_cross_entropy(x, A[:4].abs()), (4,)),
    Row("bce with logits", lambda x: F.binary_cross_entropy_with_logits(x, A[:4].abs()), (4,)),
    Row("cross_entropy", lambda x: F.cross_entropy(x, torch.tensor([0, 2])), (2, 3)),
    Row("nll_loss", lambda x: F.nll_loss(x, torch.tensor([0, 2]), reduction="none"), (2, 3)),
    Row("kl_div", lambda x: F.kl_div(x, A[:4].abs(), reduction="sum"), (4,)),
    # matrices
    Row("matrix times vector", lambda x: M34 @ x, (4,)),
    Row("banded matrix times vector", lambda x: (BAND @ x) ** 2, (5,)),
    Row("sparse matrix times vector", lambda x: (BAND.to_sparse_coo() @ x) ** 2, (5,)),
    Row("vector times matrix", lambda x: x @ M34, (3,)),
    Row("matrix times its own column", lambda x: x[:, :2] @ x[:2, 2], (2, 3)),
    Row("matrix times constant", lambda x: x @ M34, (2, 3)),
    Row("constant times matrix", lambda x: M34 @ x, (4, 2)),
    Row("banded matrix times matrix", lambda x: BAND @ x, (5, 2)),
    Row("matrix times banded matrix", lambda x: x @ BAND, (2, 5)),
    Row("matrix times matrix", lambda x: x[:, :2] @ x[:2, 2:], (3, 5)),
    Row("batches of matrices", lambda x: x[:, :, :2] @ x[:, :2, 2:], (2, 3, 4)),
    Row("batch times one matrix", lambda x: x @ M34, (2, 2, 3)),
    Row("dot", halves(torch.dot), (6,)),
    Row("dot with a constant", lambda x: torch.dot(x, torch.tensor([0.0, 1, 2], dtype=x.dtype)), (3,)),
    Row("outer", lambda x: torch.outer(x[:2], x[2:]), (5,)),
    Row("addmm", lambda x: torch.addmm(x, M34[:2, :3], M34), (2, 4)),
    Row("addmv", lambda x: torch.addmv(x[:3], M34, x), (4,)),
    Row("baddbmm", lambda x: torch.baddbmm(x, x, x), (2, 2, 2), exact="1"),
    Row("einsum", lambda x: torch.einsum("ij,jk,i->k", x, M34, A[:2]), (2, 3)),
    Row("linear", lambda x: F.linear(x, M34, A[:3]), (2, 4)),
    Row("bilinear form", lambda x: x @ M44 @ x, (4,)),
    *PRODUCTS,
    Row("inverse", torch.linalg.inv, (2, 2), exact="1", low=0.1),
    Row("inverse of a batch", lambda x: torch.linalg.inv(x + 2 * torch.eye(2)), (2, 2, 2), exact="1"),
    Row("solve", lambda x: torch.linalg.solve(x[:2] + torch.eye(2), x[2]), (3, 2), exact="1"),
    Row("det", torch.linalg.det, (3, 3), exact="1"),
    Row("slogdet", lambda x: torch.linalg.slogdet(x)[1], (3, 3), exact="1"),
    Row("cholesky", lambda x: torch.linalg.cholesky(spd(x)), (2, 2), exact=""),
    Row("eigvalsh", lambda x: torch.linalg.eigvalsh(spd(x)), (2, 2), exact="1"),
    Row("svdvals", torch.linalg.svdvals, (2, 3), exact="1"),
    Row("qr", lambda x: torch.linalg.qr(x)[1], (2, 2), exact=""),
    Row("matrix_exp", torch.linalg.matrix_exp, (2, 2), exact="1"),
    Row(
        "triangular solve",
        lambda x: torch.linalg.solve_triangular(x[:2], x[2:].T, upper=True),
        (3, 2),
        exact="",
    ),
    # an operand without a batch whose first size is that of the others' batch
    Row("solve, one right side", lambda x: torch.linalg.solve(EYES, x), (3, 2)),
    Row("solve, a vector for each", lambda x: torch.linalg.solve(EYES[:2, :2, :2], x), (2, 2), exact="1"),
    Row("solve, one matrix", lambda x: torch.linalg.solve(x + 2 * M33, EYES), (3, 3), exact=""),
    Row(
        "triangular solve, one matrix",
        lambda x: torch.linalg.solve_triangular(x + 2 * M33, EYES, upper=False),
        (3, 3),
        exact="",
    ),
    Row("cholesky_solve, one factor", lambda x: torch.cholesky_solve(EYES, x + 2 * M33), (3, 3), exact=""),
    Row("lu_solve, one right side", lambda x: torch.linalg.lu_solve(*LU, x), (3, 2)),
    Row("pinv", torch.linalg.pinv, (2, 2), exact="1"),
    Row("matrix_power", lambda x: torch.linalg.matrix_power(x, 3), (2, 2), exact="1"),
    # windows
    Row("conv1d", lambda x: F.conv1d(x, A[:12].reshape(2, 2, 3) + 0.01, padding=1, stride=2) ** 2, (1, 2, 6)),
    Row("conv1d, grouped", lambda x: F.conv1d(x, A[:6].reshape(2, 1, 3) + 0.01, groups=2), (2, 2, 5)),
    Row("conv2d", lambda x: F.conv2d(x, A[:16].reshape(2, 2, 2, 2) + 0.01, A[:2], dilation=2), (1, 2, 4, 4)),
    Row(
        "conv2d with zeros in the kernel",
        lambda x: (
            F.conv2d(x, torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).double()[None, None], padding=1)
            ** 2
        ),
        (1, 1, 4, 4),
    ),
    Row("conv3d", lambda x: F.conv3d(x, A[:8].reshape(1, 1, 2, 2, 2) + 0.01), (1, 1, 3, 2, 3)),
    Row(
        "conv_transpose1d",
        lambda x: F.conv_transpose1d(x, A[:12].reshape(2, 2, 3) + 0.01, stride=2),
        (1, 2, 3),
    ),
    Row(
        "conv_transpose2d",
        lambda x: F.conv_transpose2d(x, A[:8].reshape(2, 1, 2, 2) + 0.01, padding=1, stride=2),
        (1, 2, 3, 3),
    ),
    Row("conv by its weight", lambda x: F.conv1d(A[:10].reshape(1, 2, 5), x), (2, 2, 3)),
    Row("conv by both", lambda x: F.conv1d(x[None, :, 3:], x[:, None, :3], groups=2), (2, 7), exact=""),
    Row("avg_pool1d", lambda x: F.avg_pool1d(x, 2), (1, 2, 6)),
    Row("avg_pool2d", lambda x: F.avg_pool2d(x, 3, 2, 1) ** 2, (1, 1, 5, 5)),
    Row("max_pool1d", lambda x: F.max_pool1d(x, 2), (1, 2, 6), exact=""),
    Row("max_pool2d", lambda x: F.max_pool2d(x, 2) ** 2, (1, 1, 4, 4), exact=""),
    Row("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (2, 3)), (1, 1, 5, 4)),
    Row("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 2), (1, 1, 5)),
    Row("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, 2), (1, 1, 5, 4), exact=""),
    Row(
        "fractional_max_pool2d",
        lambda x: F.fractional_max_pool2d(x, 2, (2, 3), _random_samples=DRAW[..., :2]) ** 2,
        (1, 1, 5, 6),
        exact="",
    ),
    Row(
        "fractional_max_pool3d",
        lambda x: F.fractional_max_pool3d(x, 2, 2, _random_samples=DRAW),
        (1, 1, 4, 4, 5),
        exact="",
    ),
    Row(
        "max_unpool2d",
        lambda x: F.max_unpool2d(x, torch.tensor([[0, 3], [13, 10]]).expand(2, 2, 2), 2) ** 2,
        (2, 2, 2),
    ),
    Row(
        "max_unpool3d",
        lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2) ** 2,
        (1, 1, 2, 4, 4),
        exact="",
    ),
    Row(
        "affine_grid",
        lambda x: F.affine_grid(x, [2, 1, 2, 2], align_corners=False) ** 2,
        (2, 2, 3),
        exact="1",
    ),
    Row(
        "affine_grid, 3d",
        lambda x: F.affine_grid(x, [1, 1, 3, 2, 2], align_corners=True) ** 2,
        (1, 3, 4),
        exact="",
    ),
    Row("interpolate, nearest", lambda x: F.interpolate(x, scale_factor=2), (1, 1, 2, 3)),
    Row("interpolate, linear", lambda x: F.interpolate(x, 7, mode="linear"), (1, 1, 4)),
    Row(
        "interpolate, bilinear",
        lambda x: F.interpolate(x, (5, 3), mode="bilinear", align_corners=True),
        (1, 1, 3, 2),
        exact="1",
    ),
    Row("interpolate, bicubic", lambda x: F.interpolate(x, (4, 4), mode="bicubic"), (1, 1, 3, 3), exact=""),
    Row(
        "grid_sample",
        lambda x: F.grid_sample(x, M34[:, :2].reshape(1, 1, 3, 2), align_corners=False),
        (1, 1, 4, 4),
    ),
    # values
    Row("sort", lambda x: x.sort(descending=True).values ** 2, (5,)),
    Row("topk", lambda x: x.topk(2, 1).values, (2, 4)),
    Row("kthvalue", lambda x: x.kthvalue(2, 0).values, (4, 2)),
    Row("median", lambda x: x.median(), (5,)),
    Row("median along a dimension", lambda x: x.median(1, keepdim=True).values, (2, 5)),
    Row("max", lambda x: x.max() ** 2, (2, 3)),
    Row("min along a dimension", lambda x: x.min(1).values, (2, 3)),
    Row("amax", lambda x: x.amax((0, 2)), (2, 3, 2)),
    Row("amin, kept", lambda x: x.amin(1, keepdim=True), (2, 3)),
    Row("aminmax", lambda x: torch.stack(torch.aminmax(x)), (4,)),
    Row("aminmax along a dimension", lambda x: torch.stack(torch.aminmax(x, dim=1)), (3, 3)),
    Row("aminmax, kept", lambda x: torch.aminmax(x, dim=0, keepdim=True)[0], (2, 3)),
    Row("cummax", lambda x: x.cummax(0).values, (5,)),
    Row("gather by argsort", lambda x: x[x.argsort()] ** 2, (5,)),
    Row("vector_norm inf", lambda x: torch.linalg.vector_norm(x, math.inf), (4,), exact=""),
    # complex numbers on the way
    Row("complex product", lambda x: (torch.complex(x[:2], x[2:]) ** 2).real, (4,), exact="1"),
    Row("complex absolute value", lambda x: torch.complex(x[:2], x[2:]).abs(), (4,)),
    Row("polar", lambda x: torch.view_as_real(torch.polar(x[:2], x[2:])), (4,), exact=""),
    Row("imaginary part written", lambda x: torch.view_as_complex(x.reshape(2, 2)).imag ** 2, (4,)),
    Row("fft", lambda x: torch.fft.fft(x).abs(), (4,)),
    Row("rfft2 and back", lambda x: torch.fft.irfft2(torch.fft.rfft2(x)), (2, 4), exact=""),
    Row("fft along one dimension", lambda x: torch.fft.fft(x, dim=1).real, (2, 3)),
    # derivatives on the way
    Row("torch.func.grad", torch.func.grad(lambda x: (x[1:] * x[:-1] ** 2).sum()), (5,)),
    Row("vmap", torch.func.vmap(lambda x: x * x.sum()), (2, 3)),
    Row("vmap of grad", torch.func.vmap(torch.func.grad(lambda x: x.tanh().prod())), (2, 3)),
    Row("jvp", lambda x: torch.func.jvp(torch.sin, (x,), (x**2,))[1], (4,)),
]


OLDER = {
    "aminmax": aminmax_derived,
    "aminmax along a dimension": aminmax_derived,
    "aminmax, kept": aminmax_derived,
    "nextafter": nextafter_derived,
}
ONCE = [pytest.param(row, id=row.name, marks=OLDER.get(row.name, ())) for row in ROWS]
OLDER["grid_sample"] = grid_sample_derived_twice
TWICE = [pytest.param(row, id=row.name, marks=OLDER.get(row.name, ())) for row in ROWS if row.orders == 2]


@pytest.mark.parametrize("row", ONCE)
def test_first_order(row: Row) -> None:
    x = draw(row)
    (pattern,) = detect_jacobian(row.f, [x])
    assert not pattern.unknown
    expected = torch.zeros(pattern.shape, dtype=torch.bool)
    for point in [x] if pattern.is_local else [x, draw(row), draw(row)]:
        J = torch.autograd.functional.jacobian(row.f, point)
        expected |= (J != 0).reshape(pattern.shape)
    found = pattern.to_dense()
    assert not (expected & ~found).any(), "a nonzero is missing"
    if "1" in row.exact:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("row", TWICE)
def test_second_order(row: Row) -> None:
    x = draw(row)

    def weighted(x: Tensor) -> Tensor:
        y = row.f(x)
        return (
            y * torch.linspace(0.7, 1.9, max(y.numel(), 1), dtype=y.dtype)[: y.numel()].reshape(y.shape)
        ).sum()

    (pattern,) = detect_hessian(weighted, [x])
    assert not pattern.unknown
    expected = torch.zeros(pattern.shape, dtype=torch.bool)
    for point in [x] if pattern.is_local else [x, draw(row), draw(row)]:
        H = torch.autograd.functional.hessian(weighted, point).reshape(pattern.shape)
        expected |= H.abs() > 1e-9
    found = pattern.to_dense()
    assert torch.equal(found, found.T)
    assert not (expected & ~found).any(), "a nonzero is missing"
    if "2" in row.exact:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("row", TWICE)
def test_backward_formulas(row: Row) -> None:
    """A function that is a gradient: its Jacobian is the Hessian, its operators are backward formulas."""
    x = draw(row)

    def weighted(x: Tensor) -> Tensor:
        y = row.f(x)
        return (
            y * torch.linspace(0.7, 1.9, max(y.numel(), 1), dtype=y.dtype)[: y.numel()].reshape(y.shape)
        ).sum()

    def gradient(x: Tensor) -> Tensor:
        y = weighted(x)
        if not y.requires_grad:
            return torch.zeros_like(x)
        (found,) = torch.autograd.grad(y, x, create_graph=True)
        return found

    (pattern,) = detect_jacobian(gradient, [x])
    expected = torch.autograd.functional.hessian(weighted, x).reshape(pattern.shape).abs() > 1e-9
    assert not (expected & ~pattern.to_dense()).any(), "a nonzero is missing"
    assert set(pattern.unknown) <= {"aten.grid_sampler_2d_backward.default"}


def draw(row: Row) -> Tensor:
    return row.low + (row.high - row.low) * torch.rand(row.shape, dtype=torch.float64)


def test_every_name_in_the_table_is_an_operator() -> None:
    missing = [name for name in RULES if not hasattr(torch.ops.aten, name)]
    missing = [name for name in missing if not hasattr(torch.ops.aten, f"{name}_")]
    assert set(missing) <= {"cholesky"}  # gone with 2.14
