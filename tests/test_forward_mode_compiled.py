"""Forward mode inside compiled derivatives: views as points, and Hessians that PyTorch can't nest there."""

from __future__ import annotations

from collections.abc import Callable

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
