"""Large constants in products of batches: their zeros are looked at where that pays, and missed nowhere."""

from __future__ import annotations

import torch
from detection import detect_hessian, detect_jacobian
from torch import nn

from torchzygote import plan_jacobian

N = 120
STENCIL = torch.eye(N).roll(1, 0) - 2 * torch.eye(N) + torch.eye(N).roll(-1, 0)


def test_a_stencil_along_one_axis_takes_three_products() -> None:
    u = torch.rand(40, N)
    for f in (
        lambda u: torch.einsum("ij,bj->bi", STENCIL, u) - u**3,
        lambda u: (STENCIL @ u[..., None])[..., 0] - u**3,
        lambda u: (u[:, None] @ STENCIL)[:, 0] - u**3,
    ):
        plan = plan_jacobian(f, u)
        assert plan.patterns[0].nnz == 3 * u.numel()
        assert plan.ncolors == 3
        (second,) = detect_hessian(lambda u, f=f: f(u).square().sum(), [u])
        assert second.nnz == 5 * u.numel()


def test_a_large_constant_that_is_half_full_counts_as_full() -> None:
    """One set for each right side, where a set for each entry would take hundreds of times the members."""
    half = torch.ones(400, 400).tril()
    sums = lambda x: (half @ x).sum(1)
    (found,) = detect_jacobian(sums, [torch.rand(2, 400, 20)], budget=2 * 400 * 20 * 10)
    assert found.nnz == 2 * 400 * 20
    assert not found.dense


def test_over_budget_counts_as_full() -> None:
    x = torch.rand(3, N, 4)
    twice = lambda x: (STENCIL @ x.cumsum(1)).sum(1)
    (found,) = detect_jacobian(twice, [x], budget=3 * N * 4 * (N // 2 + 10))
    (exact,) = detect_jacobian(twice, [x])
    assert not (exact.to_dense() & ~found.to_dense()).any()


def test_zeros_that_may_go_away_are_not_taken_for_structure() -> None:
    x = torch.rand(2, 3, 2)
    weights = nn.Parameter(torch.zeros(2, 3, 3))
    assert detect_jacobian(lambda x: weights @ x, [x])[0].nnz == 36
    assert detect_jacobian(lambda x: weights[0] @ x, [x])[0].nnz == 36
    random = lambda x: torch.bernoulli(torch.full((2, 3, 3), 0.01)) @ x
    assert detect_jacobian(random, [x])[0].nnz == 36
    computed = lambda x: (x.detach()[:, :, :1] > 2).to(x.dtype).expand(2, 3, 3) @ x
    assert detect_jacobian(computed, [x])[0].nnz == 36
    given = plan_jacobian(lambda x, m: m @ x, x, torch.zeros(3, 3), argnums=0)
    assert given.patterns[0].nnz == 36
    plain = weights.detach().clone()
    assert detect_jacobian(lambda x: plain @ x, [x])[0].nnz == 0
