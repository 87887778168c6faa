"""Forward mode inside compiled derivatives: views as points, and Hessians that PyTorch can't nest there."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from torchzygote import (
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    jacobian,
    plan_hessian,
    withgradient,
    withjacobian,
)

X = torch.tensor([0.7, -0.3, 1.2], dtype=torch.float64)


def compiled(f: Callable[[Tensor], Tensor], backend: str) -> Tensor:
    torch._dynamo.reset()
    found: Tensor = torch.compile(f, fullgraph=True, backend=backend)(X)
    return found


def element(x: Tensor) -> Tensor:
    return forwarddiff(torch.sin, x[1]) * x[0]


COLUMNS: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient": lambda x: gradient(element, x)[0],
    "hessian": lambda x: hessian(element, x),
    "diaghessian": lambda x: diaghessian(element, x)[0],
    "forward": lambda x: jacobian(element, x, mode="forward")[0],
    "torch.func.grad": lambda x: torch.func.grad(element)(x),
    "vmap": lambda x: torch.func.vmap(lambda x: gradient(element, x)[0])(torch.stack([x, 2 * x])),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("column", COLUMNS)
def test_forward_derivatives_by_an_element_compile_time_and_again(column: str, backend: str) -> None:
    f = COLUMNS[column]
    for _ in range(2):
        torch.testing.assert_close(compiled(f, backend), f(X))


def cubed(x: Tensor) -> Tensor:
    return (x**3).sum()


NESTED: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient": lambda x: gradient(lambda z: hessian_dual(cubed, z).sum(), x)[0],
    "gradient, by mode": lambda x: gradient(
        lambda z: hessian(lambda q: (z * q**2).sum(), z, mode="forward_over_reverse").sum(), x
    )[0],
    "hessian": lambda x: hessian(lambda z: hessian_dual(cubed, z).sum(), x),
    "torch.func.grad": lambda x: torch.func.grad(lambda z: hessian_dual(cubed, z).square().sum())(x),
    "vmap": lambda x: torch.func.vmap(lambda z: hessian_dual(cubed, z))(torch.stack([x, 2 * x])),
    "alone": lambda x: hessian_dual(cubed, x),
}


@pytest.mark.parametrize("name", NESTED)
def test_forward_over_reverse_inside_a_compiled_derivative(name: str) -> None:
    # Through a power, forward mode in there ends the process.
    torch.testing.assert_close(compiled(NESTED[name], "aot_eager"), NESTED[name](X))


def of_plan(z: Tensor) -> Tensor:
    return PLAN(z, dense=True)


CUBES = lambda x: cubed(x) + (x[1:] * x[:-1]).sin().sum()
PLAN = plan_hessian(CUBES, X)
OF_PLANS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gradient": (
        lambda x: gradient(lambda z: of_plan(z).square().sum(), x)[0],
        lambda x: gradient(lambda z: hessian(CUBES, z).square().sum(), x)[0],
    ),
    "vmap": (
        lambda x: torch.func.vmap(of_plan)(torch.stack([x, 2 * x])),
        lambda x: torch.func.vmap(lambda z: hessian(CUBES, z))(torch.stack([x, 2 * x])),
    ),
    "vmap of values": (
        lambda x: torch.func.vmap(PLAN.values)(torch.stack([x, 2 * x])).sum(1),
        lambda x: torch.func.vmap(lambda z: hessian(CUBES, z))(torch.stack([x, 2 * x])).sum((1, 2)),
    ),
}


@pytest.mark.parametrize("name", OF_PLANS)
def test_a_hessian_plan_inside_a_compiled_derivative(name: str) -> None:
    found, expected = OF_PLANS[name]
    torch.testing.assert_close(compiled(found, "aot_eager"), expected(X))


# ---- a random function is drawn once -----------------------------------------------------------------------

DROP = lambda x: torch.nn.functional.dropout(x, 0.5)
NOISE = lambda x: x * torch.randn(()) + x.sum() * torch.randn(())
RNG = np.random.default_rng(0)
POINT = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_value_and_jacobian_are_of_one_draw(mode: str) -> None:
    both = lambda x: withjacobian(lambda x: DROP(x.repeat(3)), x, mode=mode)
    for f in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        value, (J,) = f(POINT)
        torch.testing.assert_close(J @ POINT, value)


def test_jacobians_by_several_arguments_are_of_one_draw() -> None:
    f = lambda a, b: torch.cat([a, b, a]) * DROP(torch.ones(36, dtype=a.dtype))
    both = lambda a, b: withjacobian(f, a, b, mode="forward")
    for run in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        value, (by_a, by_b) = run(POINT, 2 * POINT)
        torch.testing.assert_close(by_a @ POINT + by_b @ (2 * POINT), value)


def test_chunks_are_of_one_draw() -> None:
    columns = lambda x: jacobian(NOISE, x, mode="forward", chunk_size=5)[0]
    second = lambda x: hessian_dual(lambda x: x.sum() ** 2 * torch.randn(()), x, chunk_size=5)
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        J, H = wrap(columns)(POINT), wrap(second)(POINT)
        apart = J - torch.diag(J.diagonal())
        assert (apart[0, 1:] == apart[0, 1]).all()
        assert (apart[-1, :-1] == apart[0, 1]).all()
        assert (H[0, 0] == H).all()


@pytest.mark.parametrize("draw", [DROP, lambda x: x * random.random(), lambda x: x * RNG.random()])
def test_value_and_derivative_of_forwarddiff_are_of_one_draw(draw: Callable[[Tensor], Tensor]) -> None:
    both = lambda x: withgradient(lambda x: forwarddiff(draw, x).pow(3).sum(), x)
    runs = [both]
    if draw is DROP:
        runs.append(torch.compile(both, fullgraph=True, backend="aot_eager"))
    for run in runs:
        value, (g,) = run(POINT)
        torch.testing.assert_close(g @ POINT, 3 * value)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_complex_numbers(backend: str) -> None:
    torch._dynamo.reset()
    z = torch.complex(X, X.cos())

    def by_complex(z: Tensor) -> Tensor:
        return gradient(lambda z: forwarddiff(lambda z: z.abs() ** 2, z).sum(), z)[0]

    def through_complex(x: Tensor) -> Tensor:
        return gradient(lambda x: forwarddiff(lambda x: x * (1 + 1j), x).abs().sum(), x)[0]

    found = torch.compile(by_complex, fullgraph=True, backend=backend)(z)
    torch.testing.assert_close(found, 2 * z)
    torch.testing.assert_close(compiled(through_complex, backend), through_complex(X))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_nothing_at_all(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        found = outer(lambda x: forwarddiff(torch.sin, x))(x)
        assert found.shape == (*shape, *shape)
    batch = torch.zeros(0, 3)
    assert torch.func.vmap(lambda x: gradient(lambda x: forwarddiff(torch.sin, x).sum(), x)[0])(
        batch
    ).shape == (0, 3)
