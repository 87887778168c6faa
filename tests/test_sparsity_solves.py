"""Solutions of linear systems by matrices and right sides: exactly what is nonzero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detection import detect_hessian, detect_jacobian
from torch import Tensor

N = 3
Function = Callable[[Tensor, Tensor], Tensor]


def shifted(A: Tensor) -> Tensor:
    """Regular, whatever A is."""
    return A + 9 * torch.eye(N, dtype=A.dtype)


def by_lu(A: Tensor, B: Tensor, **how: Any) -> Tensor:
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(shifted(A)), B, **how)


CASES: dict[str, tuple[Function, tuple[int, ...], tuple[int, ...]]] = {
    "solve": (lambda A, B: torch.linalg.solve(shifted(A), B), (N, N), (N, 4)),
    "solve, left=False": (lambda A, B: torch.linalg.solve(shifted(A), B, left=False), (N, N), (4, N)),
    "solve, a vector": (lambda A, b: torch.linalg.solve(shifted(A), b), (N, N), (N,)),
    "solve, batches": (lambda A, B: torch.linalg.solve(shifted(A), B), (2, N, N), (2, N, 4)),
    "solve, a vector for each": (lambda A, b: torch.linalg.solve(shifted(A), b), (2, N, N), (2, N)),
    "solve, one matrix": (lambda A, B: torch.linalg.solve(shifted(A), B), (N, N), (2, N, 4)),
    "solve, one right side": (lambda A, B: torch.linalg.solve(shifted(A), B), (2, N, N), (N, 4)),
    "solve, batches that broadcast": (
        lambda A, B: torch.linalg.solve(shifted(A), B),
        (2, 1, N, N),
        (3, N, 2),
    ),
    "solve_triangular": (
        lambda A, B: torch.linalg.solve_triangular(shifted(A), B, upper=True),
        (N, N),
        (N, 4),
    ),
    "solve_triangular, lower, left=False": (
        lambda A, B: torch.linalg.solve_triangular(shifted(A), B, upper=False, left=False),
        (N, N),
        (4, N),
    ),
    "solve_triangular, ones": (
        lambda A, B: torch.linalg.solve_triangular(A, B, upper=False, unitriangular=True),
        (2, N, N),
        (2, N, 4),
    ),
    "cholesky_solve": (lambda A, B: torch.cholesky_solve(B, shifted(A)), (N, N), (N, 4)),
    "lu_solve": (by_lu, (N, N), (N, 4)),
    "lu_solve, left=False": (lambda A, B: by_lu(A, B, left=False), (N, N), (4, N)),
    "lstsq": (lambda A, B: torch.linalg.lstsq(A, B).solution, (5, N), (5, 4)),
    "lstsq, batches": (lambda A, B: torch.linalg.lstsq(A, B).solution, (2, 5, N), (2, 5, 4)),
    "lstsq, wide": (lambda A, B: torch.linalg.lstsq(A, B).solution, (2, N), (2, 4)),
}
# PyTorch's solutions by triangles depend on a part of the matrix, by rows; all of it is listed.
BY_ROWS = {name for name in CASES if name.startswith("solve_triangular")}


def points(shapes: tuple[tuple[int, ...], ...], seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("name", CASES)
def test_by_matrices_and_right_sides(name: str) -> None:
    f, *shapes = CASES[name]
    A, B = points((shapes[0], shapes[1]))
    true = [torch.zeros(())] * 2
    for seed in range(3):
        Js = torch.autograd.functional.jacobian(f, points((shapes[0], shapes[1]), seed))
        true = [t + J.reshape(-1, x.numel()).abs() for t, J, x in zip(true, Js, (A, B), strict=True)]
    together = detect_jacobian(f, [A, B])
    alone = [detect_jacobian(lambda A: f(A, B), [A])[0], detect_jacobian(lambda B: f(A, B), [B])[0]]
    for i, t in enumerate(true):
        for pattern in (together[i], alone[i]):
            assert not pattern.unknown
            found = pattern.to_dense()
            assert not bool((found & (t == 0)).any()) or name in BY_ROWS
            assert not bool((~found & (t != 0)).any())


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name: str) -> None:
    """Right sides are coupled with the matrix, not among each other."""
    f, *shapes = CASES[name]
    A, B = points((shapes[0], shapes[1]))
    c = torch.randn_like(f(A, B))

    def g(z: Tensor) -> Tensor:
        return (f(z[: A.numel()].view(A.shape), z[A.numel() :].view(B.shape)) * c).sum()

    z = torch.cat([A.reshape(-1), B.reshape(-1)])
    (pattern,) = detect_hessian(g, [z])
    assert not pattern.unknown
    true, found = torch.autograd.functional.hessian(g, z).abs() > 1e-13, pattern.to_dense()
    assert not bool((~found & true).any())
    right = slice(A.numel(), None)
    assert not bool(found[right, right].any()) or ("lstsq" in name and A.shape[-2] > A.shape[-1])


def test_residuals_are_squares() -> None:
    f = lambda A, B: torch.linalg.lstsq(A, B, driver="gels").residuals
    A, B = points(((5, N), (5, 4)))
    by_a, by_b = (J.reshape(4, -1) != 0 for J in torch.autograd.functional.jacobian(f, (A, B)))
    found = detect_jacobian(f, [A, B])
    assert torch.equal(found[0].to_dense(), by_a)
    assert torch.equal(found[1].to_dense(), by_b)
    g = lambda B: f(A, B).sum()
    true = torch.autograd.functional.hessian(g, B).reshape(20, 20).abs() > 1e-12
    assert torch.equal(detect_hessian(g, [B])[0].to_dense(), true)
