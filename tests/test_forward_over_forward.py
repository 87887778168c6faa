"""Custom functions with a jvp of their own, pushed forward once and twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import (
    checkpointed,
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hook,
    jacobian,
    pushforward,
)


class TwiceSine(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin() * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos() * 2

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t * ctx.saved_tensors[0].cos() * 2


X = torch.tensor([0.3, 0.9], dtype=torch.float64)
Function = Callable[[Tensor], Tensor]


def f(x: Tensor) -> Tensor:
    return TwiceSine.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def pushed(f: Function, v: Tensor) -> Any:
    return pushforward(f, v)(torch.ones_like(v))


REFUSED: dict[str, Callable[[Function], Any]] = {
    "pushforward twice": lambda f: pushed(lambda v: pushed(f, v), X),
    "pushforward of jacobian": lambda f: pushed(lambda v: jacobian(f, v, mode="forward")[0].sum(1), X),
    "pushforward of forwarddiff": lambda f: pushed(lambda v: forwarddiff(f, v), X),
    "hessian_dual of forwarddiff": lambda f: hessian_dual(lambda v: forwarddiff(f, v).sum(), X),
    "forwarddiff of pushforward": lambda f: gradient(
        lambda v: forwarddiff(lambda u: pushed(f, u), v).sum(), X
    ),
    "by the tangent": lambda f: pushed(lambda v: pushforward(f, X)(v * v), X),
    "inside jvp": lambda f: torch.func.jvp(lambda v: pushed(f, v), (X,), (X,)),
}
RIGHT: dict[str, Callable[[Function], Tensor]] = {
    "pushforward of a gradient": lambda f: pushed(lambda v: gradient(lambda u: f(u).sum(), v)[0], X),
    "gradient of pushforward": lambda f: gradient(lambda v: pushed(f, v).sum(), X)[0],
    "jacobian of pushforward": lambda f: jacobian(lambda v: pushed(f, v), X)[0].diagonal(),
    "hessian of forwarddiff": lambda f: hessian(lambda v: forwarddiff(f, v).sum(), X).diagonal(),
    "diaghessian": lambda f: diaghessian(lambda v: forwarddiff(f, v).sum(), X)[0],
}
SECOND = -2 * X.sin()


@pytest.mark.parametrize("name", REFUSED)
def test_custom_functions_are_not_pushed_forward_twice(name: str) -> None:
    with pytest.raises(RuntimeError, match="TwiceSine can't be pushed forward twice"):
        REFUSED[name](f)
    assert pushed(f, X).shape == X.shape


@pytest.mark.parametrize("name", RIGHT)
def test_they_are_pushed_forward_once(name: str) -> None:
    torch.testing.assert_close(RIGHT[name](f), SECOND)


def test_of_one_level_alone_they_are_pushed_forward_inside_another() -> None:
    def inner(v: Tensor) -> Any:
        return pushed(lambda u: f(u) * v, X)

    torch.testing.assert_close(pushed(inner, X), 2 * X.cos())
    torch.testing.assert_close(pushed(lambda v: f(v) * pushed(torch.sin, X), X), 2 * X.cos() * X.cos())


def sine(v: Tensor) -> Tensor:
    return v.sin() * 2


# One level pushes the function, another one, around or inside, batches.
BATCHED: dict[str, Callable[[Function], Tensor]] = {
    "jacfwd": lambda f: torch.func.jacfwd(lambda z: pushforward(lambda u: u * f(z), X)(z))(X),  # type: ignore[no-any-return]
    "jacobian by columns": lambda f: torch.func.vmap(  # type: ignore[no-any-return]
        lambda q: jacobian(lambda z: z * pushforward(f, q)(q), X, mode="forward")[0]
    )(torch.stack([X, X + 1, X + 2])),
    "jacobian of forwarddiff": lambda f: torch.func.vmap(  # type: ignore[no-any-return]
        lambda q: jacobian(lambda z: z * forwarddiff(f, q), X, mode="forward")[0]
    )(torch.stack([X, X + 1, X + 2])),
    "hessian_dual": lambda f: torch.func.vmap(  # type: ignore[no-any-return]
        lambda q: hessian_dual(lambda z: (z * pushforward(f, q)(q) * z).sum(), X)
    )(X[:, None].expand(2, 2)),
}


@pytest.mark.parametrize("name", BATCHED)
def test_they_are_pushed_forward_once_in_batches(name: str) -> None:
    torch.testing.assert_close(BATCHED[name](f), BATCHED[name](sine))


def test_in_batches_they_are_not_pushed_forward_twice() -> None:
    with pytest.raises(RuntimeError, match="TwiceSine can't be pushed forward twice"):
        torch.func.jacfwd(lambda z: forwarddiff(f, z))(X)


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "by the tangent"])
@pytest.mark.parametrize(
    "inside",
    [
        lambda x: hook(torch.neg, x),
        lambda x: checkpointed(lambda u: u, x),
        lambda x: forwarddiff(torch.sin, x),
    ],
)
def test_those_of_this_package_are(name: str, inside: Function) -> None:
    REFUSED[name](lambda v: inside(v).sin())


def test_forwarddiff_is_pushed_forward_twice() -> None:
    found = pushed(lambda v: pushed(lambda u: forwarddiff(torch.sin, u), v), X)
    torch.testing.assert_close(found, -X.sin())
