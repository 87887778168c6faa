"""Derivatives that a checkpointed function takes itself: the same numbers as without the checkpoint.

Nobody keeps their graphs where only plain autograd is around, and so it must be when the function runs again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchzygote import (
    checkpointed,
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    ignore_derivatives,
    jacobian,
    pullback,
    pushforward,
    withgradient,
)

Body = Callable[[Tensor], Tensor]


def sines(x: Tensor) -> Tensor:
    return x.sin().sum()


def fourth(x: Tensor) -> Tensor:
    return (x**4).sum()


def descended(x: Tensor) -> Tensor:
    for _ in range(3):
        x = x - 0.1 * gradient(fourth, x)[0]
    return x


def pulled_back(x: Tensor) -> Tensor:
    y, back = pullback(torch.sin, x)
    return y * back(torch.ones(3))[0] * back(x)[0] * x


def recorded(x: Tensor) -> Tensor:
    with torch.enable_grad():
        inside = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(fourth(inside), inside)
    return g * x * gradient(sines, x)[0]


BODIES: dict[str, Body] = {
    "gradient, times x": lambda x: gradient(sines, x)[0] * x,
    "gradient of a gradient's value": lambda x: gradient(sines, gradient(sines, x)[0])[0] * x,
    "two gradients": lambda x: gradient(sines, x)[0] * gradient(sines, 2 * x)[0] * x.exp(),
    "withgradient and gradient": lambda x: withgradient(sines, x).val * gradient(fourth, x)[0] * x,
    "descent": descended,
    "pullback": pulled_back,
    "jacobians": lambda x: (
        jacobian(torch.sin, x, mode="reverse")[0] @ x + jacobian(torch.cos, x)[0] @ x.exp()
    ),
    "hessian": lambda x: hessian(fourth, x) @ x + hessian_reverse(sines, x) @ x.exp(),
    "diaghessian": lambda x: diaghessian(fourth, x)[0] * x * diaghessian(sines, x)[0],
    "a gradient that is kept": lambda x: gradient(fourth, x, create_graph=True)[0] * gradient(sines, x)[0],
    "a gradient of autograd's": recorded,
}
# torch.func lets no hooks on saved tensors be in force; PyTorch's checkpoint says so.
FORWARD: dict[str, Body] = {
    "hessian_dual": lambda x: hessian_dual(fourth, x) @ x,
    "pushforward": lambda x: pushforward(torch.sin, x)(torch.ones(3)) * x,
    "forwarddiff": lambda x: forwarddiff(torch.sin, x) * gradient(fourth, x)[0],
    "torch.func.grad": lambda x: torch.func.grad(fourth)(x) * x + gradient(fourth, x)[0],
}


def non_reentrant(f: Body, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(f, x, use_reentrant=False)
    return y


def reentrant(f: Body, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(f, x, use_reentrant=True)
    return y


def nested(f: Body, x: Tensor) -> Tensor:
    return checkpointed(lambda x: checkpointed(f, x) + checkpointed(sines, x), x)


WAYS: dict[str, Callable[[Body, Tensor], Tensor]] = {
    "checkpointed": checkpointed,
    "non-reentrant": non_reentrant,
    "reentrant": reentrant,
}
CASES = [(way, body) for way in WAYS for body in BODIES] + [("checkpointed", body) for body in FORWARD]


def point() -> Tensor:
    return torch.tensor([0.3, 0.5, 0.7])


def by_backward(f: Body) -> Tensor:
    x = point().requires_grad_()
    f(x).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(("way", "body"), CASES)
def test_plain_autograd_around_a_checkpoint_gets_what_it_gets_without(way: str, body: str) -> None:
    f = (BODIES | FORWARD)[body]
    torch.testing.assert_close(by_backward(lambda x: WAYS[way](f, x)), by_backward(f))


@pytest.mark.parametrize("body", {**BODIES, **FORWARD})
def test_nested_checkpoints_do_so_too(body: str) -> None:
    f = (BODIES | FORWARD)[body]
    torch.testing.assert_close(by_backward(lambda x: nested(f, x)), by_backward(lambda x: f(x) + sines(x)))


@pytest.mark.parametrize(("way", "body"), CASES)
def test_values_are_right_where_nothing_is_differentiated(way: str, body: str) -> None:
    f, x = (BODIES | FORWARD)[body], point()
    if way == "reentrant":
        x.requires_grad_()  # else it warns
    torch.testing.assert_close(WAYS[way](f, x), f(point()))


@pytest.mark.parametrize("body", {**BODIES, **FORWARD})
def test_values_are_right_beside_what_is_differentiated(body: str) -> None:
    f = (BODIES | FORWARD)[body]
    x, w = point(), torch.ones(3, requires_grad=True)
    (by_weight,) = torch.autograd.grad((w * checkpointed(f, x)).sum(), w)
    torch.testing.assert_close(by_weight, f(x))
    ignored = lambda x: (ignore_derivatives(lambda: checkpointed(f, x)) * x).sum()
    torch.testing.assert_close(gradient(ignored, x)[0], f(x))


@pytest.mark.parametrize("body", {**BODIES, **FORWARD})
def test_inside_a_derivative_all_of_it_counts(body: str) -> None:
    f = (BODIES | FORWARD)[body]
    found = gradient(lambda x: checkpointed(f, x).sum(), point())
    torch.testing.assert_close(found, gradient(lambda x: f(x).sum(), point()))


@pytest.mark.parametrize("way", WAYS)
def test_a_function_that_takes_derivatives_runs_once_more(way: str) -> None:
    runs = 0

    def f(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return descended(x) * jacobian(torch.sin, x)[0].sum(0)

    x = point().requires_grad_()
    y = WAYS[way](lambda x: f(x).exp(), x).sum()
    assert runs == 1
    y.backward()
    assert runs == 2


class Cubed(torch.autograd.Function):
    """The cube, whose backward takes a derivative itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cotangent * gradient(lambda x: (x**3).sum(), x)[0]


@pytest.mark.parametrize("way", [None, "checkpointed", "non-reentrant"])
def test_a_backward_that_takes_derivatives_can_be_differentiated(way: str | None) -> None:
    cubed: Body = Cubed.apply
    x = point().double().requires_grad_()
    f = cubed if way is None else lambda x: WAYS[way](cubed, x)
    (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first, 3 * x**2)
    torch.testing.assert_close(second, 6 * x)


class Checkpointing(torch.autograd.Function):
    """The cube, whose backward takes a derivative in a checkpoint."""

    way: Callable[[Body, Tensor], Tensor] = checkpointed

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cotangent * Checkpointing.way(lambda x: gradient(lambda x: (x**3).sum(), x)[0], x)


@pytest.mark.parametrize("around", [None, "checkpointed", "non-reentrant"])
@pytest.mark.parametrize("inside", ["checkpointed", "non-reentrant"])
def test_so_can_one_that_takes_them_in_a_checkpoint(
    inside: str, around: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpointing, "way", WAYS[inside])
    cubed: Body = Checkpointing.apply
    x = point().double().requires_grad_()
    f = cubed if around is None else lambda x: WAYS[around](cubed, x)
    (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first, 3 * x**2)
    torch.testing.assert_close(second, 6 * x)
