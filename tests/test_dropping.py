"""What ``forwarddiff`` closes over is dropped in forward mode and compiled, too, and a warning says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func

from torchzygote import DroppedGradientWarning, forwarddiff, gradient, hessian_dual, jacobian, pushforward

X, B = torch.tensor([1.0, 2.0, 3.0]), torch.tensor(2.0)


def by_b(b: Tensor) -> Tensor:
    return forwarddiff(lambda a: (a * b).sum(), X)


def by_x(x: Tensor) -> Tensor:
    return forwarddiff(lambda a: (a.square() * B).sum(), x)


DROPPED: dict[str, tuple[Callable[[Tensor], Any], float]] = {
    "pushforward": (lambda b: pushforward(by_b, b)(1.0), 0),
    "jacobian": (lambda b: jacobian(by_b, b, mode="forward")[0], 0),
    "jvp": (lambda b: func.jvp(by_b, (b,), (torch.ones(()),))[1], 0),
    "jacfwd": (func.jacfwd(by_b), 0),
    "vmap": (lambda b: func.vmap(func.jacfwd(by_b))(b[None])[0], 0),
    "integers": (
        lambda b: pushforward(lambda b: forwarddiff(lambda n: (n * b).sum(), torch.arange(3)), b)(1.0),
        0,
    ),
    "beside its argument": (
        lambda b: pushforward(lambda b: forwarddiff(lambda a: (a * b).sum(), X * b), b)(1.0),
        12,
    ),
    "hessian_dual": (lambda b: hessian_dual(lambda b: by_b(b) * b, b), 0),
}
KEPT: dict[str, Callable[[Tensor], Any]] = {
    "pushforward": lambda x: pushforward(by_x, x)(x),
    "jacfwd": lambda x: func.jacfwd(by_x)(x),
    "hessian_dual": lambda x: hessian_dual(by_x, x),
    "forward in forward": lambda x: pushforward(lambda x: forwarddiff(by_x, x), x)(x),
    "a constant": lambda x: pushforward(lambda x: forwarddiff(lambda a: (a * x.detach()).sum(), X) * x, x)(x),
}


@pytest.mark.parametrize("name", DROPPED)
def test_forward_mode_says_what_it_drops(name: str) -> None:
    f, expected = DROPPED[name]
    with pytest.warns(DroppedGradientWarning, match="lambda"):
        assert f(B) == expected


@pytest.mark.parametrize("name", KEPT)
def test_and_nothing_where_nothing_is_dropped(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert KEPT[name](X).any()


def test_a_mixed_second_derivative_is_right_though_the_warning_comes() -> None:
    inner = lambda b: gradient(lambda a: forwarddiff(lambda a: (a * b).sum(), a), X)[0].sum()
    with pytest.warns(DroppedGradientWarning):
        assert gradient(inner, B) == (torch.tensor(3.0),)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_derivatives_say_so_as_they_are_traced(fullgraph: bool) -> None:
    calls: list[tuple[Callable[[Tensor], Any], float]] = [
        (lambda b: gradient(lambda b: b * by_b(b), b)[0], 12),
        (lambda b: func.grad(lambda b: b * by_b(b))(b), 12),
        (lambda b: func.jvp(by_b, (b,), (torch.ones(()),))[1], 0),
    ]
    for f, expected in calls:
        torch._dynamo.reset()
        with pytest.warns(DroppedGradientWarning, match="lambda"):
            assert torch.compile(f, backend="eager", fullgraph=fullgraph)(B) == expected
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DroppedGradientWarning)
        (g,) = torch.compile(lambda x: gradient(by_x, x), backend="eager", fullgraph=fullgraph)(X)
    assert torch.equal(g, 4 * X)
