"""Checkpointed calls in forward mode over reverse mode: what has no tangent, and what was fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzygote import (
    Params,
    checkpointed,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    jacobian,
    pushforward,
)
from torchzygote._unfused import unfused_for


def test_a_call_that_does_not_use_its_argument_has_no_second_derivative() -> None:
    linear = nn.Linear(3, 3, dtype=torch.float64)
    y = torch.randn(2, 3, dtype=torch.float64)
    x = torch.randn(2, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return checkpointed(lambda u, w: linear(w).sin(), x, y).sum()

    expected = torch.zeros(2, 2, dtype=torch.float64)
    torch.testing.assert_close(hessian_dual(f, x), expected)
    torch.testing.assert_close(hessian(f, x), expected)


def test_one_of_two_results_has_no_tangent() -> None:
    linear = nn.Linear(3, 3, dtype=torch.float64)
    y = torch.randn(2, 3, dtype=torch.float64)
    x = torch.randn(2, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        constant, square = checkpointed(lambda u, w: (linear(w).sin().sum(), u**2), x, y)
        return constant * square.sum()

    expected = 2 * linear(y).sin().sum().detach() * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(hessian_dual(f, x), expected)
    torch.testing.assert_close(pushforward(lambda x: gradient(f, x)[0], x)(x), expected @ x)


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x).sin().sum()


_mha = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
_layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True, dtype=torch.float64)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": attention,
    "module": lambda x: _mha(x, x, x, need_weights=False)[0].sin().sum(),
    "layer": lambda x: _layer(x).sin().sum(),
}
X = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WAYS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "jacobian forward": lambda f: jacobian(lambda v: gradient(f, v)[0], X, mode="forward")[0],
    "jacobian reverse": lambda f: jacobian(lambda v: gradient(f, v)[0], X, mode="reverse")[0],
    "hessian_dual": lambda f: hessian_dual(f, X),
    "jacfwd": lambda f: torch.func.jacfwd(lambda v: gradient(f, v)[0])(X).reshape(12, 12),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("way", WAYS)
def test_attention_runs_again_by_the_formula_that_it_had(name: str, way: str) -> None:
    f = LOSSES[name]
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        expected = hessian(f, X)
    got = WAYS[way](lambda v: checkpointed(f, v))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_attention_recorded_fused_runs_again_fused_inside_a_second_derivative(name: str) -> None:
    x = X.clone().requires_grad_()
    y = checkpointed(LOSSES[name], x)

    def inside(a: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(y, x, retain_graph=True)
        return (a * g).sum() ** 2

    (expected,) = torch.autograd.grad(LOSSES[name](x), x)
    got = hessian_dual(inside, torch.ones_like(X))
    torch.testing.assert_close(got, 2 * torch.outer(expected.reshape(-1), expected.reshape(-1)))


@pytest.mark.parametrize("name", ["attention", "module"])
def test_forward_mode_inside_is_unfused_though_its_first_run_was_fused(name: str) -> None:
    f = LOSSES[name]
    x = X.clone().requires_grad_()
    y = forwarddiff(f, x)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        (expected,) = jacobian(lambda v: gradient(f, v)[0] ** 2, X)

    def inside(a: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        return a * g**2

    (squares,) = jacobian(inside, torch.ones_like(X))
    torch.testing.assert_close(squares.diagonal(), gradient(f, X)[0].reshape(-1) ** 2)
    (total,) = torch.autograd.grad(inside(torch.ones_like(X)).sum(), x)
    torch.testing.assert_close(total.reshape(-1), expected.sum(0))
    assert unfused_for() == (False, 0)


W = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
INSIDE_VMAP: dict[str, Callable[[Tensor], Tensor]] = {
    "operator": lambda a: checkpointed(torch.sin, a),
    "closes over it": lambda a: checkpointed(lambda a: (a * W.sin()).exp(), a),
    "nested": lambda a: checkpointed(lambda a: a * checkpointed(lambda b: (b * W).prod(), a), a),
}


@pytest.mark.parametrize("name", INSIDE_VMAP)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_by_params_inside_vmap(name: str, chunk_size: int | None) -> None:
    f = lambda: torch.func.vmap(INSIDE_VMAP[name])(W).reshape(-1)
    forward = jacobian(f, Params([W]), mode="forward", chunk_size=chunk_size)[W]
    torch.testing.assert_close(forward, jacobian(f, Params([W]), mode="reverse")[W])
    assert forward.abs().max() > 0.5
