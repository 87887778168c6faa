"""Which structure hangs on values, and says so, and which values are not taken for structure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detection import detect_hessian, detect_jacobian
from oracles import func_jacobian, true_jacobian
from torch import nn

from torchzygote import hessian_sparsity, jacobian_sparsity, plan_jacobian


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * 2 if x[0] > 0 else x.sum(),
        lambda x: x * x[0].item(),
        lambda x: x[x > 0],
        lambda x: x[x.argmax()],
        lambda x: x.sort().values,
        lambda x: x.max(),
        lambda x: x[: int(x.sum().abs()) + 1],
        lambda x: x.index_select(0, (x > 0.5).nonzero()[:, 0]),
        lambda x: x.gather(0, x.detach().argsort()),
        lambda x: x[x.argsort().tolist()] * x,
        lambda x: x * x[x.tolist().index(max(x.tolist()))],
        lambda x: x[torch.from_numpy(x.detach().numpy().argsort())],
        lambda x: x[np.asarray(x.detach() * 2).argsort().tolist()],
        lambda x: x[np.from_dlpack(x.detach()).argsort().tolist()],
    ],
)
def test_structure_that_hangs_on_values_says_so(f: Any) -> None:
    x = torch.tensor([0.7, 0.2, 0.9], dtype=torch.float64)
    (pattern,) = detect_jacobian(f, [x])
    assert pattern.is_local
    assert torch.equal(pattern.to_dense(), true_jacobian(f, x))
    assert jacobian_sparsity(f, x)[0].is_local


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x[torch.tensor([2, 0])],
        lambda x: torch.relu(x).abs(),
        lambda x: torch.where(x > 0.5, x, -x),
        lambda x: x * (x > 0.5),
        lambda x: x[:2] if x.shape[0] > 2 else x,
        lambda x: x[torch.tensor([True, False, True])],
        lambda x: x * torch.randn(1).item(),
        lambda x: F.max_pool1d(x[None], 2),
        lambda x: x[torch.arange(3).flip(0).tolist()],
        lambda x: x * torch.from_numpy(torch.ones(3).numpy()),
    ],
)
def test_structure_that_does_not_says_so_too(f: Any) -> None:
    x = torch.tensor([0.7, 0.2, 0.9], dtype=torch.float64)
    assert not detect_jacobian(f, [x])[0].is_local


def test_values_of_a_random_mask_are_not_taken_for_structure() -> None:
    (pattern,) = detect_jacobian(lambda x: F.dropout(x, 0.9), [torch.rand(50)])
    assert pattern.nnz == 50


def test_exponents_are_looked_at_where_they_are_the_same_in_every_call() -> None:
    order = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    c = torch.tensor([0.0, -0.5, float("nan")], dtype=torch.float64)
    rate = lambda c: (c**order).prod(1)
    assert torch.equal(jacobian_sparsity(rate, c)[0].to_dense(), order != 0)
    plan = plan_jacobian(rate, c)
    for point in (c, torch.rand(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)):
        (found,) = plan(point)
        torch.testing.assert_close(found.to_dense(), func_jacobian(rate, point)[0], equal_nan=True)
    assert torch.equal(hessian_sparsity(lambda c: rate(c).sum(), c).to_dense(), torch.diag(order[1] == 2))


@pytest.mark.parametrize(
    "varying",
    [
        lambda x: x ** torch.zeros(3).double().requires_grad_(),
        lambda x: x ** (x > 0.5).double(),
        lambda x: x ** x.detach().floor(),
        lambda x: x ** torch.bernoulli(torch.zeros(3).double()),
    ],
)
def test_exponents_that_may_differ_are_not_taken_for_structure(varying: Any) -> None:
    x = torch.tensor([0.7, 0.2, 0.9], dtype=torch.float64)
    assert torch.equal(detect_jacobian(varying, [x])[0].to_dense(), torch.eye(3) > 0)
    assert torch.equal(detect_hessian(lambda x: varying(x).sum(), [x])[0].to_dense(), torch.eye(3) > 0)


def test_exponents_among_the_arguments_of_a_plan_may_differ() -> None:
    x, powers = torch.rand(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    plan = plan_jacobian(lambda x, powers: x ** powers["p"], x, {"p": powers})
    (found, _) = plan(x, {"p": torch.full((3,), 2.0, dtype=torch.float64)})
    torch.testing.assert_close(found.to_dense(), torch.diag(2 * x))


def test_zeros_of_a_trainable_matrix_are_not_taken_for_structure() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    (pattern,) = detect_jacobian(layer, [torch.rand(3)])
    assert pattern.nnz == 6
    plain = layer.weight.detach().clone()
    assert detect_jacobian(lambda x: plain @ x, [torch.rand(3)])[0].nnz == 0
