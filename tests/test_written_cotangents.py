"""Hooks and custom backwards that write into their cotangents: kept seeds and probes stay as they are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from needs_torch import custom_functions_compiled
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from torchzygote import jacobian, plan_hessian, plan_jacobian

D = torch.float64
X = torch.linspace(0.5, 2, 6, dtype=D)


class Tripled(torch.autograd.Function):
    """Its backward writes into the cotangent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.mul_(3)


class Square(torch.autograd.Function):
    """The backward of its backward writes into the cotangent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return Tripled.apply(g * x * (2 / 3))


def products(x: Tensor) -> Tensor:
    return x[1:] * x[:-1] * 3


def hooked(x: Tensor) -> Tensor:
    y = products(x)
    if y.requires_grad:
        y.register_hook(lambda g: g.mul_(2))
    return y


@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"verify": False}])
@pytest.mark.parametrize(
    ("f", "times"),
    [(lambda x: Tripled.apply(x[1:] * x[:-1]), 1), (hooked, 2)],
    ids=["custom", "hook"],
)
def test_a_plan_gives_the_same_again(
    f: Callable[[Tensor], Tensor], times: int, options: dict[str, Any]
) -> None:
    expected = times * torch.func.jacrev(products)(X)
    plan = plan_jacobian(f, X, mode="reverse", **options)
    for _ in range(3):
        torch.testing.assert_close(plan(X, dense=True)[0], expected)
        torch.testing.assert_close(copy.deepcopy(plan)(X, dense=True)[0], expected)


@pytest.mark.parametrize("verify", [True, False])
def test_a_plan_of_a_hessian_gives_the_same_again(verify: bool) -> None:
    def f(x: Tensor) -> Tensor:
        y = Square.apply(x)
        return (y[1:] * y[:-1]).sum()

    expected = torch.func.hessian(lambda x: (x[1:] ** 2 * x[:-1] ** 2).sum())(X)
    plan = plan_hessian(f, X, verify=verify)
    for _ in range(3):
        torch.testing.assert_close(plan(X, dense=True), expected)
        torch.testing.assert_close(plan.diagonal(X), expected.diagonal())


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3])
def test_no_alarm_where_the_probe_is_written_into(chunk_size: int | None) -> None:
    x = torch.linspace(0.5, 2, 64, dtype=D)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*beta state")
        (J,) = jacobian(hooked, x, sparse=True, mode="reverse", chunk_size=chunk_size)
    torch.testing.assert_close(J.to_dense(), 2 * torch.func.jacrev(products)(x))
    assert J.values().numel() == 126


@custom_functions_compiled
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_plan_gives_the_same_again(backend: str) -> None:
    f = lambda x: Tripled.apply((x * 1)[1:] * x[:-1])
    plan = plan_jacobian(f, X, mode="reverse").compile(backend=backend)
    for _ in range(3):
        torch.testing.assert_close(plan(X)[0].to_dense(), torch.func.jacrev(products)(X))


def test_a_program_of_a_plan_gives_the_same_again() -> None:
    plan = plan_jacobian(lambda x: Tripled.apply(x[1:] * x[:-1]), X, mode="reverse")
    program = make_fx(lambda x: plan(x, dense=True)[0])(X)
    for _ in range(3):
        torch.testing.assert_close(program(X), torch.func.jacrev(products)(X))


def test_writing_that_no_version_counts() -> None:
    def f(x: Tensor) -> Tensor:
        y = products(x)
        if y.requires_grad:
            y.register_hook(lambda g: torch.from_numpy(g.detach().numpy().__imul__(2)))
        return y

    plan = plan_jacobian(f, X, mode="reverse", sparsity=plan_jacobian(products, X).sparsity, chunk_size=1)
    first = plan(X)[0].to_dense()
    for _ in range(2):
        torch.testing.assert_close(plan(X)[0].to_dense(), first)
