"""Functions with derivatives known in closed form; one table drives every operator, mode and dtype.

Nothing here differentiates: each entry gives its value and writes its Jacobian (and, for scalar functions,
its Hessian) down from mathematics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Matrix = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Scenario:
    """``f`` of one array; ``J(x)`` of shape (y.numel(), x.numel()); ``H(x)`` for scalar functions."""

    name: str
    f: Callable[[Tensor], Tensor]
    x: Callable[[], Tensor]
    J: Matrix
    H: Matrix | None = None

    def __str__(self) -> str:
        return self.name


def points(*shape: int) -> Callable[[], Tensor]:
    """Positive numbers, well apart from each other."""
    n = int(torch.Size(shape).numel())
    return lambda: (0.4 + torch.linspace(0, 1, max(n, 1), dtype=torch.float64).roll(n // 3)[:n]).reshape(
        shape
    )


def eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def constant(*shape: int) -> Callable[[Tensor], Tensor]:
    """A fixed matrix of the dtype and device of what it is used with."""
    n = int(torch.Size(shape).numel())
    values = torch.sin(torch.arange(1.0, n + 1, dtype=torch.float64)).reshape(shape)
    return lambda like: values.to(like)


A = constant(3, 4)
S = constant(4, 4)
B = constant(3, 2)


def kron_rows(X: Tensor) -> Tensor:
    """Jacobian of X -> inverse(X) by X: -(inv ⊗ invᵀ)."""
    inverse = torch.linalg.inv(X).contiguous()
    return -torch.kron(inverse, inverse.t().contiguous())


def outer_jacobian(x: Tensor) -> Tensor:
    n = x.numel()
    unit = eye(n, x)
    return (torch.einsum("ik,j->ijk", unit, x) + torch.einsum("jk,i->ijk", unit, x)).reshape(n * n, n)


def simplex(x: Tensor) -> Tensor:
    weights = torch.exp(x - x.max())
    return weights / weights.sum()


def simplex_jacobian(x: Tensor) -> Tensor:
    s = simplex(x)
    return torch.diag(s) - torch.outer(s, s)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def rosenbrock_gradient(x: Tensor) -> Tensor:
    g = torch.zeros_like(x)
    inner = x[1:] - x[:-1] ** 2
    g[:-1] += -400 * x[:-1] * inner - 2 * (1 - x[:-1])
    g[1:] += 200 * inner
    return g.reshape(1, -1)


def rosenbrock_hessian(x: Tensor) -> Tensor:
    diagonal = torch.zeros_like(x)
    diagonal[:-1] += 1200 * x[:-1] ** 2 - 400 * x[1:] + 2
    diagonal[1:] += 200
    off = -400 * x[:-1]
    return torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)


def product_hessian(x: Tensor) -> Tensor:
    H = x.prod() / torch.outer(x, x)
    return H - torch.diag(H.diagonal())


def norm_hessian(x: Tensor) -> Tensor:
    r = (x * x).sum().sqrt()
    return eye(x.numel(), x) / r - torch.outer(x, x) / r**3


SCENARIOS = [
    Scenario("linear", lambda x: A(x) @ x, points(4), lambda x: A(x)),
    Scenario("elementwise", torch.sin, points(5), lambda x: torch.diag(x.cos())),
    Scenario(
        "elementwise of a matrix", lambda x: x**3, points(2, 3), lambda x: torch.diag(3 * x.reshape(-1) ** 2)
    ),
    Scenario(
        "number to array",
        lambda x: torch.stack([x, x**2, x.exp()]),
        points(),
        lambda x: torch.stack([x**0, 2 * x, x.exp()]),
    ),
    Scenario("outer product", lambda x: torch.outer(x, x), points(3), outer_jacobian),
    Scenario(
        "matrix product",
        lambda x: x @ B(x),
        points(2, 3),
        lambda x: torch.kron(eye(2, x), B(x).t().contiguous()),
    ),
    Scenario(
        "transpose",
        lambda x: x.t(),
        points(2, 3),
        lambda x: eye(6, x)[torch.arange(6).reshape(2, 3).t().reshape(-1)],
    ),
    Scenario("softmax", lambda x: x.softmax(0), points(4), simplex_jacobian),
    Scenario("cumsum", lambda x: x.cumsum(0), points(4), lambda x: torch.tril(torch.ones(4, 4).to(x))),
    Scenario("sort", lambda x: x.sort().values, points(5), lambda x: eye(5, x)[x.argsort()]),
    Scenario(
        "inverse", torch.linalg.inv, lambda: points(3, 3)() + 2 * torch.eye(3, dtype=torch.float64), kron_rows
    ),
    Scenario(
        "indexing",
        lambda x: x[torch.tensor([2, 0, 2])] * 2,
        points(3),
        lambda x: 2 * eye(3, x)[torch.tensor([2, 0, 2])],
    ),
    Scenario(
        "stencil",
        lambda x: x.roll(1) - 2 * x + x.roll(-1),
        points(6),
        lambda x: eye(6, x).roll(1, 1) + eye(6, x).roll(-1, 1) - 2 * eye(6, x),
    ),
    Scenario("empty result", lambda x: x[:0] * 2, points(3), lambda x: x.new_zeros(0, 3)),
    Scenario(
        "empty argument", lambda x: x.sum() + torch.ones(2).to(x), points(0), lambda x: x.new_zeros(2, 0)
    ),
    Scenario("constant", lambda x: torch.ones(2).to(x), points(3), lambda x: x.new_zeros(2, 3)),
    Scenario("sum", torch.sum, points(2, 2), lambda x: x.new_ones(1, 4), lambda x: x.new_zeros(4, 4)),
    Scenario("cube of a number", lambda x: x**3, points(), lambda x: (3 * x**2).reshape(1), lambda x: 6 * x),
    Scenario(
        "quadratic form",
        lambda x: x @ S(x) @ x,
        points(4),
        lambda x: ((S(x) + S(x).t()) @ x).reshape(1, -1),
        lambda x: S(x) + S(x).t(),
    ),
    Scenario(
        "logsumexp",
        lambda x: x.logsumexp(0),
        points(4),
        lambda x: simplex(x).reshape(1, -1),
        simplex_jacobian,
    ),
    Scenario("product", torch.prod, points(4), lambda x: (x.prod() / x).reshape(1, -1), product_hessian),
    Scenario(
        "norm",
        lambda x: torch.linalg.vector_norm(x),
        points(4),
        lambda x: (x / (x * x).sum().sqrt()).reshape(1, -1),
        norm_hessian,
    ),
    Scenario("rosenbrock", rosenbrock, points(5), rosenbrock_gradient, rosenbrock_hessian),
    Scenario(
        "through complex numbers",
        lambda x: torch.fft.fft(x).abs().square().sum(),
        points(4),
        lambda x: (8 * x).reshape(1, -1),
        lambda x: 8 * eye(4, x),
    ),
    Scenario(
        "relu and abs",
        lambda x: torch.relu(x - 0.7).sum() + (x - 0.9).abs().sum(),
        points(4),
        lambda x: ((x > 0.7).to(x) + (x - 0.9).sign()).reshape(1, -1),
        lambda x: x.new_zeros(4, 4),
    ),
    Scenario(
        "separable",
        lambda x: (x.exp() * x).sum(),
        points(40),
        lambda x: (x.exp() * (1 + x)).reshape(1, -1),
        lambda x: torch.diag(x.exp() * (2 + x)),
    ),
]

SCALAR = [s for s in SCENARIOS if s.H is not None]
