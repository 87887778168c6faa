"""Closures that refer to what is computed with them: Python's collector doesn't see autograd's nodes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import (
    Buffer,
    Params,
    checkpointed,
    diaghessian,
    gradient,
    hessian,
    hook,
    jacobian,
    plan_jacobian,
    pullback,
    withgradient,
    withhessian,
)

X = torch.linspace(0.5, 1.5, 4)
Inner = Callable[[Tensor, list[Any]], Tensor]


def normalised(x: Tensor, seen: list[Any]) -> Tensor:
    y = hook(lambda g: g / y.norm(), x.sin())
    seen.append(y)
    return y


def normalised_structure(x: Tensor, seen: list[Any]) -> Tensor:
    both = hook(lambda gs: [g / both[0].norm() for g in gs], [x.sin(), x.cos()])
    seen.extend(both)
    return both[0] + both[1]


def recurrence(x: Tensor, seen: list[Any]) -> Tensor:
    rows = Buffer(x, 3, len(x))
    rows[0] = x
    for i in (1, 2):
        rows[i] = checkpointed(lambda i=i: rows[i - 1].sin())
    y = rows.copy().sum(0)
    seen.append(y)
    return y


class Stateful:
    def __init__(self) -> None:
        self.state = torch.zeros(())

    def step(self, x: Tensor) -> Tensor:
        return x.sin()

    def __call__(self, x: Tensor) -> Tensor:
        self.state = checkpointed(self.step, x)
        return self.state


def method(x: Tensor, seen: list[Any]) -> Tensor:
    y = Stateful()(x)
    seen.append(y)
    return y


INNERS: dict[str, Inner] = {
    "a hook": normalised,
    "a hook of a structure": normalised_structure,
    "checkpoints in a Buffer": recurrence,
    "a checkpointed method": method,
}


def _by_params(f: Callable[[Tensor], Tensor]) -> Any:
    w = X.clone().requires_grad_()
    return gradient(lambda: f(w).square().sum(), Params([w]))


def _pulled_back(f: Callable[[Tensor], Tensor]) -> Any:
    y, back = pullback(f, X)
    back(y)
    return back(2 * y)


def _failing(f: Callable[[Tensor], Tensor]) -> Any:
    def g(x: Tensor) -> Tensor:
        raise ValueError(f(x).sum().item())

    with pytest.raises(ValueError, match="0"):
        gradient(g, X)


CALLS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "gradient": lambda f: gradient(lambda x: f(x).square().sum(), X),
    "gradient by Params": _by_params,
    "withgradient": lambda f: withgradient(lambda x: f(x).square().sum(), X),
    "gradient of gradient": lambda f: gradient(
        lambda x: gradient(lambda x: f(x).square().sum(), x)[0].sum(), X
    ),
    "jacobian": lambda f: jacobian(f, X, mode="reverse"),
    "jacobian, chunks": lambda f: jacobian(f, X, mode="reverse", chunk_size=2),
    "hessian": lambda f: hessian(lambda x: f(x).square().sum(), X),
    "withhessian": lambda f: withhessian(lambda x: f(x).square().sum(), X),
    "diaghessian": lambda f: diaghessian(lambda x: f(x).square().sum(), X),
    "a plan": lambda f: plan_jacobian(f, X, mode="reverse")(2 * X),
    "a plan in forward mode": lambda f: plan_jacobian(f, X, mode="forward")(2 * X),
    "pullback": _pulled_back,
    "a call that fails": _failing,
}


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("call", CALLS)
def test_what_closures_refer_to_is_freed(call: str, inner: str) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def f(x: Tensor) -> Tensor:
        seen: list[Any] = []
        y = INNERS[inner](x, seen)
        alive.extend(map(weakref.ref, seen))
        return y

    CALLS[call](f)
    assert alive
    assert not any(y() is not None for y in alive)


@pytest.mark.parametrize("inner", INNERS)
def test_of_a_graph_that_is_kept_nothing_is_dropped(inner: str) -> None:
    f = lambda x: INNERS[inner](x, []).square().sum()
    x = X.clone().requires_grad_()
    (g,) = gradient(f, x, create_graph=True)
    (found,) = torch.autograd.grad(g.square().sum(), x)
    (expected,) = gradient(lambda x: gradient(f, x)[0].square().sum(), X)
    torch.testing.assert_close(found, expected)
    y, back = pullback(lambda x: INNERS[inner](x, []), X)
    for _ in range(3):
        torch.testing.assert_close(back(y)[0], jacobian(lambda x: INNERS[inner](x, []), X)[0].T @ y)


@pytest.mark.parametrize(("inner", "name"), [("a hook", "hook"), ("a checkpointed method", "checkpointed")])
def test_a_graph_that_is_dropped_says_so(inner: str, name: str) -> None:
    kept: list[Tensor] = []
    jacobian(lambda x: INNERS[inner](x, kept), X, mode="reverse")
    with pytest.raises(RuntimeError, match=f"{name}: the derivative .* is over, .* create_graph=True keeps"):
        kept[0].sum().backward()
