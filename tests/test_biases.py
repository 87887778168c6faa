"""Second derivatives by the bias of a normalization that has no weight, where PyTorch's own are zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchzygote import (
    Params,
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    jacobian,
    plan_hessian,
    withgradient,
)

DOUBLE = torch.float64
ROWS = torch.linspace(-2, 3, 60, dtype=DOUBLE).sin().reshape(5, 4, 3)
ZEROS, ONES = torch.zeros(4, dtype=DOUBLE), torch.ones(4, dtype=DOUBLE)
Norm = Callable[[Tensor, "Tensor | None", Tensor], Tensor]

NORMS: dict[str, Norm] = {
    "layer_norm": lambda x, w, b: F.layer_norm(x.transpose(1, 2), (4,), w, b),
    "layer_norm of one row": lambda x, w, b: F.layer_norm(x[0, :, 0], (4,), w, b),
    "layer_norm of two axes": lambda x, w, b: F.layer_norm(
        x[:, :2, :2], (2, 2), None if w is None else w.view(2, 2), b.view(2, 2)
    ),
    "batch_norm of two axes": lambda x, w, b: F.batch_norm(x[..., 0], None, None, w, b, training=True),
    "batch_norm": lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    "batch_norm in evaluation": lambda x, w, b: F.batch_norm(x, ZEROS, ONES, w, b),
    "instance_norm": lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
}


@pytest.fixture(params=NORMS)
def norm(request: pytest.FixtureRequest) -> Norm:
    return NORMS[request.param]


@pytest.fixture
def b() -> Tensor:
    return torch.tensor([0.1, -0.2, 0.3, 0.4], dtype=DOUBLE)


def losses(norm: Norm) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Of the bias; the second has a weight of ones, and right derivatives in PyTorch."""
    of = lambda w: lambda b: norm(ROWS, w, b).tanh().pow(3).sum() + norm(ROWS, w, b).sum() ** 2
    return of(None), of(ONES)


WAYS: dict[str, Callable[..., Any]] = {
    "hessian": hessian,
    "hessian_reverse": hessian_reverse,
    "hessian_dual": hessian_dual,
    "jacobian of gradient": lambda f, b: jacobian(lambda b: gradient(f, b)[0], b)[0],
    "jacrev of gradient": lambda f, b: torch.func.jacrev(lambda b: gradient(f, b)[0])(b),
    "jacfwd of gradient": lambda f, b: torch.func.jacfwd(lambda b: gradient(f, b)[0])(b),
    "hessian in vmap": lambda f, b: torch.func.vmap(lambda b: hessian_reverse(f, b))(b.expand(2, 4))[1],
    "plan": lambda f, b: plan_hessian(f, b)(b, dense=True),
    "gradient of plain gradient": lambda f, b: torch.autograd.functional.jacobian(
        lambda b: gradient(f, b, create_graph=True)[0], b
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives(norm: Norm, b: Tensor, way: str) -> None:
    f, weighted = losses(norm)
    expected = torch.autograd.functional.hessian(weighted, b)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(WAYS[way](f, b), expected)


def test_diagonals(norm: Norm, b: Tensor) -> None:
    f, weighted = losses(norm)
    expected = torch.autograd.functional.hessian(weighted, b).diagonal()
    torch.testing.assert_close(diaghessian(f, b)[0], expected)
    torch.testing.assert_close(diaghessian(lambda: f(b), Params([b]))[b], expected)


def test_third_derivatives(norm: Norm, b: Tensor) -> None:
    f, weighted = losses(norm)
    expected = torch.autograd.functional.jacobian(
        lambda b: torch.autograd.functional.hessian(weighted, b, create_graph=True), b
    ).reshape(16, 4)
    torch.testing.assert_close(jacobian(lambda b: hessian_reverse(f, b), b)[0], expected)


def test_mixed_derivatives(norm: Norm, b: Tensor) -> None:
    both = lambda w: lambda x, b: norm(x, w, b).tanh().pow(3).sum()
    found = jacobian(lambda x: gradient(both(None), x, b)[1], ROWS)[0]
    expected = torch.autograd.functional.hessian(both(ONES), (ROWS, b))[1][0].reshape(4, -1)
    torch.testing.assert_close(found, expected)
    found = jacobian(lambda b: gradient(both(None), ROWS, b)[0], b)[0]
    torch.testing.assert_close(found, expected.T.contiguous())


def test_first_gradients_inside_transforms_are_given(norm: Norm, b: Tensor) -> None:
    """A second derivative that nobody takes by the bias."""
    f, _ = losses(norm)
    slope = gradient(f, b)[0]
    s = torch.tensor(2.0, dtype=DOUBLE)
    torch.testing.assert_close(
        torch.func.grad(lambda s: (s**2 * gradient(f, b)[0]).sum())(s), 4 * slope.sum()
    )
    found = torch.func.jvp(lambda s: withgradient(f, b).grad[0] * s, (s,), (s,))[1]
    torch.testing.assert_close(found, 2 * slope)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_a_bias_of_another_dtype(dtype: torch.dtype, rtol: float) -> None:
    x, b = ROWS.to(dtype), torch.tensor([0.1, -0.2, 0.3, 0.4])
    f = lambda b: F.batch_norm(x, None, None, None, b, training=True).float().pow(3).sum()
    weighted = lambda b: F.batch_norm(x, None, None, torch.ones(4), b, training=True).float().pow(3).sum()
    expected = torch.autograd.functional.hessian(weighted, b)
    torch.testing.assert_close(hessian_reverse(f, b), expected, rtol=rtol, atol=1e-5)


def test_group_norm_is_refused_or_right(b: Tensor) -> None:
    """Before 2.14, PyTorch has not even the first gradient by its bias."""
    f = lambda b: F.group_norm(ROWS, 2, None, b).pow(3).sum()
    weighted = lambda b: F.group_norm(ROWS, 2, torch.ones_like(b), b).pow(3).sum()
    for way in (hessian, hessian_reverse, diaghessian, gradient):
        if torch.__version__ >= "2.14":
            torch.testing.assert_close(way(f, b), way(weighted, b))
            continue
        reason = None if way is gradient else r"group_norm's gradient by its bias.*weight=torch\.ones"
        with pytest.raises(RuntimeError, match=reason):
            way(f, b)
    of_x = lambda x: F.group_norm(x, 2, None, b).pow(3).sum()
    expected = torch.func.jacrev(torch.func.grad(of_x))(ROWS[:1]).reshape(12, 12)
    torch.testing.assert_close(hessian_reverse(of_x, ROWS[:1]), expected)
