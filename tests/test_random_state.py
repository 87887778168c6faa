"""Finding structure runs a random function, and leaves the generators as one plain call would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchzygote import (
    diaghessian,
    hessian,
    hessian_sparsity,
    jacobian,
    jacobian_sparsity,
    plan_hessian,
    plan_jacobian,
    withhessian,
)


@pytest.mark.parametrize("find", [jacobian_sparsity, plan_jacobian, hessian_sparsity, plan_hessian])
def test_random_numbers_go_on_as_after_one_plain_call(find: Callable[..., Any]) -> None:
    def f(x: Tensor) -> Tensor:
        return (x * torch.rand(4) + F.dropout(x**2)).sum()

    x = torch.rand(4)
    torch.manual_seed(0)
    f(x)
    expected = torch.rand(3)
    torch.manual_seed(0)
    find(f, x)
    assert torch.equal(torch.rand(3), expected)


# A draw that decides which entries there are: what finds them has to draw the same.


def shuffled(x: Tensor) -> Tensor:
    found: Tensor = (x**3)[torch.randperm(len(x))]
    return found


def chosen(x: Tensor) -> Tensor:
    found: Tensor = x[torch.rand(len(x)) > 0.5] ** 3
    return found


@pytest.mark.parametrize("f", [shuffled, chosen])
@pytest.mark.parametrize("seed", range(4))
def test_structure_is_that_of_the_draw_that_gave_the_value(f: Callable[[Tensor], Tensor], seed: int) -> None:
    x = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    torch.manual_seed(seed)
    y = f(x)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    found = jacobian(f, x, sparse=True)[0]
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(seed)
    torch.testing.assert_close(found.to_dense(), torch.func.jacrev(f)(x))
    assert found._nnz() == len(y)


@pytest.mark.parametrize("seed", range(4))
def test_so_is_that_of_hessians_and_their_diagonals(seed: int) -> None:
    def energy(x: Tensor) -> Tensor:
        return (shuffled(x) * x).sum()

    x = torch.linspace(0.5, 1.5, 400, dtype=torch.float64)
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    expected = torch.func.hessian(lambda x: ((x**3)[order] * x).sum())(x)
    torch.manual_seed(seed)
    found = hessian(energy, x, sparse=True)
    torch.testing.assert_close(found.to_dense(), expected)
    assert found._nnz() <= 3 * len(x)
    torch.manual_seed(seed)
    torch.testing.assert_close(diaghessian(energy, x)[0], expected.diagonal())


@pytest.mark.parametrize("shape", [(4, 4), (5, 4), (30, 4)])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_pushed_hessians_are_of_the_same_draw_as_value_and_gradient(
    shape: tuple[int, int], chunk_size: int | None
) -> None:
    """In ``torch.func``, dropout of what isn't contiguous fills its mask in another order."""
    f = lambda x: (F.dropout(x.t(), 0.5) ** 2).sum()
    x = torch.ones(shape)
    torch.manual_seed(5)
    value, grad, hess = withhessian(f, x, mode="forward_over_reverse", chunk_size=chunk_size)
    torch.testing.assert_close(hess @ x.reshape(-1), grad.reshape(-1))
    torch.testing.assert_close(grad.reshape(-1) @ x.reshape(-1), 2 * value)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    f(x)
    assert torch.equal(after, torch.get_rng_state())
