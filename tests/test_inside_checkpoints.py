"""Derivatives in the function of PyTorch's checkpoint, which runs again for whoever pulls them back."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint, set_checkpoint_early_stop

from torchzygote import (
    Params,
    checkpointed,
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    jacobian,
    plan_hessian,
    plan_jacobian,
    pullback,
    withhessian,
)

torch.manual_seed(0)
W = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
X = torch.randn(5, dtype=torch.float64, requires_grad=True)


def layer(x: Tensor) -> Tensor:
    return torch.tanh(W @ x)


def energy(x: Tensor) -> Tensor:
    return (layer(x) ** 2).sum() + (x**4).sum()


def dropped(x: Tensor) -> Tensor:
    return torch.nn.functional.dropout(energy(x) * x, 0.5).sum()


def pulled_twice(x: Tensor) -> Tensor:
    y, back = pullback(layer, x, create_graph=True)
    return back(y)[0] + back(x)[0]


def by_params(x: Tensor) -> Tensor:
    return jacobian(lambda: layer(x), Params([W]), create_graph=True)[W]


JACOBIAN = plan_jacobian(lambda x: x[1:] * x[:-1].sin(), X)
HESSIAN = plan_hessian(lambda x: (x[1:] * x[:-1].sin()).sum(), X)

INSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient": lambda x: gradient(energy, x, create_graph=True)[0],
    "pullback": pulled_twice,
    "jacobian": lambda x: jacobian(layer, x, create_graph=True)[0],
    "jacobian, a row at a time": lambda x: jacobian(layer, x, create_graph=True, chunk_size=1)[0],
    "jacobian, forward": lambda x: jacobian(layer, x, create_graph=True, mode="forward")[0],
    "jacobian by Params": by_params,
    "hessian": lambda x: hessian(energy, x, create_graph=True),
    "hessian in chunks": lambda x: hessian(energy, x, create_graph=True, chunk_size=2),
    "hessian_reverse": lambda x: hessian_reverse(energy, x, create_graph=True),
    "withhessian": lambda x: withhessian(energy, x, create_graph=True).hess,
    "hessian of a random function": lambda x: hessian(dropped, x, create_graph=True),
    "diaghessian": lambda x: diaghessian(energy, x, create_graph=True)[0],
    "diaghessian by Params": lambda x: diaghessian(lambda: energy(x), Params([W]), create_graph=True)[W],
    "jacobian of a gradient": lambda x: jacobian(lambda t: gradient(energy, t)[0], x, create_graph=True)[0],
    "forwarddiff": lambda x: forwarddiff(lambda t: (t**3).cumsum(0), x),
    "checkpointed": lambda x: jacobian(lambda t: checkpointed(layer, t), x, create_graph=True)[0],
    "JacobianPlan": lambda x: JACOBIAN(x, create_graph=True)[0],
    "HessianPlan": lambda x: HESSIAN(x, create_graph=True),
}


@contextlib.contextmanager
def to_the_end() -> Iterator[None]:
    with set_checkpoint_early_stop(False):
        yield


def loss(inside: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = inside(x * 1.0)
    y = y.to_dense() if y.layout is not torch.strided else y
    return (y**2).sum()


def by_autograd(f: Callable[[], Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    grads = torch.autograd.grad(f(), [X, W], allow_unused=True)
    return [torch.zeros(5) if g is None else g for g in grads]


def by_gradient(f: Callable[[], Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    found = gradient(f, Params([X, W]))
    return [torch.zeros(5) if found[x] is None else found[x] for x in (X, W)]


@pytest.mark.parametrize("way", [by_autograd, by_gradient], ids=["autograd", "gradient"])
@pytest.mark.parametrize("ends_early", [True, False], ids=["early stop", "whole rerun"])
@pytest.mark.parametrize("name", INSIDE)
def test_gradients_are_those_without_a_checkpoint(
    name: str, ends_early: bool, way: Callable[[Callable[[], Tensor]], list[Tensor]]
) -> None:
    inside = INSIDE[name]
    expected = way(lambda: loss(inside, X))
    with contextlib.nullcontext() if ends_early else to_the_end():
        found = way(lambda: checkpoint(loss, inside, X, use_reentrant=False))  # type: ignore[no-any-return]
        twice = way(
            lambda: checkpoint(  # type: ignore[no-any-return]
                lambda x: checkpoint(loss, inside, x, use_reentrant=False), X, use_reentrant=False
            )
        )
    for mine, nested, plain in zip(found, twice, expected, strict=True):
        torch.testing.assert_close(mine, plain)
        torch.testing.assert_close(nested, plain)


@pytest.mark.parametrize("name", ["jacobian", "hessian", "diaghessian"])
def test_graphs_can_be_pulled_back_twice(name: str) -> None:
    y = checkpoint(loss, INSIDE[name], X, use_reentrant=False)
    first = torch.autograd.grad(y, [X, W], retain_graph=True)
    second = torch.autograd.grad(y, [X, W])
    for one, again in zip(first, second, strict=True):
        torch.testing.assert_close(one, again)


def test_a_function_that_differs_in_its_second_run_is_refused_by_pytorch() -> None:
    runs = []

    def other(x: Tensor) -> Tensor:
        runs.append(None)
        return loss(INSIDE["jacobian"], x if len(runs) == 1 else x.outer(x).sum(0))

    with pytest.raises(CheckpointError):
        torch.autograd.grad(checkpoint(other, X, use_reentrant=False), X)


def test_a_failure_in_a_second_run_is_the_functions() -> None:
    runs = []

    def f(x: Tensor) -> Tensor:
        runs.append(None)
        if len(runs) > 1:
            raise OverflowError("no more")
        return layer(x)

    with pytest.raises(OverflowError, match="no more"):
        by_autograd(
            lambda: checkpoint(loss, lambda x: jacobian(f, x, create_graph=True)[0], X, use_reentrant=False)
        )


def test_forward_mode_says_that_it_is_not_to_be_had() -> None:
    with pytest.raises(RuntimeError, match=r"torchzygote\.checkpointed works there"):
        checkpoint(loss, lambda x: hessian_dual(energy, x, create_graph=True), X, use_reentrant=False)


def test_nothing_waits_for_the_garbage_collector() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def inside(x: Tensor) -> Tensor:
        alive.append(weakref.ref(x))
        return gradient(energy, x, create_graph=True)[0]

    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            x = X * 1.0
            torch.autograd.grad(checkpoint(inside, x, use_reentrant=False).sum(), x)
            del x
        assert [x() for x in alive] == [None] * len(alive)
    finally:
        gc.enable()
