"""hook of structures that are constant in part: the identity in forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import forwarddiff, gradient, hessian_dual, hook, jacobian, pushforward, showgrad

func = torch.func

CONSTANT = torch.tensor([2.0, -3.0, 0.5], dtype=torch.float64)
EXAMPLES = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)


def hooked(x: Tensor) -> Tensor:
    d = hook(lambda g: None, {"a": x, "b": CONSTANT, "c": (CONSTANT * 2, 3)})
    return d["a"] ** 3 * d["b"] + d["c"][0]


def plain(x: Tensor) -> Tensor:
    return x**3 * CONSTANT + CONSTANT * 2


def over_examples(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: func.vmap(lambda row: f(row * x))(EXAMPLES).sum(0)


Way = Callable[[Callable[[Tensor], Tensor], Tensor], Any]

WAYS: dict[str, Way] = {
    "jvp": lambda f, x: func.jvp(f, (x,), (x,))[1],
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "jacfwd of jacfwd": lambda f, x: func.jacfwd(func.jacfwd(f))(x),
    "jacfwd three times": lambda f, x: func.jacfwd(func.jacfwd(func.jacfwd(f)))(x),
    "jacfwd of grad": lambda f, x: func.jacfwd(func.grad(lambda x: f(x).sum()))(x),
    "jacfwd of jacfwd of grad": lambda f, x: func.jacfwd(func.jacfwd(func.grad(lambda x: f(x).sum())))(x),
    "jacrev of jacfwd": lambda f, x: func.jacrev(func.jacfwd(f))(x),
    "vmap of jacfwd of jacfwd": lambda f, x: func.vmap(func.jacfwd(func.jacfwd(f)))(EXAMPLES),
    "pushforward": lambda f, x: pushforward(f, x)(x),
    "pushforward twice": lambda f, x: pushforward(lambda x: pushforward(f, x)(CONSTANT), x)(x),
    "jacobian forward": lambda f, x: jacobian(f, x, mode="forward")[0],
    "hessian_dual": lambda f, x: hessian_dual(lambda x: f(x).sum(), x),
    "forwarddiff": lambda f, x: gradient(lambda x: forwarddiff(lambda x: f(x).sum(), x), x)[0],
    "hessian_dual of forwarddiff": lambda f, x: hessian_dual(
        lambda x: forwarddiff(lambda x: f(x).sum(), x), x
    ),
}


@pytest.mark.parametrize("batched", [False, True], ids=["", "vmap inside"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_leaves_without_a_tangent_are_constants(way: Way, batched: bool, x: Tensor) -> None:
    f, reference = (over_examples(hooked), over_examples(plain)) if batched else (hooked, plain)
    torch.testing.assert_close(way(f, x), way(reference, x))


def test_showgrad_is_the_identity_too(x: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    torch.testing.assert_close(
        func.jacfwd(lambda x: showgrad((x, CONSTANT))[0] * 2)(x), 2 * torch.eye(3, dtype=x.dtype)
    )
    assert capsys.readouterr().out == ""


def test_leaves_may_depend_on_different_levels(x: Tensor) -> None:
    def product(a: Tensor, b: Tensor) -> Tensor:
        a, b = hook(lambda g: None, [a, b])
        return (a**3 * b**2).sum()

    def mixed(outer: Any, inner: Any) -> Tensor:
        found: Tensor = outer(lambda a: inner(lambda b: product(a, b))(x))(CONSTANT)
        return found

    expected = torch.diag(6 * CONSTANT**2 * x)
    torch.testing.assert_close(mixed(func.jacfwd, func.jacfwd), expected)
    torch.testing.assert_close(mixed(func.jacfwd, func.grad), expected)
    torch.testing.assert_close(mixed(func.jacrev, func.jacfwd), expected)
