"""Hooks whose function closes over what ``f`` computes with, batched and differentiated twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from torchzygote import checkpointed, diaghessian, gradient, hessian, hessian_reverse, hook, jacobian

X = torch.tensor([[0.3, -0.7], [0.6, -1.4]], dtype=torch.float64)


def over_argument(x: Tensor) -> Tensor:
    return (hook(lambda g: g * x, x) ** 2).sum()


def over_structure(x: Tensor) -> Tensor:
    return (hook(lambda g: {"a": g["a"] * x}, {"a": x})["a"] ** 2).sum()


def over_value(x: Tensor) -> Tensor:
    y = x.exp()
    return (hook(lambda g: torch.stack(torch.broadcast_tensors(g, y)).prod(0), x) * y).sum()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "argument": over_argument,
    "structure": over_structure,
    "value inside f": over_value,
    "checkpointed": lambda x: checkpointed(over_argument, x),
}
WAYS: dict[str, Callable[[Callable[..., Any], Tensor], Tensor]] = {
    "hessian": lambda f, x: hessian(f, x),
    "hessian_reverse": lambda f, x: hessian_reverse(f, x),
    "diaghessian": lambda f, x: diaghessian(f, x)[0],
    "gradient of gradient": lambda f, x: gradient(lambda v: gradient(f, v)[0].sum(), x)[0],
    "rows, one at a time": lambda f, x: jacobian(
        lambda v: gradient(f, v)[0], x, mode="reverse", chunk_size=1
    )[0],
    "torch.func": lambda f, x: jacrev(grad(f))(x),
    "three times": lambda f, x: jacrev(jacrev(grad(f)))(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_a_batch_is_as_each_example(name: str, way: str) -> None:
    derivative = lambda x: WAYS[way](FUNCTIONS[name], x)
    torch.testing.assert_close(vmap(derivative)(X), torch.stack([derivative(x) for x in X]))


def test_as_registered_hooks_on_a_tape() -> None:
    """Both backward passes go through the hook: 2x(2x + x)' = 2x + 2x^2 where it multiplies by x."""

    def by_hand(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = x.view_as(x)
        y.register_hook(lambda g: g * x)
        (g,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        return torch.autograd.grad(g.sum(), x)[0]

    torch.testing.assert_close(
        vmap(lambda x: diaghessian(over_argument, x)[0])(X), torch.stack([by_hand(x) for x in X])
    )
