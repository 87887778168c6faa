"""Structures of well-known functions, recurrences and derivatives within f are found as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detection import detect_hessian, detect_jacobian
from oracles import true_hessian, true_jacobian
from sparse_cases import brusselator, rosenbrock
from torch import Tensor, nn

from torchzygote import hessian_sparsity, jacobian_sparsity


def arrowhead(x: Tensor) -> Tensor:
    return (x[0] * x[1:]).sum() + (x**3).sum()


def powell(x: Tensor) -> Tensor:
    a, b, c, d = x.view(-1, 4).unbind(1)
    return ((a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4).sum()


def broyden(x: Tensor) -> Tensor:
    padded = F.pad(x, (1, 1))
    return ((3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1).square().sum()


def burgers(u: Tensor) -> Tensor:
    """Upwind differences: what is read depends on the sign, what may be read doesn't."""
    left, right = u - u.roll(1), u.roll(-1) - u
    return -u * torch.where(u > 0, left, right) + 0.1 * (right - left)


def minimal_surface(x: Tensor) -> Tensor:
    z = x.view(5, 5)
    across, down = z[:-1, :-1] - z[1:, 1:], z[:-1, 1:] - z[1:, :-1]
    return torch.sqrt(1 + across**2 + down**2).sum()


@pytest.mark.parametrize(
    ("f", "n"),
    [
        (rosenbrock, 12),
        (arrowhead, 6),
        (powell, 8),
        (broyden, 9),
        (minimal_surface, 25),
        (lambda x: brusselator(3)(x).square().sum(), 18),
        (lambda x: torch.logsumexp(x[:3], 0) + x[3:].prod(), 6),
        (lambda x: sum(x[i] * x[i + 2] for i in range(4)), 6),
    ],
)
def test_hessians_of_well_known_functions_are_found_exactly(f: Any, n: int) -> None:
    x = torch.rand(n, dtype=torch.float64) + 0.2
    (pattern,) = detect_hessian(f, [x])
    assert torch.equal(pattern.to_dense(), true_hessian(f, x))
    assert not pattern.is_local
    assert pattern.unknown == ()


@pytest.mark.parametrize(
    "f", [brusselator(5), lambda x: x.view(5, 10) @ torch.ones(10).double(), torch.cumsum]
)
def test_jacobians_are_found_exactly(f: Any) -> None:
    g = (lambda x: torch.cumsum(x, 0)) if f is torch.cumsum else f
    x = torch.rand(50, dtype=torch.float64) + 0.2
    (pattern,) = detect_jacobian(g, [x])
    assert torch.equal(pattern.to_dense(), true_jacobian(g, x))


def test_a_computed_condition_lists_both_branches() -> None:
    x = torch.rand(6, dtype=torch.float64) - 0.5
    (pattern,) = detect_jacobian(burgers, [x])
    expected = sum(torch.eye(6).roll(k, 1) for k in (-1, 0, 1)) > 0
    assert torch.equal(pattern.to_dense(), expected)
    assert not pattern.is_local


def test_points_through_a_network_couple_only_within_each_point() -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 1)).double()
    x = torch.rand(7, 2, dtype=torch.float64)
    (pattern,) = detect_hessian(lambda x: net(x).sum(), [x])
    assert torch.equal(pattern.to_dense(), torch.block_diag(*[torch.ones(2, 2)] * 7) > 0)


def test_second_derivatives_inside_f_are_followed() -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def residual(x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad[:, 0].sum(), x, create_graph=True)
        return second[:, 0] - grad[:, 1] ** 2

    x = torch.rand(4, 2, dtype=torch.float64)
    (pattern,) = detect_jacobian(residual, [x])
    assert torch.equal(pattern.to_dense(), torch.block_diag(*[torch.ones(1, 2)] * 4) > 0)
    assert pattern.unknown == ()


def test_a_recurrence_in_python_is_followed() -> None:
    def f(x: Tensor) -> Tensor:
        state, out = x[0], []
        for k in range(1, 6):
            state = torch.sin(state) * 0.9 + x[k] if k % 2 else x[k] ** 2
            out.append(state)
        return torch.stack(out)

    x = torch.rand(6, dtype=torch.float64)
    (pattern,) = detect_jacobian(f, [x])
    assert torch.equal(pattern.to_dense(), true_jacobian(f, x))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.as_strided_copy(torch.tanh(x[4:]), (2,), (1,), 1),
        lambda x: torch.as_strided_copy(x[4:], (2,), (1,), 1),
        lambda x: torch.as_strided_scatter(torch.tanh(x[4:]), x[:2].sin(), (2,), (1,)),
        lambda x: torch.as_strided_scatter(torch.tanh(x[2:6] * 2).flip(0)[1:].exp(), x[:2].sin(), (2,), (1,)),
    ],
)
def test_operators_that_reach_behind_their_argument_count_as_dense(f) -> None:
    x = torch.rand(8, dtype=torch.float64)
    assert jacobian_sparsity(f, x)[0].to_dense().all()
    assert hessian_sparsity(lambda x: f(x).prod(), x).to_dense().all()
