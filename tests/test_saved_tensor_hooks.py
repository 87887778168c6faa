"""Hooks on saved tensors around derivatives inside transforms: right, or refused, never lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from torchzygote import (
    checkpointed,
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    jacobian,
    pullback,
    pushforward,
    withgradient,
)

func = torch.func
Program = Callable[[Tensor], Tensor]

WEIGHTS = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
EXAMPLES = torch.linspace(0.3, 1.4, 6, dtype=torch.float64).view(2, 3)


def loss(a: Tensor) -> Tensor:
    return (a**4 * WEIGHTS).sum() * a[0]


def elementwise(a: Tensor) -> Tensor:
    return a**4 * WEIGHTS


def per_example(derivative: Program) -> Program:
    return lambda x: func.vmap(derivative)(x * EXAMPLES).sum() + x.sum()


def pushed(derivative: Program) -> Program:
    return lambda x: pushforward(derivative, x)(WEIGHTS).sum() + x.sum()


DERIVATIVES: dict[str, Program] = {
    "gradient": lambda a: gradient(loss, a)[0],
    "withgradient": lambda a: withgradient(loss, a).val,
    "pullback": lambda a: pullback(loss, a)[1](2.0)[0],
    "jacobian": lambda a: jacobian(elementwise, a, mode="reverse")[0],
    "jacobian forward": lambda a: jacobian(elementwise, a, mode="forward")[0],
    "hessian": lambda a: hessian(loss, a),
    "hessian_dual": lambda a: hessian_dual(loss, a),
    "hessian_reverse": lambda a: hessian_reverse(loss, a),
    "diaghessian": lambda a: diaghessian(loss, a)[0],
    "forwarddiff": lambda a: gradient(lambda a: forwarddiff(loss, a), a)[0],
}


@pytest.mark.parametrize("around", [per_example, pushed])
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES.keys())
def test_checkpointed_around_derivatives_inside_a_transform(
    derivative: Program, around: Callable[[Program], Program], x: Tensor
) -> None:
    program = around(derivative)
    step = 1e-6 * torch.eye(3, dtype=x.dtype)
    expected = torch.stack([(program(x + e) - program(x - e)) / 2e-6 for e in step])
    found = gradient(lambda x: checkpointed(program, x), x)[0]
    torch.testing.assert_close(found, gradient(program, x)[0])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_plain_backward_pass_through_them(x: Tensor) -> None:
    program = per_example(lambda a: gradient(loss, a, create_graph=True)[0])
    y = x.clone().requires_grad_()
    checkpointed(program, y).backward()
    torch.testing.assert_close(y.grad, gradient(program, x)[0])


def test_the_gradient_by_a_module_of_a_penalty_on_gradients() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()

    def penalty(x: Tensor) -> Tensor:
        slopes = func.vmap(lambda a: gradient(lambda a: net(a).sum(), a)[0])(x)
        return slopes.pow(2).sum() + net(x).sum()

    expected = gradient(lambda net: penalty(EXAMPLES), net)[0]
    found = gradient(lambda net: checkpointed(penalty, EXAMPLES), net)[0]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def saved_elsewhere(a: Tensor) -> Tensor:
    with save_on_cpu():
        return loss(a)


def recomputed(a: Tensor) -> Tensor:
    found: Tensor = checkpoint(loss, a, use_reentrant=False)
    return found


REFUSED: dict[str, Callable[[Program, Tensor], object]] = {
    "hessian_dual": hessian_dual,
    "pushforward of gradient": lambda f, x: pushforward(lambda x: gradient(f, x)[0], x)(x),
    "vmap of gradient": lambda f, x: func.vmap(lambda a: gradient(f, a)[0])(EXAMPLES),
    "vmap of hessian": lambda f, x: func.vmap(lambda a: hessian(f, a))(EXAMPLES),
}


@pytest.mark.parametrize("f", [saved_elsewhere, recomputed])
@pytest.mark.parametrize("way", REFUSED.values(), ids=REFUSED.keys())
def test_hooks_inside_of_f_are_refused_where_they_lose_derivatives(
    way: Callable[[Program, Tensor], object], f: Program, x: Tensor
) -> None:
    ours = "saved tensor hooks.*torchzygote.checkpointed works there"
    theirs = "_NoopSaveInputs|implement the jvp function"  # PyTorch 2.10 and 2.11 come first
    with pytest.raises(RuntimeError, match=f"{ours}|{theirs}"):
        way(f, x)


@pytest.mark.parametrize("way", REFUSED.values(), ids=REFUSED.keys())
def test_hooks_around_the_call_are_refused_too(way: Callable[[Program, Tensor], object], x: Tensor) -> None:
    with save_on_cpu(), pytest.raises(RuntimeError, match="saved tensor hooks"):
        way(loss, x)
    way(loss, x)  # and nothing is left behind


@pytest.mark.parametrize("f", [saved_elsewhere, recomputed])
def test_on_the_tape_they_are_welcome(f: Program, x: Tensor) -> None:
    torch.testing.assert_close(gradient(f, x)[0], gradient(loss, x)[0])
    torch.testing.assert_close(hessian(f, x), hessian(loss, x))
    torch.testing.assert_close(diaghessian(f, x)[0], diaghessian(loss, x)[0])


def test_hooks_may_be_any_callable(x: Tensor) -> None:
    # A method of C++ doesn't say which module it is of.
    with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach):
        found = gradient(loss, x)[0], hessian(loss, x)
    torch.testing.assert_close(found, (gradient(loss, x)[0], hessian(loss, x)))
