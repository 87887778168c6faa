"""Rows that are computed one at a time: where PyTorch batches wrongly, or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import diaghessian, hessian, hessian_reverse, jacobian, plan_hessian, plan_jacobian

MASK = torch.tensor(
    [[True, False, True, True], [False, True, True, False], [True, True, False, True], [False] * 4]
)


def values(n: int) -> Tensor:
    return torch.linspace(0.3, 1.7, n, dtype=torch.float64)


def one_at_a_time(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Rows by plain autograd, each from a run of its own."""
    rows = []
    for i in range(f(x).numel()):
        leaf = x.clone().requires_grad_()
        y = f(leaf).reshape(-1)[i]
        rows.append(torch.autograd.grad(y, leaf, create_graph=True)[0].detach())
    return torch.stack(rows)


def mixed(x: Tensor) -> Tensor:
    """By a formula of its own, what ``masked_select`` with a mask of more dimensions is made of."""
    y = x.expand(4, 4).reshape(-1)[MASK.reshape(-1)]
    return (y * y.flip(0)).sum()


def selected(x: Tensor) -> Tensor:
    y = x.masked_select(MASK)
    return (y * y.flip(0)).sum()


@pytest.mark.parametrize("chunk_size", [None, 2, 4])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_mask_of_more_dimensions_is_not_batched(chunk_size: int | None, sparse: bool) -> None:
    """The batch of rows would be taken for the mask's rows: wrong where there are as many (PyTorch 2.13)."""
    x = values(4)
    keywords: dict[str, Any] = {"mode": "reverse", "chunk_size": chunk_size, "sparse": sparse}
    with pytest.warns(UserWarning, match="one at a time.*masked_select"):
        found = jacobian(lambda x: x.masked_select(MASK), x, **keywords)[0]
    expected = torch.eye(4, dtype=torch.float64)[MASK.nonzero()[:, 1]]
    torch.testing.assert_close(found.to_dense() if sparse else found, expected)


@pytest.mark.filterwarnings("ignore:rows are computed one at a time")
@pytest.mark.parametrize(
    "way",
    [
        hessian,
        hessian_reverse,
        lambda f, x: hessian(f, x, sparse=True).to_dense(),
        lambda f, x: hessian(f, x, mode="reverse_over_reverse", sparse=True).to_dense(),
        lambda f, x: hessian(f, x, chunk_size=2),
        lambda f, x: torch.diag(diaghessian(f, x)[0]),
        lambda f, x: plan_hessian(f, x)(x).to_dense(),
    ],
)
def test_second_derivatives_by_such_a_mask(way: Callable[[Any, Tensor], Tensor]) -> None:
    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(mixed(x), x, create_graph=True)[0]

    x = values(4)
    expected = one_at_a_time(gradient, x.clone().requires_grad_())
    found = way(selected, x)
    only_diagonal = bool((found == torch.diag(found.diagonal())).all())
    torch.testing.assert_close(found, torch.diag(expected.diagonal()) if only_diagonal else expected)


@pytest.mark.parametrize("shapes", [((4, 4), (4, 4)), ((4, 4), (4,)), ((1, 4), (4, 4)), ((4, 1), (1, 4))])
def test_other_masks_are_batched(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, mask = values(16)[: torch.Size(shapes[0]).numel()].view(shapes[0]), MASK[0].expand(shapes[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rows are computed one at a time")
        found = jacobian(lambda x: x.masked_select(mask), x, mode="reverse")[0]
    torch.testing.assert_close(found, one_at_a_time(lambda x: x.masked_select(mask), x).flatten(1))


def real_parts(x: Tensor) -> Tensor:
    z = torch.view_as_complex(x[: x.numel() // 2 * 2].view(-1, 2))
    return torch.cat([torch.view_as_real(z * z).reshape(-1), x])


@pytest.mark.filterwarnings("ignore:rows are computed one at a time")
@pytest.mark.parametrize("numel", [6, 7])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_row_that_is_viewed_as_complex_numbers(numel: int, chunk_size: int | None, sparse: bool) -> None:
    """Its memory must begin at an even place; a row of a matrix with odd rows doesn't."""
    x = values(numel)
    for mode in ("reverse", "forward"):
        (found,) = jacobian(real_parts, x, mode=mode, chunk_size=chunk_size, sparse=sparse)
        found = found.to_dense() if sparse else found
        torch.testing.assert_close(found, one_at_a_time(real_parts, x))


@pytest.mark.filterwarnings("ignore:rows are computed one at a time")
def test_second_derivatives_through_such_a_view() -> None:
    def gradient(x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()
        return torch.autograd.grad((real_parts(x) ** 2).sum(), x, create_graph=True)[0]

    x = values(7)
    found = hessian_reverse(lambda x: (real_parts(x) ** 2).sum(), x)
    torch.testing.assert_close(found, one_at_a_time(gradient, x.clone()))
    (plan,) = plan_jacobian(real_parts, x, mode="reverse")(x)
    torch.testing.assert_close(plan.to_dense(), one_at_a_time(real_parts, x.clone()))
