"""Derivatives of what forward mode gives through linear algebra; PyTorch's own are wrong (2.13)."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, linalg

from torchzygote import (
    checkpointed,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    jacobian,
    plan_jacobian,
    pushforward,
)

D = torch.float64
R = torch.linspace(-1, 1, 9, dtype=D).exp().sin().view(3, 3)
S = torch.linspace(0, 9, 9, dtype=D).cos().view(3, 3)
W = torch.tensor([[0.3, -1.0, 0.5], [0.7, 0.2, -0.4], [-0.6, 0.9, 1.1]], dtype=D)
X = torch.tensor([0.4, 0.7], dtype=D)
V = torch.tensor([0.3, 0.9], dtype=D)


def matrix(x: Tensor) -> Tensor:
    return 3 * torch.eye(3, dtype=D) + R * x[0].sin() + S * x[1] ** 2 * 0.3


def swapped(x: Tensor) -> Tensor:
    """One whose decomposition exchanges rows."""
    return matrix(x)[[1, 2, 0]]


def mixed(x: Tensor) -> Tensor:
    return torch.complex(swapped(x), 2 * S * x[0] + R)


def size(z: Tensor) -> Tensor:
    return (z.real**2 + z.imag**2).sqrt()


def angle(z: Tensor) -> Tensor:
    return torch.atan2(z.imag, z.real)


def by_cofactors(a: Tensor) -> Tensor:
    return torch.linalg.cross(a[..., 0, :], a[..., 1, :]).mul(a[..., 2, :]).sum(-1)


def reflections(a: Tensor, tau: Tensor) -> Tensor:
    q = torch.eye(3, dtype=D)
    for i in range(3):
        v = torch.cat([torch.zeros(i, dtype=D), torch.ones(1, dtype=D), a[i + 1 :, i]])
        q = q @ (torch.eye(3, dtype=D) - tau[i] * torch.outer(v, v))
    return q


Function = Callable[[Tensor], Tensor]
OPERATORS: dict[str, tuple[Function, Function]] = {
    "solve": (lambda x: linalg.solve(swapped(x), W), lambda x: linalg.inv(swapped(x)) @ W),
    "solve, keywords": (lambda x: linalg.solve(B=W, A=matrix(x)), lambda x: linalg.inv(matrix(x)) @ W),
    "solve, right": (
        lambda x: linalg.solve(matrix(x), W * x[0], left=False),
        lambda x: (W * x[0]) @ linalg.inv(matrix(x)),
    ),
    "solve, vector": (lambda x: linalg.solve(matrix(x), W[0]), lambda x: linalg.inv(matrix(x)) @ W[0]),
    "solve, batched": (
        lambda x: linalg.solve(torch.stack([matrix(x), swapped(x)]), W),
        lambda x: linalg.inv(torch.stack([matrix(x), swapped(x)])) @ W,
    ),
    "solve, vectors": (
        lambda x: linalg.solve(torch.stack([matrix(x), swapped(x)]), W[:2]),
        lambda x: (linalg.inv(torch.stack([matrix(x), swapped(x)])) @ W[:2, :, None])[..., 0],
    ),
    "solve_ex": (lambda x: linalg.solve_ex(matrix(x), W).result, lambda x: linalg.inv(matrix(x)) @ W),
    "tensorsolve": (
        lambda x: linalg.tensorsolve(matrix(x).T.reshape(3, 3, 1), W[0], dims=(0,)).reshape(3),
        lambda x: linalg.inv(matrix(x)) @ W[0],
    ),
    "det": (lambda x: linalg.det(swapped(x)), lambda x: by_cofactors(swapped(x))),
    "Tensor.det": (lambda x: matrix(x).det(), lambda x: by_cofactors(matrix(x))),
    "det, batched": (
        lambda x: linalg.det(torch.stack([matrix(x), -0.7 * swapped(x)])),
        lambda x: by_cofactors(torch.stack([matrix(x), -0.7 * swapped(x)])),
    ),
    "slogdet": (
        lambda x: linalg.slogdet(swapped(x)).logabsdet,
        lambda x: by_cofactors(swapped(x)).abs().log(),
    ),
    "slogdet, sign": (
        lambda x: torch.slogdet(-swapped(x)).sign * x.sin(),
        lambda x: by_cofactors(-swapped(x)).sign() * x.sin(),
    ),
    "logdet": (lambda x: torch.logdet(swapped(x)), lambda x: by_cofactors(swapped(x)).log()),
    "det of a complex matrix": (
        lambda x: linalg.det(torch.complex(matrix(x), R * x[0])).abs(),
        lambda x: by_cofactors(torch.complex(matrix(x), R * x[0])).abs(),
    ),
    "slogdet of a complex matrix": (
        lambda x: (lambda s: s.sign * s.logabsdet)(linalg.slogdet(mixed(x))).real,
        lambda x: (lambda d: d.real * size(d).log() / size(d))(by_cofactors(mixed(x))),
    ),
    "logdet of complex matrices": (
        lambda x: torch.logdet(torch.stack([mixed(x), mixed(x.flip(0)) * 1e-200])).imag,
        lambda x: torch.stack([angle(by_cofactors(mixed(x))), angle(by_cofactors(mixed(x.flip(0))))]),
    ),
    "householder_product": (
        lambda x: linalg.householder_product(matrix(x) * 0.1, W[0] * x[0]),
        lambda x: reflections(matrix(x) * 0.1, W[0] * x[0]),
    ),
    "select_scatter": (
        lambda x: matrix(x).select_scatter((matrix(x)[0] * 0.3).exp(), -1, -2) ** 2,
        lambda x: torch.stack([matrix(x)[:, 0], (matrix(x)[0] * 0.3).exp(), matrix(x)[:, 2]], dim=1) ** 2,
    ),
}


def scalar(f: Function) -> Function:
    return lambda x: f(x).sin().sum()


WAYS: dict[str, Callable[[Function], Tensor]] = {
    "gradient of a pushforward": lambda f: gradient(lambda x: pushforward(f, x)(V).sin().sum(), X)[0],
    "pushforward of a pushforward": lambda f: pushforward(lambda x: pushforward(f, x)(V), X)(V.flip(0)),
    "hessian of forwarddiff": lambda f: hessian(lambda x: forwarddiff(f, x).sin().sum(), X),
    "hessian of forwarddiff, in chunks": lambda f: hessian(
        lambda x: forwarddiff(f, x, chunk_threshold=1).sin().sum(), X
    ),
    "torch.func over forwarddiff": lambda f: torch.func.jacrev(
        torch.func.grad(lambda x: forwarddiff(f, x).sin().sum())
    )(X),
    "gradient of hessian_dual": lambda f: gradient(lambda x: hessian_dual(scalar(f), x).sin().sum(), X)[0],
    "jacobian, forward, of hessian_dual": lambda f: jacobian(
        lambda x: hessian_dual(scalar(f), x), X, mode="forward"
    )[0],
    "gradient of a Jacobian": lambda f: gradient(lambda x: jacobian(f, x, mode="forward")[0].sin().sum(), X)[
        0
    ],
    "gradient of hessian_dual of checkpointed": lambda f: gradient(
        lambda x: hessian_dual(lambda x: checkpointed(scalar(f), x), x).sin().sum(), X
    )[0],
    "gradient of a pushforward of checkpointed": lambda f: gradient(
        lambda x: pushforward(lambda x: checkpointed(f, x), x)(V).sin().sum(), X
    )[0],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPERATORS)
def test_derivatives_of_forward_derivatives(name: str, way: str) -> None:
    operator, formula = OPERATORS[name]
    torch.testing.assert_close(operator(X), formula(X))
    torch.testing.assert_close(WAYS[way](operator), WAYS[way](formula))


@pytest.mark.parametrize("name", OPERATORS)
def test_create_graph(name: str) -> None:
    found = []
    for f in OPERATORS[name]:
        x = X.clone().requires_grad_()
        matrices = [
            hessian_dual(scalar(f), x, create_graph=True),
            plan_jacobian(f, X)(x, create_graph=True)[0].to_dense(),
        ]
        found.append([torch.autograd.grad(m.sin().sum(), x)[0] for m in matrices])
    torch.testing.assert_close(found[0], found[1])


def test_against_finite_differences() -> None:
    step = 1e-5
    for name, (f, _) in OPERATORS.items():
        second = gradient(lambda x, f=f: pushforward(scalar(f), x)(V), X)[0]
        slope = lambda x, f=f: gradient(scalar(f), x)[0]
        expected = (slope(X + step * V) - slope(X - step * V)) / (2 * step)
        torch.testing.assert_close(second, expected, rtol=1e-6, atol=1e-7, msg=name)


def test_results_have_the_types_that_they_have() -> None:
    def f(x: Tensor) -> Tensor:
        a = matrix(x)
        assert isinstance(linalg.slogdet(a), type(linalg.slogdet(R)))
        assert isinstance(torch.slogdet(a), type(torch.slogdet(R)))
        assert isinstance(linalg.solve_ex(a, W), type(linalg.solve_ex(R, W)))
        assert linalg.solve_ex(a, W).info.dtype == torch.int32
        assert torch.equal(torch.select_scatter(a, a[0], dim=0, index=1)[1], a[0])
        return a.float().select_scatter(a[0].float(), 0, 1)

    assert gradient(lambda x: pushforward(f, x)(V).sum(), X)[0] is not None


def test_select_scatter_keeps_its_dtype() -> None:
    def f(x: Tensor) -> Tensor:
        y = torch.zeros(2, 2).select_scatter(x, 0, 0)
        assert y.dtype == torch.float32
        return (y**3).sum().double()

    torch.testing.assert_close(gradient(lambda x: pushforward(f, x)(V), X)[0], 6 * X * V, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: linalg.solve(torch.stack([matrix(x), matrix(x)]), W[:2]),
        lambda x: linalg.solve_ex(torch.stack([matrix(x), matrix(x)]), W[:2]).result,
        lambda x: linalg.solve(torch.stack([matrix(x), matrix(x)]), W),
        lambda x: linalg.solve(matrix(x), W, left=False),
        lambda x: linalg.householder_product(matrix(x), W[0] * x[0]),
        lambda x: linalg.householder_product(torch.stack([matrix(x)[:, :2]] * 2), W[:2, :2] * x[0]),
        lambda x: linalg.householder_product(matrix(x), W[0, :0]),
    ],
)
def test_results_lie_in_memory_as_they_do(operator: Function) -> None:
    strides: list[tuple[int, ...]] = []

    def f(x: Tensor) -> Tensor:
        y = operator(x)
        strides.append(y.stride())
        return y.sum()

    f(X)
    gradient(lambda x: pushforward(f, x)(V), X)
    assert strides[0] == strides[-1]


def test_what_a_singular_complex_matrix_gives() -> None:
    a = torch.tensor([[1 + 1j, 2 + 2j], [2 + 2j, 4 + 4j]], dtype=torch.complex128)
    seen: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        found = linalg.slogdet(a * x[0])
        seen.extend((found.sign.detach(), found.logabsdet.detach()))
        return x.sum()

    try:
        torch.func.jvp(lambda s: linalg.slogdet(a * s), (X[0],), (X[0],))
    except torch.linalg.LinAlgError:  # as PyTorch 2.15 has it
        with pytest.raises(torch.linalg.LinAlgError, match="singular"):
            gradient(lambda x: pushforward(f, x)(V), X)
        return
    gradient(lambda x: pushforward(f, x)(V), X)
    sign, log = linalg.slogdet(a)
    assert sign == 0
    torch.testing.assert_close([torch.func.debug_unwrap(s, recurse=True) for s in seen[-2:]], [sign, log])


def test_what_the_operators_refuse_is_refused() -> None:
    singular = torch.ones(3, 3, dtype=D)
    for f in (
        lambda x: linalg.solve(singular * x[0], W),
        lambda x: linalg.solve(matrix(x), W[:2]),
        lambda x: linalg.det(matrix(x)[:2]),
    ):
        with pytest.raises(RuntimeError) as plain:
            f(X)
        with pytest.raises(plain.type):
            gradient(lambda x, f=f: pushforward(f, x)(V).sum(), X)


def test_a_constant_matrix_is_left_to_the_operator() -> None:
    f = lambda x: linalg.solve(matrix(X), W) @ torch.cat([x, x[:1]]).sin()
    g = lambda x: linalg.inv(matrix(X)) @ W @ torch.cat([x, x[:1]]).sin()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for way in WAYS.values():
            torch.testing.assert_close(way(f), way(g))
