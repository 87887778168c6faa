"""Derivatives of tensors without numbers, or whose numbers can't be asked for: meta, fake, under make_fx.

The sizes are those from which structure is looked for, and results are checked, where there are numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from torchzygote import (
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    jacobian,
    plan_hessian,
    plan_jacobian,
    pushforward,
)


def rosenbrock(x: Tensor) -> Tensor:
    return ((1 - x[:-1]) ** 2 + 100 * (x[1:] - x[:-1] ** 2) ** 2).sum()


def layer(x: Tensor) -> Tensor:
    return (x @ x.new_ones(x.shape[-1], x.shape[-1])).tanh()


def products(x: Tensor) -> Tensor:
    return x[1:] * x[:-1]


CASES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "tall": (lambda x: jacobian(lambda x: x.sin().repeat(4), x)[0], (3,)),
    "tall, by columns": (lambda x: jacobian(lambda x: x.sin().repeat(40), x)[0], (100,)),
    "forward": (lambda x: jacobian(torch.sin, x, mode="forward")[0], (3,)),
    "elementwise": (lambda x: jacobian(torch.sin, x)[0], (2000,)),
    "stencil": (lambda x: jacobian(products, x)[0], (2000,)),
    "batch": (lambda x: jacobian(layer, x)[0], (100, 8)),
    "hessian": (lambda x: hessian(rosenbrock, x), (400,)),
    "hessian_dual": (lambda x: hessian_dual(rosenbrock, x), (10,)),
    "diaghessian": (lambda x: diaghessian(rosenbrock, x)[0], (400,)),
    "diaghessian of a batch": (lambda x: diaghessian(lambda x: (layer(x) ** 2).sum(), x)[0], (100, 8)),
    "forwarddiff": (lambda x: gradient(lambda x: forwarddiff(torch.sin, x).sum(), x)[0], (10,)),
    "pushforward": (lambda x: pushforward(torch.sin, x)(x), (10,)),
}


@pytest.mark.parametrize("case", CASES)
def test_on_the_meta_device(case: str) -> None:
    derivative, shape = CASES[case]
    found = derivative(torch.empty(shape, device="meta"))
    expected = derivative(torch.randn(shape))
    assert (found.shape, found.dtype, found.device.type) == (expected.shape, expected.dtype, "meta")


@pytest.mark.parametrize("case", CASES)
def test_of_fake_tensors(case: str) -> None:
    derivative, shape = CASES[case]
    with FakeTensorMode():
        found = derivative(torch.randn(shape))
    assert found.shape == derivative(torch.randn(shape)).shape


@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
@pytest.mark.parametrize("case", CASES)
def test_recorded_by_make_fx(case: str, tracing_mode: str) -> None:
    """What was recorded gives the derivative at other points, too."""
    derivative, shape = CASES[case]
    recorded = make_fx(derivative, tracing_mode=tracing_mode)(torch.randn(shape))
    x = torch.randn(shape)
    torch.testing.assert_close(recorded(x), derivative(x), rtol=1e-4, atol=1e-4)


def test_plans_recorded_by_make_fx() -> None:
    """Which check themselves there as in any program that can't branch."""
    x, y = torch.randn(2, 30)
    square = lambda x: (products(x) ** 2).sum()
    of_products, of_square = plan_jacobian(products, x), plan_hessian(square, x)
    found = make_fx(lambda x: of_products(x, dense=True))(x)(y)
    torch.testing.assert_close(found[0], torch.func.jacrev(products)(y))
    found = make_fx(lambda x: of_square(x, dense=True))(x)(y)
    torch.testing.assert_close(found, torch.func.hessian(square)(y))
    torch.testing.assert_close(make_fx(lambda x: of_square.values(x))(x)(y), of_square.values(y))


def test_sparse_results_are_refused() -> None:
    x = torch.empty(50, device="meta")
    with pytest.raises(RuntimeError, match=r"jacobian: sparse=True finds structure by numbers.*sparse=False"):
        jacobian(products, x, sparse=True)
    with pytest.raises(RuntimeError, match="hessian: sparse=True finds structure by numbers"):
        hessian(rosenbrock, x, sparse=True)


@pytest.mark.parametrize("make", [plan_jacobian, plan_hessian])
def test_a_plan_of_tensors_on_the_meta_device_gives_its_sparsity_alone(make: Any) -> None:
    """It serves others; what it is called with must have numbers."""
    f = (lambda x: x**3) if make is plan_jacobian else (lambda x: (x**3).sum())
    x = torch.arange(1.0, 5)
    plan = make(f, torch.empty(4, device="meta"))
    with pytest.raises(RuntimeError, match="expected arguments with numbers, got tensors on the meta"):
        plan(torch.empty(4, device="meta"))
    (expected,) = jacobian(f, x) if make is plan_jacobian else (hessian(f, x),)
    found = make(f, x, sparsity=plan.sparsity)(x)
    matrix = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(matrix.to_dense(), expected)
