"""Derivatives by rows inside ``torch.func.vmap``, where PyTorch's own are wrong for some linear algebra."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, linalg

from torchzygote import (
    diaghessian,
    hessian,
    hessian_dual,
    hessian_reverse,
    jacobian,
    plan_hessian,
    pushforward,
)

N = 3
B = torch.linspace(-1, 1, N, dtype=torch.float64)
FIXED = torch.vander(torch.arange(1.0, N + 1)).double()


def square(x: Tensor) -> Tensor:
    return x.view(N, N)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "solve": lambda x: linalg.solve(square(x), B),
    "solve from the right": lambda x: linalg.solve(square(x), B.unsqueeze(0), left=False).reshape(-1),
    "tensorsolve": lambda x: linalg.tensorsolve(square(x), B),
    "det": lambda x: linalg.det(square(x)).reshape(1),
    "det, a method": lambda x: square(x).det().reshape(1),
    "slogdet": lambda x: torch.slogdet(square(x))[1].reshape(1),
    "logdet": lambda x: torch.logdet(square(x) @ square(x).mT).reshape(1),
    "inv": lambda x: linalg.inv(square(x)).reshape(-1),
    "lu_solve": lambda x: linalg.lu_solve(*linalg.lu_factor(square(x)), B.unsqueeze(1)).reshape(-1),
    "lu_solve of both": lambda x: linalg.lu_solve(
        *linalg.lu_factor(square(x)), square(x) @ square(x).mT
    ).reshape(-1),
    "lu_solve of both, from the right": lambda x: linalg.lu_solve(
        *linalg.lu_factor(square(x)), square(x) @ square(x).mT, left=False
    ).reshape(-1),
    "eigvals": lambda x: linalg.eigvals(square(x)).abs(),
    "eig": lambda x: linalg.eig(square(x))[1].abs().reshape(-1),
    "cholesky": lambda x: linalg.cholesky(square(x) @ square(x).mT).reshape(-1),
    "pinv": lambda x: linalg.pinv(square(x)).reshape(-1),
    "solve of a fixed matrix": lambda x: linalg.solve(FIXED, x[:N]),
}
SECOND: dict[str, Any] = {
    "hessian": hessian,
    "hessian_dual": hessian_dual,
    "hessian_reverse": hessian_reverse,
    "diaghessian": lambda f, x: torch.diag(diaghessian(f, x)[0]),
}


@pytest.fixture
def rows() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4, N, N, dtype=torch.float64, generator=generator)
    return (noise + 3 * torch.eye(N)).reshape(4, N * N)


@pytest.mark.filterwarnings("ignore:rows are computed one at a time")
@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_jacobians_of_a_batch(name: str, mode: str, rows: Tensor) -> None:
    f = OPERATIONS[name]
    expected = torch.stack([torch.autograd.functional.jacobian(f, x) for x in rows])
    torch.testing.assert_close(torch.func.vmap(lambda x: jacobian(f, x, mode=mode)[0])(rows), expected)


@pytest.mark.filterwarnings("ignore:rows are computed one at a time")
@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("name", OPERATIONS)
def test_hessians_of_a_batch(name: str, way: str, rows: Tensor) -> None:
    f = lambda x: OPERATIONS[name](x).sin().sum()
    expected = torch.stack([torch.autograd.functional.hessian(f, x) for x in rows])
    if way == "diaghessian":
        expected = torch.diag_embed(expected.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(torch.func.vmap(lambda x: SECOND[way](f, x))(rows), expected)


def test_the_slow_way_is_named(rows: Tensor) -> None:
    f = OPERATIONS["solve"]
    with pytest.warns(UserWarning, match=r"one at a time.*torch.linalg.solve is wrong where vmap is nested"):
        torch.func.vmap(lambda x: jacobian(f, x, mode="forward")[0])(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.func.vmap(lambda x: jacobian(f, x)[0])(rows)
        jacobian(f, rows[0], mode="forward")


@pytest.mark.parametrize("name", ["solve", "lu_solve of both"])
def test_a_plan_for_each_example(name: str, rows: Tensor) -> None:
    f = lambda x: OPERATIONS[name](x).sin().sum()
    plan = plan_hessian(f, rows[0])
    expected = torch.stack([torch.autograd.functional.hessian(f, x) for x in rows])
    with pytest.warns(UserWarning, match="one at a time"):
        found = torch.func.vmap(lambda x: plan(x, dense=True))(rows)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", ["jacobian", "hessian", "diaghessian"])
def test_pullbacks_of_lu_solve_go_row_by_row(way: str, rows: Tensor) -> None:
    f = OPERATIONS["lu_solve of both"]
    of_one: Callable[[Tensor], Any] = lambda x: jacobian(f, x, mode="reverse")[0]
    if way != "jacobian":
        of_one = lambda x: SECOND[way](lambda x: f(x).sin().sum(), x)
    with pytest.warns(UserWarning, match="wrong numbers for torch.linalg.lu_solve"):
        torch.func.vmap(of_one)(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jacobian(f, rows[0])
        hessian(lambda x: torch.func.vmap(f)(x).sin().sum(), rows)


def test_eigenvalues_are_batched_where_that_is_right(rows: Tensor) -> None:
    f = OPERATIONS["eigvals"]
    tangents = torch.eye(N * N, dtype=torch.float64)
    expected = torch.stack([torch.autograd.functional.jacobian(f, x) for x in rows])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.func.vmap(lambda x: jacobian(f, x, mode="forward")[0])(rows)
        pushed = torch.func.vmap(lambda x: torch.func.vmap(lambda t: pushforward(f, x)(t))(tangents))(rows)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(pushed.mT, expected)
    loss = lambda x: f(x).sum()
    with pytest.warns(UserWarning, match=r"gradient of torch.linalg.eigvals is wrong where vmap is nested"):
        torch.func.vmap(lambda x: hessian_dual(loss, x))(rows)


def test_pushforwards_in_two_vmaps_are_refused(rows: Tensor) -> None:
    f = OPERATIONS["solve"]
    tangents = torch.eye(N * N, dtype=torch.float64)
    each = torch.func.vmap(lambda x: pushforward(f, x)(tangents[0]))
    expected = torch.stack([torch.autograd.functional.jacobian(f, x)[:, 0] for x in rows])
    torch.testing.assert_close(each(rows), expected)
    with pytest.raises(RuntimeError, match="wrong where vmap is nested in vmap"):
        torch.func.vmap(lambda x: torch.func.vmap(lambda t: pushforward(f, x)(t))(tangents))(rows)
