"""Nested tensors inside f: sizes that nobody can be asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchzygote import (
    Params,
    diaghessian,
    gradient,
    hessian,
    hessian_reverse,
    jacobian,
    plan_jacobian,
    pullback,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:rows are computed one at a time"),  # they have no batching rules
]
OFFSETS = torch.tensor([0, 1, 3])


def as_jagged(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(x**3, OFFSETS)


def jagged(x: Tensor) -> Tensor:
    return as_jagged(x).sin().values()


def padded(x: Tensor) -> Tensor:
    return torch.nested.to_padded_tensor(torch.nested.as_nested_tensor([x[0] ** 2, x[1, :2]]), 0.0)


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([[0.3, -1.0, 0.5], [1.2, 0.1, -0.4], [0.7, 0.9, -0.8]], dtype=torch.float64)


@pytest.mark.parametrize("mode", ["auto", "reverse"])
@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("f", [jagged, padded])
def test_jacobians(f: Callable[[Tensor], Tensor], chunk_size: int | None, mode: str, x: Tensor) -> None:
    expected = torch.autograd.functional.jacobian(f, x).reshape(-1, 9)
    torch.testing.assert_close(jacobian(f, x, mode=mode, chunk_size=chunk_size)[0], expected)
    torch.testing.assert_close(jacobian(f, x, sparse=True)[0].to_dense(), expected)
    torch.testing.assert_close(plan_jacobian(f, x)(x, dense=True)[0], expected)
    y, back = pullback(f, x)
    torch.testing.assert_close(back(torch.ones_like(y))[0].reshape(-1), expected.sum(0))


def test_hessians(x: Tensor) -> None:
    f = lambda z: padded(z).pow(2).sum()
    expected = torch.autograd.functional.hessian(f, x).reshape(9, 9)
    torch.testing.assert_close(hessian(f, x), expected)
    torch.testing.assert_close(hessian_reverse(f, x), expected)
    torch.testing.assert_close(hessian(f, x, sparse=True).to_dense(), expected)
    torch.testing.assert_close(diaghessian(f, x)[0].reshape(-1), expected.diag())
    torch.testing.assert_close(jacobian(lambda z: gradient(f, z)[0], x)[0], expected)


def test_layers(x: Tensor) -> None:
    w = x.T.clone()
    f = lambda w: F.linear(as_jagged(x), w).values().pow(2).sum()
    expected = torch.autograd.functional.hessian(f, w).reshape(9, 9)
    torch.testing.assert_close(diaghessian(f, w)[0].reshape(-1), expected.diag())
    given = torch.nested.nested_tensor([x[:2], x])
    padded_linear = lambda w: torch.nested.to_padded_tensor(F.linear(given, w), 0.0)
    found = jacobian(lambda: padded_linear(w), Params([w]))[w]
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(padded_linear, w).reshape(-1, 9))
    torch.testing.assert_close(
        gradient(lambda w: padded_linear(w).sum(), w, create_graph=True)[0].detach(),
        found.sum(0).reshape(3, 3),
    )


def test_a_nested_result_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"got a nested tensor; return its values\(\)"):
        jacobian(as_jagged, x)


def test_a_nested_parameter_has_its_gradient() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 3), 2 * torch.ones(1, 3)])
    found = gradient(lambda: (torch.nested.to_padded_tensor(nested, 0.0) ** 2).sum(), Params([nested]))[
        nested
    ]
    for part, x in zip(found.unbind(), nested.unbind(), strict=True):
        torch.testing.assert_close(part, 2 * x)
