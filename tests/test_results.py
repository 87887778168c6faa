"""Results belong to the caller: each has memory of its own, also where ``vmap`` batches chunks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch.utils import _pytree as pytree

from torchzygote import (
    Params,
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    jacobian,
    pullback,
    pushforward,
    withgradient,
    withhessian,
    withjacobian,
)


@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
def test_jacobians_share_no_memory(mode: str) -> None:
    a, b = torch.ones(2), torch.ones(2)
    first, second = jacobian(lambda a, b: a + b, a, b, mode=mode)
    first.zero_()
    assert torch.equal(second, torch.eye(2))
    J = jacobian(lambda: a + b, Params([a, b]), mode=mode)
    J *= 2
    assert torch.equal(J[a], 2 * torch.eye(2))
    assert torch.equal(J[b], 2 * torch.eye(2))


def test_gradients_and_diagonals_share_no_memory() -> None:
    a, b = torch.ones(2), torch.ones(2)
    for results in (
        gradient(lambda a, b: (a + b).sum(), a, b),
        diaghessian(lambda a, b: ((a + b) ** 2).sum(), a, b),
        jacobian(lambda a, b: (a + b).sum(), a, b),
    ):
        kept = results[1].clone()
        results[0].zero_()
        assert torch.equal(results[1], kept)


def test_a_gradient_beside_a_hessian_can_be_written_into() -> None:
    found = withhessian(lambda x: x.sum(), torch.ones(3))
    found.grad[0] = 5
    assert found.grad.tolist() == [5, 1, 1]


def f(x: Tensor) -> Tensor:
    return x.sin() * x.roll(1) * x.sum()


def total(x: Tensor) -> Tensor:
    return f(x).sum()


CHUNKED: dict[str, tuple[Callable[..., Any], Callable[[Tensor], Tensor]]] = {
    "reverse": (lambda x, n: jacobian(f, x, mode="reverse", chunk_size=n)[0], func.jacrev(f)),
    "forward": (lambda x, n: jacobian(f, x, mode="forward", chunk_size=n)[0], func.jacrev(f)),
    "hessian": (lambda x, n: hessian(total, x, chunk_size=n), func.hessian(total)),
    "hessian_dual": (lambda x, n: hessian_dual(total, x, chunk_size=n), func.hessian(total)),
    "hessian_reverse": (lambda x, n: hessian_reverse(total, x, chunk_size=n), func.hessian(total)),
    "diaghessian": (
        lambda x, n: diaghessian(total, x, chunk_size=n)[0],
        lambda x: func.hessian(total)(x).diagonal(),
    ),
}


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("way", CHUNKED)
def test_chunks_under_vmap(way: str, chunk_size: int) -> None:
    derivative, expected = CHUNKED[way]
    rows = torch.rand(4, 3, dtype=torch.float64)
    found = func.vmap(lambda x: derivative(x, chunk_size))(rows)
    torch.testing.assert_close(found, torch.stack([expected(x) for x in rows]))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_chunks_by_what_vmap_does_not_batch(mode: str) -> None:
    rows, x = torch.rand(4, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    found = func.vmap(lambda r: jacobian(lambda x: f(x) * r, x, mode=mode, chunk_size=2)[0])(rows)
    expected = torch.stack([func.jacrev(lambda x, r=r: f(x) * r)(x) for r in rows])
    torch.testing.assert_close(found, expected)


NO_GRAD: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient": lambda x: gradient(total, x, create_graph=True)[0],
    "reverse": lambda x: jacobian(f, x, mode="reverse", create_graph=True)[0],
    "forward": lambda x: jacobian(f, x, mode="forward", create_graph=True)[0],
    "hessian": lambda x: hessian(total, x, create_graph=True),
    "hessian_dual": lambda x: hessian_dual(total, x, create_graph=True),
    "diaghessian": lambda x: diaghessian(total, x, create_graph=True)[0],
}


@pytest.mark.parametrize("way", NO_GRAD)
def test_a_graph_that_is_asked_for_under_no_grad(way: str) -> None:
    x = torch.rand(3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        found = NO_GRAD[way](x)
    expected = NO_GRAD[way](x)
    torch.testing.assert_close(found, expected)
    further = [torch.autograd.grad((y**2).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*further)


@pytest.mark.parametrize(
    "way",
    [
        lambda f, x: pullback(f, x)[0],
        lambda f, x: pullback(f, x)[1](torch.ones_like(x))[0],
        lambda f, x: pushforward(f, x)(x),
        lambda f, x: tuple(withgradient(lambda x: f(x).sum(), x)),
        lambda f, x: tuple(withjacobian(f, x)),
        lambda f, x: tuple(withhessian(lambda x: f(x).sum(), x)),
        lambda f, x: diaghessian(lambda x: f(x).sum(), x),
        lambda f, x: hessian_dual(lambda x: f(x).sum(), x),
    ],
)
def test_under_vmap_alone_nothing_keeps_the_graph_of_what_f_closes_over(way: Callable[..., Any]) -> None:
    w = torch.randn(3, requires_grad=True)
    found = func.vmap(lambda x: way(lambda x: (x * w).sin(), x))(torch.randn(4, 3))
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(found))


@pytest.mark.parametrize("structured", [False, True], ids=["", "in a structure"])
def test_a_push_leaves_the_tangent_alone(structured: bool) -> None:
    def writes(a: Tensor) -> Tensor:
        return a.mul_(3)

    def inside(d: dict[str, Tensor]) -> Tensor:
        return writes(d["a"])

    x, xdot = torch.tensor([1.0, 2.0]), torch.ones(2)
    push = pushforward(inside, {"a": x}) if structured else pushforward(writes, x)
    for _ in range(2):
        torch.testing.assert_close(push({"a": xdot} if structured else xdot), torch.full((2,), 3.0))
    assert torch.equal(xdot, torch.ones(2))
    assert torch.equal(x, torch.tensor([1.0, 2.0]))


def test_what_a_push_gives_is_no_view_of_the_tangent() -> None:
    xdot = torch.ones(2)
    pushforward(lambda a: a[:1], torch.tensor([1.0, 2.0]))(xdot).zero_()
    assert torch.equal(xdot, torch.ones(2))
