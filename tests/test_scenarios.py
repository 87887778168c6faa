"""Every operator in every mode and dtype against derivatives known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scenarios import SCALAR, SCENARIOS, Scenario
from torch import Tensor

from torchzygote.gradients import gradient, pullback, pushforward, withgradient
from torchzygote.hessians import diaghessian, hessian, hessian_dual, hessian_reverse, withhessian
from torchzygote.jacobians import jacobian, withjacobian
from torchzygote.params import Params

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 2e-5, "atol": 2e-4},
}

scenario = pytest.mark.parametrize("s", SCENARIOS, ids=str)
scalar = pytest.mark.parametrize("s", SCALAR, ids=str)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
devices = pytest.mark.parametrize("device", DEVICES)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


def matrix(s: Scenario, x: Tensor) -> Tensor:
    """The Jacobian as the contract shapes it: a vector by a 0-dim array."""
    J = s.J(x)
    return J.reshape(-1) if x.dim() == 0 else J


@scenario
@dtypes
@devices
@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_jacobian(s: Scenario, dtype: torch.dtype, device: str, mode: str, chunk_size: int | None) -> None:
    x = s.x().to(device, dtype)
    val, (J,) = withjacobian(s.f, x, mode=mode, chunk_size=chunk_size)
    assert J.dtype == dtype
    close(J, matrix(s, x), dtype)
    close(val, s.f(x), dtype)


@scenario
@dtypes
@devices
def test_pullback_and_pushforward(s: Scenario, dtype: torch.dtype, device: str) -> None:
    x = s.x().to(device, dtype)
    J = s.J(x).reshape(s.f(x).numel(), x.numel())
    y, back = pullback(s.f, x)
    ybar = torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(x)
    (xbar,) = back(ybar)
    expected = (ybar.reshape(-1) @ J).reshape(x.shape)
    close(torch.zeros_like(x) if xbar is None else xbar, expected, dtype)
    xdot = torch.linspace(2, -1, x.numel()).reshape(x.shape).to(x)
    close(pushforward(s.f, x)(xdot), (J @ xdot.reshape(-1)).reshape(y.shape), dtype)


@scalar
@dtypes
@devices
def test_gradient(s: Scenario, dtype: torch.dtype, device: str) -> None:
    x = s.x().to(device, dtype)
    val, (g,) = withgradient(s.f, x)
    close(val, s.f(x), dtype)
    close(g, s.J(x).reshape(x.shape), dtype)
    close(gradient(lambda: s.f(x), Params([x]))[x], s.J(x).reshape(x.shape), dtype)


@scalar
@dtypes
@devices
@pytest.mark.parametrize("way", [hessian, hessian_dual, hessian_reverse], ids=lambda way: way.__name__)
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_hessian(
    s: Scenario, dtype: torch.dtype, device: str, way: Callable[..., Tensor], chunk_size: int | None
) -> None:
    assert s.H is not None
    x = s.x().to(device, dtype)
    close(way(s.f, x, chunk_size=chunk_size), s.H(x), dtype)


@scalar
@dtypes
@devices
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_diagonal_and_withhessian(
    s: Scenario, dtype: torch.dtype, device: str, chunk_size: int | None
) -> None:
    assert s.H is not None
    x = s.x().to(device, dtype)
    H = s.H(x)
    (h,) = diaghessian(s.f, x, chunk_size=chunk_size)
    close(h, (H if x.dim() == 0 else H.diagonal()).reshape(x.shape), dtype)
    close(diaghessian(lambda: s.f(x), Params([x]))[x], h, dtype)
    val, grad, hess = withhessian(s.f, x, chunk_size=chunk_size)
    close(val, s.f(x), dtype)
    close(grad, s.J(x).reshape(x.shape), dtype)
    close(hess, H, dtype)


INNER: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gradient": lambda f, x: gradient(f, x)[0],
    "jacobian, reverse": lambda f, x: jacobian(f, x, mode="reverse")[0].reshape(x.shape),
    "jacobian, forward": lambda f, x: jacobian(f, x, mode="forward")[0].reshape(x.shape),
}
OUTER: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "jacobian, reverse": lambda g, x: jacobian(g, x, mode="reverse")[0],
    "jacobian, forward": lambda g, x: jacobian(g, x, mode="forward")[0],
    "torch.func.jacrev": lambda g, x: torch.func.jacrev(g)(x),
    "torch.func.jacfwd": lambda g, x: torch.func.jacfwd(g)(x),
}


@scalar
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", OUTER)
def test_second_order_by_nesting(s: Scenario, inner: str, outer: str) -> None:
    """A gradient that depends on nothing is None; it is zero for whoever differentiates it."""
    assert s.H is not None
    x = s.x()

    def g(x: Tensor) -> Tensor:
        found = INNER[inner](s.f, x)
        return torch.zeros_like(x) if found is None else found

    n = x.numel()
    close(OUTER[outer](g, x).reshape(n, n), s.H(x).reshape(n, n), torch.float64)


@scalar
def test_under_vmap(s: Scenario) -> None:
    assert s.H is not None
    x = torch.stack([s.x(), s.x() * 1.2])
    close(
        torch.func.vmap(lambda x: gradient(s.f, x)[0])(x),
        torch.stack([s.J(v).reshape(v.shape) for v in x]),
        torch.float64,
    )
    close(torch.func.vmap(lambda x: hessian(s.f, x))(x), torch.stack([s.H(v) for v in x]), torch.float64)
