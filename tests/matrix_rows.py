"""Products with constant matrices as rows of the table in test_sparsity_rules.py."""

from __future__ import annotations

import torch
from elementwise_rows import Row
from torch import Tensor

from torchzygote._warning import making_sparse

N = 4
BAND = torch.diag(torch.full((N,), -2.0).double()) + torch.diag(torch.ones(N - 1).double(), 1)
STENCIL = BAND + torch.diag(torch.ones(N - 1).double(), -1)
# a batch of different ones: a band, its transpose, and one without zeros
BATCH = torch.stack([BAND, 2 * BAND.T, STENCIL + 0.4])
WIDE = BATCH[:, :2]

with making_sparse():
    CSR = BAND.to_sparse_csr()
SYSTEM = STENCIL - torch.eye(N).double() + torch.arange(N * N).reshape(N, N).double().sin() / 9
SYSTEMS = torch.stack([SYSTEM, SYSTEM.T + 0.1, SYSTEM - 0.05])
FACTORS = torch.linalg.lu_factor(SYSTEM)
FACTORS_OF_EACH = torch.linalg.lu_factor(SYSTEMS)
ROOT = torch.linalg.cholesky(SYSTEM @ SYSTEM.T)


def in_batches(x: Tensor) -> Tensor:
    """`matmul` copies a matrix that is expanded along one of two batch dimensions."""
    return BATCH[:, None].expand(3, 2, N, N) @ x


def halved(x: Tensor) -> Tensor:
    """A constant that is made in between, from one with zeros, and another one that is written into."""
    first, second = BAND / 2, torch.zeros(N, N, dtype=x.dtype)
    second[0, 1:] = 3.0
    return (torch.einsum("ij,bj->bi", first, x) + torch.einsum("ij,bj->bi", second, x)) ** 2


BATCHES = [
    Row("einsum ij,bj->bi", lambda x: torch.einsum("ij,bj->bi", BAND, x) ** 2, (3, N)),
    Row("einsum bj,ij->bi", lambda x: torch.einsum("bj,ij->bi", x, BAND) ** 2, (3, N)),
    Row("einsum along the first axis", lambda x: torch.einsum("ij,jkl->ikl", BAND, x), (N, 2, 2)),
    Row("einsum along the middle axis", lambda x: torch.einsum("ij,kjl->kil", BAND, x) ** 2, (2, N, 2)),
    Row("einsum with an ellipsis", lambda x: torch.einsum("...j,ij->...i", x, BAND), (2, 2, N)),
    Row("einsum, matrices by batch", lambda x: torch.einsum("bij,bj->bi", BATCH, x) ** 2, (3, N)),
    Row("einsum, all matrices with each", lambda x: torch.einsum("bij,kj->bki", BATCH, x), (2, N)),
    Row("einsum of a quadratic form", lambda x: torch.einsum("bi,ij,bj->b", x, BAND, x), (2, N)),
    Row("einsum of forms by batch", lambda x: torch.einsum("bi,bij,bj->", x, BATCH, x), (3, N), exact="1"),
    Row("banded matrix times columns", lambda x: (BAND @ x[..., None])[..., 0] ** 2, (3, N)),
    Row("banded matrix times batch", lambda x: (BAND @ x) ** 2, (2, N, 3)),
    Row("batch times banded matrix", lambda x: (x @ BAND) ** 2, (2, 3, N)),
    Row("expanded matrix times batch", lambda x: BAND.expand(3, N, N) @ x, (3, N, 2)),
    Row("expanded matrix times one", lambda x: (BAND.expand(3, N, N) @ x) ** 2, (N, 2)),
    Row("batch of matrices times one", lambda x: (BATCH @ x) ** 2, (N, 2)),
    Row("one times batch of matrices", lambda x: (x @ BATCH) ** 2, (2, N)),
    Row("batch times batch of matrices", lambda x: (x @ BATCH) ** 2, (3, 2, N)),
    Row("batch of wide matrices times batch", lambda x: (WIDE @ x) ** 2, (3, N, 2)),
    Row("batch times batch of wide matrices", lambda x: (x @ WIDE) ** 2, (3, 3, 2)),
    Row("a batch of one", lambda x: torch.bmm(BATCH[:1], x) ** 2, (1, N, 2)),
    Row("two batch dimensions", in_batches, (3, 2, N, 1)),
    Row("nothing but zeros", lambda x: torch.bmm(torch.zeros(2, 3, N, dtype=x.dtype), x), (2, N, 2)),
    Row("empty batch", lambda x: torch.cat([torch.bmm(x[:0], BATCH[:0]), x]) ** 2, (2, 2, N)),
    Row("baddbmm with constants", lambda x: torch.baddbmm(x**2, BATCH, x) ** 2, (3, N, 2)),
    Row("baddbmm of an expanded matrix", lambda x: torch.baddbmm(x, x, BAND.expand(2, N, N)), (2, 2, N)),
    Row("addbmm with constants", lambda x: torch.addbmm(x[0], BATCH, x) ** 2, (3, N, 2)),
    Row("sparse batch", lambda x: torch.bmm(BATCH.to_sparse(), x), (3, N, 2), orders=1),
    Row("vmap of a matrix times a vector", torch.func.vmap(lambda x: (BAND @ x) ** 2), (3, N)),
    Row("vmap of matrices times vectors", lambda x: torch.func.vmap(torch.mv)(BATCH, x) ** 2, (3, N)),
    Row("constants made in between", halved, (2, N)),
]


def lower(x: Tensor, **options: bool) -> Tensor:
    return torch.linalg.solve_triangular(ROOT.T, x, upper=True, **options)


SPARSE = [
    Row("sparse.mm, COO", lambda x: torch.sparse.mm(BAND.to_sparse(), x) ** 2, (N, 2)),
    Row("sparse.mm, CSR", lambda x: torch.sparse.mm(CSR, x) ** 2, (N, 2)),
    Row("sparse.addmm", lambda x: torch.sparse.addmm(x.flip(0), BAND.to_sparse(), x) ** 2, (N, 2)),
    Row("sparse.addmm to a constant", lambda x: torch.sparse.addmm(BAND, BAND.to_sparse(), x) ** 2, (N, N)),
    Row("CSR matrix times matrix", lambda x: (CSR @ x) ** 2, (N, 2)),
]
# Nothing in an inverse is zero, so that each entry that is listed has to be there.
SOLVES = [
    Row("solve by a constant", lambda x: torch.linalg.solve(SYSTEM, x) ** 2, (N, 2)),
    Row("solve for a vector", lambda x: torch.linalg.solve(SYSTEM, x) ** 2, (N,)),
    Row("solve from the right", lambda x: torch.linalg.solve(SYSTEM, x, left=False) ** 2, (2, N)),
    Row("solve for a batch", lambda x: torch.linalg.solve(SYSTEM, x) ** 2, (2, N, 2)),
    Row("solve by each for one", lambda x: torch.linalg.solve(SYSTEMS, x) ** 2, (N, 2)),
    Row("solve by each for a vector", lambda x: torch.linalg.solve(SYSTEMS, x) ** 2, (3, N)),
    Row(
        "solve by each for matrices that look like vectors", lambda x: torch.linalg.solve(SYSTEMS, x), (4, 4)
    ),
    Row("solve by each for the same vector", lambda x: torch.linalg.solve(SYSTEMS, x), (N,)),
    Row("solve from the right by each", lambda x: torch.linalg.solve(SYSTEMS, x, left=False), (3, 2, N)),
    Row("lu_solve by a constant", lambda x: torch.linalg.lu_solve(*FACTORS, x) ** 2, (N, 2)),
    Row("lu_solve, adjoint", lambda x: torch.linalg.lu_solve(*FACTORS, x, adjoint=True) ** 2, (N, 2)),
    Row("lu_solve from the right", lambda x: torch.linalg.lu_solve(*FACTORS, x, left=False) ** 2, (2, N)),
    Row("lu_solve by each", lambda x: torch.linalg.lu_solve(*FACTORS_OF_EACH, x) ** 2, (3, N, 2)),
    Row("cholesky_solve by a constant", lambda x: torch.cholesky_solve(x, ROOT) ** 2, (N, 2)),
    Row("cholesky_solve for a batch", lambda x: torch.cholesky_solve(x, ROOT) ** 2, (2, N, 2)),
    Row("triangular solve by a constant", lambda x: lower(x) ** 2, (N, 2), exact=""),
    Row("triangular solve from the right", lambda x: lower(x, left=False) ** 2, (2, N), exact=""),
    Row("triangular solve for a batch", lambda x: lower(x) ** 2, (2, N, 2), exact=""),
    Row("inverse of a constant", lambda x: (torch.linalg.inv(SYSTEM) @ x) ** 2, (N, 2)),
    Row("solve by and for", lambda x: torch.linalg.solve(SYSTEM + x[:, :4], x[:, 4:]), (N, 6), exact=""),
    Row(
        "derivative of a solution",
        torch.func.vmap(torch.func.grad(lambda x: (torch.linalg.solve(SYSTEM, x) ** 3).sum())),
        (2, N),
    ),
]


def each(x: Tensor) -> Tensor:
    """A batch of matrices that can be inverted."""
    return x + 2 * torch.eye(x.shape[-1], dtype=x.dtype)


def roots(x: Tensor) -> Tensor:
    return torch.linalg.cholesky(x @ x.mT + torch.eye(x.shape[-1], dtype=x.dtype))


def factors(x: Tensor, right: Tensor, **options: bool) -> Tensor:
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(each(x)), right, **options)


def lowered(x: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(each(x), right, upper=False)


def nearest(x: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.lstsq(x, right).solution


ONES = torch.arange(1, 13).double().sin()
# What the operands' batches don't have in common is repeated.
REPEATED = [
    Row("solve by each, one constant side", lambda x: torch.linalg.solve(each(x), ONES[:2, None]), (3, 2, 2)),
    Row("solve by each, a constant vector", lambda x: torch.linalg.solve(each(x), ONES[:2]), (3, 2, 2)),
    Row("as many as rows", lambda x: torch.linalg.solve(each(x), ONES[:2]), (2, 2, 2)),
    Row(
        "from the right by each",
        lambda x: torch.linalg.solve(each(x), ONES[None, :2], left=False),
        (3, 2, 2),
    ),
    Row("solve by each for one of them", lambda x: torch.linalg.solve(each(x), x[0]), (3, 2, 2), exact=""),
    Row("solve by one for each", lambda x: torch.linalg.solve(each(x[0]), x[1:]), (3, 2, 2), exact=""),
    Row(
        "rows for columns",
        lambda x: torch.linalg.solve(each(x[:2, None]), x[None, 2:]),
        (4, 2, 2),
        exact="",
    ),
    Row("batches of batches", lambda x: torch.linalg.solve(each(x), ONES[:8].view(2, 2, 2)), (2, 2, 2, 2)),
    Row(
        "pairs by one batch",
        lambda x: torch.linalg.solve(each(x), ONES[:8].view(2, 2, 2, 1)),
        (2, 2, 2),
    ),
    Row(
        "triangular solve by each",
        lambda x: lowered(x, ONES[:4].view(2, 2)),
        (3, 2, 2),
        exact="",
    ),
    Row("cholesky_solve by each", lambda x: torch.cholesky_solve(ONES[:2, None], roots(x)), (3, 2, 2)),
    Row("lu_solve by each, one side", lambda x: factors(x, ONES[:2, None]), (3, 2, 2)),
    Row("lu_solve by each, adjoint", lambda x: factors(x, ONES[:2, None], adjoint=True), (3, 2, 2)),
    Row("lstsq", lambda x: nearest(x, ONES[:12].view(2, 3, 2)), (2, 3, 2)),
    Row("lstsq for vectors", lambda x: nearest(x, ONES[:6].view(2, 3)), (2, 3, 2)),
    Row("lstsq, square", lambda x: nearest(each(x), ONES[:8].view(2, 2, 2)), (2, 2, 2)),
    Row("lstsq for what is given", lambda x: nearest(ONES[:12].view(2, 3, 2), x), (2, 3, 2), exact=""),
]
PRODUCTS = [*BATCHES, *SPARSE, *SOLVES, *REPEATED]
